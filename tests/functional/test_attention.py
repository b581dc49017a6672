"""Attention against a loop over queries, and every way in which a call of it is caught."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from funcpipe._src.functional import attention as module
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional.attention import attention, whole
from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.intercept import Intercept
from funcpipe.errors import TraceError

TOLERANCE = 1e-12  # float64, sums of a few numbers in another order
sizes = st.integers(1, 4)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(f, operands, seed=0):
    """The result of a function and the gradients of a random linear form of it; zeros for what it
    does not depend on."""
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    with torch.enable_grad():
        out = f(*leaves)
    form = (out * rand(seed, *out.shape).to(out.dtype)).sum()
    if not form.requires_grad:
        return [out, *map(torch.zeros_like, leaves)]
    return [
        out.detach(),
        *torch.autograd.grad(form, leaves, allow_unused=True, materialize_grads=True),
    ]


# ---- what it is


@dataclass(frozen=True)
class Case:
    """Sizes and options of an attention, in hook layout."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    dims: tuple[int, int]
    causal: bool
    scale: float | None
    cu: torch.Tensor | None
    bias: torch.Tensor | None
    seed: int

    @property
    def spec(self):
        return Spec(self.causal, self.scale, self.bias, self.cu)

    def operands(self):
        shapes = (
            (self.heads * self.groups, self.queries, self.dims[0]),
            (self.heads, self.keys, self.dims[0]),
        )
        shapes += ((self.heads, self.keys, self.dims[1]),)
        return [rand(self.seed + i, self.batch, *s) for i, s in enumerate(shapes)]


def documents(draw, n, batch):
    """Where documents begin and the last one ends; some are empty, and they need not cover
    everything."""
    one = st.lists(st.integers(0, n), min_size=2, max_size=5).map(sorted)
    rows = draw(st.one_of(one, st.lists(one, min_size=batch, max_size=batch)))
    if isinstance(rows[0], list):
        short = min(map(len, rows))
        rows = [row[:short] for row in rows]
    return torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64])))


@st.composite
def biases(draw, *full):
    shape = [draw(st.sampled_from([1, n])) for n in full]
    x = rand(draw(st.integers(0, 99)), *shape)
    return x > 0 if draw(st.booleans()) else x


@st.composite
def cases(draw):
    batch, heads, groups = draw(sizes), draw(sizes), draw(sizes)
    queries = draw(st.integers(0, 6))
    packed = draw(st.booleans())
    keys = queries if packed else draw(st.integers(0, 6))
    return Case(
        batch,
        heads,
        groups,
        queries,
        keys,
        (draw(sizes), draw(sizes)),
        draw(st.booleans()),
        draw(st.sampled_from([None, 0.7])),
        documents(draw, queries, batch) if packed else None,
        draw(st.one_of(st.none(), biases(batch, heads * groups, queries, keys))),
        draw(st.integers(0, 99)),
    )


def visible(case, b, h, i, j):
    """Whether query i sees key j."""
    if case.causal and j > i:
        return False
    if case.cu is not None:
        ends = (case.cu if case.cu.dim() == 1 else case.cu[b]).tolist()
        if not any(start <= i < stop and start <= j < stop for start, stop in pairwise(ends)):
            return False
    bias = case.bias
    return bias is None or bias.dtype != torch.bool or bool(at(bias, b, h, i, j))


def at(x, *place):
    return x[tuple(min(p, n - 1) for p, n in zip(place, x.shape, strict=True))]


def by_hand(case, q, k, v):
    scale = case.scale or 1 / math.sqrt(case.dims[0])
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(case.batch):
        for h in range(q.shape[1]):
            for i in range(case.queries):
                seen = [j for j in range(case.keys) if visible(case, b, h, i, j)]
                if not seen:
                    continue
                keys, values = (x[b, h // case.groups, seen] for x in (k, v))
                scores = keys @ q[b, h, i] * scale
                if case.bias is not None and case.bias.dtype != torch.bool:
                    scores = scores + torch.stack([at(case.bias, b, h, i, j) for j in seen])
                index = torch.tensor([b, h, i])
                out = out.index_put(tuple(index[:, None]), scores.softmax(0)[None] @ values)
    return out


@given(cases())
def test_it_is_what_a_loop_over_queries_computes(case):
    want = gradients(lambda *x: by_hand(case, *x), case.operands())
    same(gradients(lambda *x: whole(*x, case.spec), case.operands()), want)

    def layout(q, k, v):  # the public layout
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {
            "causal": case.causal,
            "scale": case.scale,
            "cu_seqlens": case.cu,
            "bias": case.bias,
        }
        return attention(q, k, v, **options).transpose(1, 2)

    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(layout, case.operands()),
            gradients(lambda *x: whole(*x, case.spec), case.operands()),
            strict=True,
        )
    )


@given(cases(), st.data())
def test_some_rows_of_it(case, data):
    """Queries that know their places, against all keys, are those rows of the whole."""
    q, k, v = case.operands()
    rows = torch.tensor(
        data.draw(st.permutations(range(case.queries)))[: case.queries // 2 + 1], dtype=torch.int64
    )
    spec = case.spec
    if spec.bias is not None and spec.bias.shape[2] > 1:
        spec = Spec(spec.causal, spec.scale, spec.bias[:, :, rows], spec.cu_seqlens)
    got = gradients(lambda q, k, v: whole(q[:, :, rows], k, v, spec, rows), (q, k, v))
    same(got, gradients(lambda q, k, v: whole(q, k, v, case.spec)[:, :, rows], (q, k, v)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_plain_case_is_torchs_own_bit_by_bit(causal, groups, dtype):
    q, k, v = (
        rand(0, 2, 5, 4, 8).to(dtype),
        rand(1, 2, 5, 4 // groups, 8).to(dtype),
        rand(2, 2, 5, 4 // groups, 8).to(dtype),
    )

    def direct(*x):
        x = [t.transpose(1, 2) for t in x]
        return F.scaled_dot_product_attention(
            *x, is_causal=causal, enable_gqa=groups > 1
        ).transpose(1, 2)

    want = gradients(direct, (q, k, v))
    for got in (
        gradients(lambda *x: attention(*x, causal=causal), (q, k, v)),
        gradients(lambda q, k, v: attention(q, torch.stack([k, v], -3), causal=causal), (q, k, v)),
        *(
            [gradients(lambda *x: attention(torch.stack(x, -3), causal=causal), (q, k, v))]
            if groups == 1
            else []
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    alone = attention(q[1], k[1], v[1], causal=causal)
    same(alone.double(), want[0][1].double())
    assert torch.equal(attention(q[1], torch.stack([k, v], -3)[1], causal=causal), alone)


def test_places_outside_of_documents_get_zeros_and_no_gradient():
    x = rand(0, 6, 1, 2)
    out, dx = gradients(lambda x: attention(x, x, x, cu_seqlens=torch.tensor([1, 1, 3, 3, 4])), [x])
    assert not out[[0, 4, 5]].any() and not dx[[0, 4, 5]].any()
    assert out[[1, 2, 3]].all() and dx[[1, 2]].all()


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 2, 5])}])
def test_autocast_decides_the_dtype(options):
    q, k = rand(0, 1, 5, 2, 8).float(), rand(1, 1, 5, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(q, k, k, **options)
    assert torch.equal(got, attention(q.bfloat16(), k, k, **options))


def test_a_bias_may_be_learned():
    q, bias = rand(0, 2, 3, 2, 4), rand(1, 2, 1, 3)

    def loop(bias):
        case = Case(2, 2, 1, 3, 3, (4, 4), True, None, None, bias[None], 0)
        return by_hand(case, *[q.transpose(1, 2)] * 3).transpose(1, 2)

    same(
        gradients(lambda b: attention(q, q, q, causal=True, bias=b), [bias]),
        gradients(loop, [bias]),
    )


# ---- the kernels that CUDA has, stood in for


def stand_in(groups):
    """``varlen_attn`` as its documentation has it; what belongs to no document stays as it was:
    garbage."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert enable_gqa == groups and (groups or q.shape[1] == k.shape[1])
        out = torch.full_like(q, torch.nan)
        for a, b in pairwise(cu_q.tolist()):
            assert b - a <= max_q == max_k
            x = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
            done = F.scaled_dot_product_attention(
                *x,
                is_causal=window_size == (-1, 0),
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out = torch.cat([out[:a], done[0].transpose(0, 1), out[b:]])
        return out

    return kernel


@given(cases().filter(lambda c: c.cu is not None and c.queries > 0), st.booleans())
def test_documents_run_through_the_flash_kernel(case, groups):
    q, k, _ = case.operands()
    f = lambda q, k: whole(q, k, k.cos(), Spec(case.causal, case.scale, None, case.cu))  # noqa: E731
    want = gradients(f, (q, k))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fits_varlen", lambda *_: True)
        patch.setattr(module, "_kernel", lambda: (stand_in(groups), groups))
        same(gradients(f, (q, k)), want)


def test_which_documents_the_flash_kernel_gets():
    def ops(dtype, d=8, rows=None, **spec):
        with FakeTensorMode():
            q, k = (torch.empty(2, h, 16, d, dtype=dtype, device="cuda") for h in (4, 2))
            cu = torch.empty(3, dtype=torch.int32, device="cuda")
            f = lambda q, k, cu: whole(q, k, k, Spec(cu_seqlens=cu, **spec), rows)  # noqa: E731
            graph = make_fx(f, tracing_mode="fake")(q, k, cu).graph
        return [str(n.target) for n in graph.nodes if n.op == "call_function"]

    flash = "torch_attn._varlen_attn.default"
    assert flash in ops(torch.bfloat16) and flash in ops(torch.float16, causal=True)
    assert flash not in ops(torch.float32) and flash not in ops(torch.bfloat16, d=12)


@given(cases())
def test_heads_of_their_own_for_kernels_that_do_not_group(case):
    want = gradients(lambda *x: whole(*x, case.spec), case.operands())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_shares_heads", lambda *_: False)
        same(gradients(lambda *x: whole(*x, case.spec), case.operands()), want)


@given(cases())
def test_it_traces_on_fakes(case):
    """The joint graph of fakes, run on the data, computes what the code does."""
    extra = [x for x in (case.bias, case.cu) if x is not None]

    def joint(*tensors):
        rest = iter(tensors[4:])
        bias, cu = (x if x is None else next(rest) for x in (case.bias, case.cu))
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        with torch.enable_grad():
            out = whole(*leaves, Spec(case.causal, case.scale, bias, cu))
        return out.detach(), *torch.autograd.grad(out, leaves, tensors[3])

    operands = case.operands()
    operands.append(rand(9, *operands[0].shape[:3], operands[2].shape[3]))
    same(
        make_fx(joint, tracing_mode="fake")(*operands, *extra)(*operands, *extra),
        joint(*operands, *extra),
    )


# ---- calls of torch's own attention


class Recorder:
    """A hook that computes what was asked, and remembers it."""

    def __init__(self):
        self.asked = []

    def attention(self, q, k, v, spec):
        self.asked.append((q, k, v, spec))
        assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]
        assert k.shape[1:3] == v.shape[1:3] and q.shape[1] % k.shape[1] == 0
        assert spec.bias is None or spec.bias.dim() == 4
        with hook.bound(None):
            return whole(q, k, v, spec)


def caught(f, *operands):
    """A function run with a hook; the hook, result and gradients."""
    recorder = Recorder()
    with hook.bound(recorder), Intercept():
        return recorder, gradients(f, operands)


@st.composite
def calls(draw):
    """Operands and keywords of ``scaled_dot_product_attention``, with any leading dims that
    broadcast."""
    lead = draw(st.lists(sizes, max_size=3))
    grouped = draw(st.booleans()) and len(lead) > 0
    heads = draw(sizes) if grouped else lead[-1] if lead else 1
    n, m, d = draw(sizes), draw(sizes), draw(sizes)
    full = [*lead[:-1], heads * draw(sizes)] if grouped else lead

    def leading(dims):
        some = [draw(st.sampled_from([1, size])) for size in dims]
        return some[draw(st.integers(0, len(some))) :]

    # Without dims of its own, torch takes an operand for (positions, head dim); what is left out is
    # broadcast.
    q = full if grouped or not lead else draw(st.sampled_from([full, leading(full)]))
    kv = [*lead[:-1], heads] if grouped else None
    k, v = (kv or leading(full) for _ in range(2))
    keywords = {"scale": draw(st.sampled_from([None, 0.3])), "enable_gqa": grouped}
    if draw(st.booleans()):
        keywords["is_causal"] = True
    else:
        scores = q if grouped else torch.broadcast_shapes(q, k)
        shape = [*leading(scores), draw(st.sampled_from([1, n])), draw(st.sampled_from([1, m]))]
        keywords["attn_mask"] = draw(st.sampled_from([rand(7, *shape), rand(8, *shape) > 0]))
    return [rand(0, *q, n, d), rand(1, *k, m, d), rand(2, *v, m, draw(sizes))], keywords


@given(calls())
def test_any_call_of_torchs_attention_is_caught(call):
    operands, keywords = call
    f = lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, **keywords)  # noqa: E731
    recorder, got = caught(f, *operands)
    want = gradients(f, operands)
    assert got[0].shape == want[0].shape
    same(got, want)
    ((*_, spec),) = recorder.asked
    mask = keywords.get("attn_mask")
    assert (spec.causal, spec.scale) == (keywords.get("is_causal", False), keywords["scale"])
    assert mask is None or spec.bias.shape[2:] == mask.shape[-2:]


def test_dims_of_size_one_of_a_mask_stay():
    def seen(mask, *shape):
        recorder, _ = caught(
            lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask), rand(0, *shape, 5, 8)
        )
        return tuple(recorder.asked[0][3].bias.shape)

    mask = torch.ones(1, 5, dtype=torch.bool)
    assert seen(mask, 2, 3) == seen(mask, 7, 2, 3) == (1, 1, 1, 5)
    assert seen(mask.expand(3, 1, 5), 2, 3) == seen(mask.expand(3, 1, 5), 7, 2, 3) == (1, 3, 1, 5)
    assert seen(mask.expand(2, 1, 1, 5), 2, 3) == (2, 1, 1, 5)
    assert seen(mask.expand(2, 1, 1, 5), 7, 2, 3) == (14, 1, 1, 5)


def test_positional_arguments_and_packed_operands():
    x = rand(0, 2, 3, 4, 8)
    recorder, _ = caught(
        lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=2.0), x
    )
    assert recorder.asked[0][3] != Spec(True, 2.0) and recorder.asked[0][3].causal
    recorder, got = caught(lambda x: attention(torch.stack([x, x, x], -3), causal=True), x)
    assert [t.shape for t in recorder.asked[0][:3]] == [(2, 4, 3, 8)] * 3  # heads are dim -2 here
    assert torch.equal(got[0], attention(x, x, x, causal=True))


def test_without_a_hook_nothing_is_caught():
    x = rand(0, 2, 3, 4, 8)
    with Intercept():
        got = gradients(lambda x: F.scaled_dot_product_attention(x, x, x), [x])
        dropped = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    assert torch.equal(got[0], F.scaled_dot_product_attention(x, x, x)) and dropped.shape == x.shape


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"key_padding_mask": True},
        {"is_causal": True, "key_padding_mask": True},
    ],
)
def test_multihead_attention_is_caught(batch_first, options):
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(8, 4, batch_first=batch_first, dtype=torch.float64)
    x = rand(1, 3, 3, 8)
    options = {**options}
    if options.get("is_causal"):
        options["attn_mask"] = torch.ones(3, 3, dtype=torch.bool).triu(1)
    if options.get("key_padding_mask"):
        options["key_padding_mask"] = torch.tensor([[False, False, True]] * 3)
    f = lambda x: layer(x, x, x, need_weights=False, **options)[0]  # noqa: E731
    recorder, got = caught(f, x)
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(f, [x]), strict=True))
    assert [t.shape for t in recorder.asked[0][:3]] == [(3, 4, 3, 2)] * 3 and len(
        recorder.asked
    ) == 1


def test_the_transformer_layer_of_torch_is_caught():
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    x = rand(1, 2, 5, 8)
    recorder, got = caught(layer, x)
    assert len(recorder.asked) == 1 and torch.equal(got[0], layer(x).detach())


def test_a_checkpoint_recomputes_through_the_hook():
    """Driven as the tracer drives it: ``torch.autograd.grad`` would have the mode off while it
    recomputes."""
    x = rand(0, 1, 2, 3, 4).requires_grad_()
    recorder = Recorder()
    engine = torch.autograd.graph._engine_run_backward
    with hook.bound(recorder), Intercept(), torch.autograd.set_multithreading_enabled(False):
        out = checkpoint(
            lambda x: F.scaled_dot_product_attention(x, x, x).sin(), x, use_reentrant=False
        )
        assert len(recorder.asked) == 1
        (got,) = engine(
            (out.sum(),),
            (torch.ones((), dtype=x.dtype),),
            False,
            False,
            (x,),
            True,
            accumulate_grad=False,
        )
        assert len(recorder.asked) == 2
        layer = torch.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        y = checkpoint(
            lambda x: layer(x, x, x, need_weights=False)[0], x[0], use_reentrant=False
        ).sum()
        engine((y,), (torch.ones_like(y),), False, False, (x,), True, accumulate_grad=False)
        assert len(recorder.asked) == 4
    want = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x).sin().sum(), x)[0]
    assert torch.equal(got, want)


# ---- what it refuses

X, KV = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 2, 8)


@pytest.mark.parametrize(
    ("args", "options", "words"),
    [
        ((None,), {}, "q is None, not a tensor"),
        ((X, X, 3), {}, "v is 3, not a tensor"),
        ((X, None, X), {}, "got v but no k"),
        ((X,), {}, "q alone holds queries, keys and values, .* has shape \\(2, 5, 4, 8\\)"),
        ((X, X), {}, "without v, k holds keys and values, .* stack them along dim -3"),
        ((X[0, 0], KV[0, 0]), {}, "q has shape \\(4, 8\\)"),
        (
            (X, X[0], X[0]),
            {},
            "k has shape \\(5, 4, 8\\) and q \\(2, 5, 4, 8\\): both have a batch dim",
        ),
        ((X, X[:1], X[:1]), {}, "batch sizes differ: .*expand them"),
        ((X, X, X[:, 1:]), {}, "k and v have 5 and 4 positions"),
        ((X, X, X[:, :, 1:]), {}, "k and v have 4 and 3 heads"),
        ((X, X[:, :, 1:], X[:, :, 1:]), {}, "4 query heads are no multiple of 3"),
        ((X, X[..., 1:], X), {}, "head dims of q and k differ, 8 and 7"),
        ((X.int(), X.int(), X.int()), {}, "q has dtype torch.int32"),
        ((X, X.double(), X), {}, "dtypes differ: q torch.float32, k torch.float64"),
        ((X, X.to("meta"), X), {}, "devices differ: .*k on meta"),
        ((X, X, X), {"cu_seqlens": [0, 5]}, "cu_seqlens is \\[0, 5\\]"),
        ((X, X, X), {"cu_seqlens": torch.tensor([0.0, 5])}, "cu_seqlens is torch.float32"),
        (
            (X, X, X),
            {"cu_seqlens": torch.tensor([5])},
            "cu_seqlens has shape \\(1,\\) .*or \\(2, documents \\+ 1\\)",
        ),
        (
            (X[0], X[0], X[0]),
            {"cu_seqlens": torch.zeros(1, 3).int()},
            "cu_seqlens has shape \\(1, 3\\)",
        ),
        (
            (X, X[:, 1:], X[:, 1:]),
            {"cu_seqlens": torch.tensor([0, 5])},
            "there are 5 queries and 4 keys",
        ),
        ((X, X, X), {"bias": torch.zeros(5, 5).int()}, "bias is torch.int32"),
        ((X, X, X), {"bias": 1.0}, "bias is 1.0"),
        (
            (X, X, X),
            {"bias": torch.zeros(5, 4)},
            "bias of shape \\(1, 1, 5, 4\\) cannot be broadcast to \\(2, 4, 5, 5\\)",
        ),
        ((X, X, X), {"bias": torch.zeros(1, 1, 1, 5, 5)}, "bias of shape \\(1, 1, 1, 5, 5\\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(args, options, words):
    with pytest.raises(TraceError, match=words):
        attention(*args, **options)


def test_under_a_hook_positions_of_a_bias_may_be_those_of_all_ranks():
    with hook.bound(Recorder()), pytest.raises(RuntimeError):  # it is the hook that finds out
        attention(X, X, X, bias=torch.zeros(9, 5))
    with (
        hook.bound(Recorder()),
        pytest.raises(TraceError, match="\\(2, 4, query positions, key positions\\)"),
    ):
        attention(X, X, X, bias=torch.zeros(3, 5, 5))


def test_calls_of_torchs_attention_that_cannot_be_split_are_refused():
    def call(heads, **keywords):
        q, k, v = (torch.zeros(2, h, 5, 8) for h in heads)
        with hook.bound(Recorder()), Intercept():
            F.scaled_dot_product_attention(q, k, v, **keywords)

    with pytest.raises(
        TraceError, match=r"dropout_p=0.1 cannot be split.*Set attention dropout to 0"
    ):
        call((4, 4, 4), dropout_p=0.1)
    with pytest.raises(TraceError, match=r"4, 2, 2 heads .*with enable_gqa=False"):
        call((4, 2, 2))
    with pytest.raises(TraceError, match=r"4, 3, 3 heads .*with enable_gqa=True"):
        call((4, 3, 3), enable_gqa=True)
