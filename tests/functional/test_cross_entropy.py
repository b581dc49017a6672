"""Cross-entropy in chunks, and with the vocabulary over ranks, is torch's."""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import funcpipe as fp
from funcpipe._src.collectives import axes_of, bind_mesh, bind_rank
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.functional import dispatch as hook
from funcpipe._src.functional import losses
from funcpipe._src.functional.losses import Options, cross_entropy
from funcpipe._src.graph.functionalize import make_functional
from funcpipe.errors import AxisError, TraceError
from funcpipe.testing import assert_equivalent

FLOAT64 = 1e-12  # relative; sums over tokens, columns and ranks in another order
IGNORED = -7


# ---- what is asked, and torch's answer


@dataclass(frozen=True)
class Case:
    """A cross-entropy: rows for every rank of a mesh, and options."""

    tokens: tuple[int, ...]
    vocab: int
    features: int
    smoothing: float
    chunk: int
    ignored: float  # which part of the tokens
    seed: int

    def data(
        self, dtype: torch.dtype = torch.float64
    ) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        g = torch.Generator().manual_seed(self.seed)
        rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        labels = torch.randint(self.vocab, (sum(self.tokens),), generator=g)
        labels[torch.rand(labels.shape, generator=g) < self.ignored] = IGNORED
        x = 3 * rand(sum(self.tokens), self.features)
        return (
            list(x.split(self.tokens)),
            rand(self.vocab, self.features),
            list(labels.split(self.tokens)),
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": IGNORED,
            "label_smoothing": self.smoothing,
            "chunk_tokens": self.chunk,
        }

    def torchs(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits, labels, reduction="sum", ignore_index=IGNORED, label_smoothing=self.smoothing
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, ranks: int = 1, even: bool = False) -> Case:
    one = draw(st.integers(0, 9))
    return Case(
        tokens=(one,) * ranks if even else tuple(draw(st.integers(0, 9)) for _ in range(ranks)),
        vocab=draw(st.integers(1, 20)),
        features=draw(st.integers(1, 5)),
        smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        chunk=draw(st.integers(1, 10)),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 99)),
    )


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Relative to the largest element: gradients that cancel are rounding errors of what was added
    up."""
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=FLOAT64, atol=FLOAT64 * max(1.0, _largest(want)))


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def gradients(
    total: torch.Tensor, *leaves: torch.Tensor, seed: float = 1.0
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, leaves, torch.full_like(total, seed))


# ---- one rank


@given(cases(), st.booleans(), st.sampled_from([None, "seq", ("data", "seq")]))
def test_loss_and_gradients_are_those_of_torch(case: Case, headless: bool, axis: Any) -> None:
    (x,), head, (labels,) = case.data()
    if headless:
        leaves: list[Any] = [(x @ head.T).requires_grad_()]
        total, weight = cross_entropy(*leaves, None, labels, **case.options)
        want = case.torchs(leaves[0], labels)
    else:
        leaves = [x.requires_grad_(), head.requires_grad_()]
        total, weight = cross_entropy(*leaves, labels, axis=axis, **case.options)
        want = case.torchs(x @ head.T, labels)
    same(total, want)
    same(weight, (labels != IGNORED).sum().double())
    for got, wanted in zip(
        gradients(total, *leaves, seed=0.7), gradients(want, *leaves, seed=0.7), strict=True
    ):
        same(got, wanted)


@given(cases(), st.sampled_from([(), (2,), (3, 1), (0, 2)]))
def test_any_number_of_dims(case: Case, outer: tuple[int, ...]) -> None:
    case = replace(case, tokens=(math.prod(outer),))
    (x,), head, (labels,) = case.data()
    loss = cross_entropy(x.view(*outer, case.features), head, labels.view(outer), **case.options)
    same(loss.total, case.torchs(x @ head.T, labels))
    assert loss.weight.shape == ()


@given(cases(), st.sampled_from([(True, False), (False, True)]))
def test_only_gradients_that_are_asked_for(case: Case, asked: tuple[bool, bool]) -> None:
    (x,), head, (labels,) = case.data()
    leaves = [t.requires_grad_(a) for t, a in zip((x, head), asked, strict=True)]
    wanted = [t for t in leaves if t.requires_grad]
    (got,) = gradients(cross_entropy(x, head, labels, **case.options).total, *wanted)
    (want,) = gradients(case.torchs(x @ head.T, labels), *wanted)
    same(got, want)


@given(cases())
def test_a_head_that_is_also_the_embedding(case: Case) -> None:
    _, table, (labels,) = case.data()
    ids = torch.arange(len(labels)) % case.vocab

    def loss(ours: bool) -> torch.Tensor:
        x = torch.tanh(F.embedding(ids, table))
        return (
            cross_entropy(x, table, labels, **case.options).total
            if ours
            else case.torchs(x @ table.T, labels)
        )

    table.requires_grad_()
    same(gradients(loss(True), table)[0], gradients(loss(False), table)[0])


@given(cases(), st.booleans())
def test_transforms_of_functions(case: Case, headless: bool) -> None:
    """grad, grad of grad, and per-example gradients, a vmap of grad."""
    (x,), head, (labels,) = case.data()

    def ours(x: torch.Tensor, head: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
        x, given = (x @ head.T, None) if headless else (x, head)
        return cross_entropy(x, given, labels, **case.options).total

    def theirs(x: torch.Tensor, head: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
        return case.torchs(x @ head.T, labels)

    def slope(f: Any) -> Any:
        return lambda x, head: sum(g.sin().sum() for g in torch.func.grad(f, (0, 1))(x, head))

    for f, g in ((ours, theirs), (slope(ours), slope(theirs))):
        got, want = (torch.func.grad(fn, (0, 1))(x, head) for fn in (f, g))
        optree.tree_map(same, got, want)
    if len(x):
        examples = (x[:, None], head, labels[:, None])
        each = [
            torch.func.vmap(torch.func.grad(f, (0, 1)), (0, None, 0))(*examples)
            for f in (ours, theirs)
        ]
        optree.tree_map(same, *each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 100, 1024])
def test_half_precision(dtype: torch.dtype, smoothing: float, chunk: int) -> None:
    """Errors are those of rounding logits and products once; many chunks add none, for gradients
    are summed in float32."""
    case = Case((700,), vocab=33, features=8, smoothing=smoothing, chunk=chunk, ignored=0.1, seed=0)
    (x,), head, (labels,) = case.data(dtype)
    wide = [t.double().requires_grad_() for t in (x, head)]
    want = case.torchs(wide[0] @ wide[1].T, labels)
    loss = cross_entropy(x.requires_grad_(), head.requires_grad_(), labels, **case.options)
    assert loss.total.dtype == loss.weight.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert abs(loss.total.item() / want.item() - 1) < eps
    for got, wanted in zip(gradients(loss.total, x, head), gradients(want, *wide), strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < 2 * eps * wanted.norm()


def test_under_autocast() -> None:
    """As if operands came in half precision: backward, which runs outside, computes the same logits
    again."""
    case = Case((50,), vocab=33, features=8, smoothing=0.0, chunk=16, ignored=0.1, seed=0)
    (x,), head, (labels,) = case.data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(x.bfloat16(), head.requires_grad_(), labels, **case.options)
    (got,) = gradients(loss.total, head)
    half = head.detach().bfloat16().requires_grad_()
    want = cross_entropy(x.bfloat16(), half, labels, **case.options)
    assert torch.equal(loss.total, want.total)
    assert torch.equal(got, gradients(want.total, half)[0].float())
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            cross_entropy(x.double(), head.double(), labels, **case.options).total.dtype
            == torch.float64
        )
        with pytest.raises(TraceError, match=r"it takes floating-point rows"):
            cross_entropy(x.long(), head, labels)
    logits = torch.randn(50, 33)
    with torch.autocast("cpu", torch.bfloat16):  # which takes losses of logits in float32
        loss = cross_entropy(logits, None, labels, **case.options)
    assert torch.equal(loss.total, cross_entropy(logits, None, labels, **case.options).total)


# ---- nothing to count, and labels that are none


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_that_counts(tokens: int, smoothing: float) -> None:
    x, head = torch.randn(tokens, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    labels = torch.full((tokens,), -100)
    for axis in (None, "seq"):
        loss = cross_entropy(x, head, labels, axis=axis, label_smoothing=smoothing, chunk_tokens=2)
        assert loss.total.item() == loss.weight.item() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(loss.total, x, head))


@pytest.mark.parametrize("label", [-1, 7, 8])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_label_that_is_no_column_is_seen(label: int, ranks: int) -> None:
    case = Case((2,) * ranks, vocab=7, features=3, smoothing=0.0, chunk=4, ignored=0.0, seed=0)
    xs, head, labels = case.data()
    labels[0][1] = label
    totals, grads, heads, _ = zip(
        *on_ranks(case, xs, head, labels, fp.Mesh(a=ranks), ("a",)), strict=True
    )
    assert totals[0].isnan() and sum(heads).isnan().all()
    assert grads[0][1].isnan().all() and grads[0][0].isfinite().all()
    assert all(
        t.isfinite() and g.isfinite().all() for t, g in zip(totals[1:], grads[1:], strict=True)
    )
    labels[0][1] = IGNORED
    assert all(
        t.isfinite() and h.isfinite().all()
        for t, _, h, _ in on_ranks(case, xs, head, labels, fp.Mesh(a=ranks), "a")
    )


def test_masked_logits_have_no_part() -> None:
    """A logit of -inf, by which some models hide columns."""
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    loss, want = (
        cross_entropy(logits, None, labels).total,
        F.cross_entropy(logits, labels, reduction="sum"),
    )
    same(loss, want)
    same(gradients(loss, logits)[0], gradients(want, logits)[0])


# ---- the vocabulary over ranks


def on_ranks(
    case: Case, xs: Any, head: Any, labels: Any, mesh: fp.Mesh, axis: Any, tokens: Any = None
) -> list[Any]:
    """Of every rank: total, gradients of x and head, weight. Rank r seeds r + 1, so that mixed-up
    seeds show."""
    options = Options(axis, **case.options, tokens=tokens)

    def body(comm: Any) -> Any:
        with bind_rank(comm), bind_mesh(mesh, mesh.axes), torch.enable_grad(), _one_thread():
            x, own = xs[comm.rank].clone().requires_grad_(), head.clone().requires_grad_()
            total, weight = losses.compute(x, own, labels[comm.rank], options)
            return total.detach(), *gradients(total, x, own, seed=comm.rank + 1.0), weight

    return run_ranks(mesh, body)


def _one_thread() -> contextlib.AbstractContextManager[None]:
    return torch.autograd.set_multithreading_enabled(False)


def by_torch(
    case: Case, xs: Any, head: Any, labels: Any
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """The totals of all ranks, and the gradients of x and head."""
    leaves = [x.clone().requires_grad_() for x in (*xs, head)]
    totals = [case.torchs(x @ leaves[-1].T, y) for x, y in zip(leaves, labels, strict=False)]
    loss = sum((r + 1) * total for r, total in enumerate(totals))
    return [t.detach() for t in totals], torch.autograd.grad(loss, leaves)


@given(st.integers(1, 8).flatmap(lambda n: cases(n)))
def test_the_vocabulary_over_ranks(case: Case) -> None:
    """Any number of ranks and columns, of which none need divide the other; uneven tokens."""
    xs, head, labels = case.data()
    ranks = len(case.tokens)
    found = on_ranks(case, xs, head, labels, fp.Mesh(a=ranks), "a", tokens=case.tokens)
    totals, want = by_torch(case, xs, head, labels)
    share = -(-case.vocab // ranks)
    for r, (total, g_x, g_head, weight) in enumerate(found):
        same(total, totals[r])
        same(weight, (labels[r] != IGNORED).sum().double())
        same(g_x, want[r])
        others = torch.cat((g_head[: share * r], g_head[share * (r + 1) :]))
        assert torch.equal(others, torch.zeros_like(others))
    same(sum(g_head for _, _, g_head, _ in found), want[-1])


@given(cases(6, even=True), st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "a")]))
def test_on_some_axes_of_a_mesh(case: Case, axes: tuple[str, ...]) -> None:
    xs, head, labels = case.data()
    found = on_ranks(case, xs, head, labels, fp.Mesh(a=2, b=3), axes)
    totals, want = by_torch(case, xs, head, labels)
    for got, wanted in zip(found, totals, strict=True):
        same(got[0], wanted)
    for got, wanted in zip(found, want, strict=False):
        same(got[1], wanted)
    same(sum(g_head for _, _, g_head, _ in found), want[-1])


@given(cases(3, even=True))
def test_ranks_in_one_tensor(case: Case) -> None:
    """`fp.vmap` over the axis, with the head of all ranks the same tensor; and torch.func inside
    and outside."""
    xs, head, labels = case.data()
    x, y, seeds = torch.stack(xs), torch.stack(labels), torch.arange(1.0, 4, dtype=torch.float64)
    totals, want = by_torch(case, xs, head, labels)

    def rank(x: torch.Tensor, head: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> Any:
        total, weight = cross_entropy(x, head, y, axis="i", **case.options)
        return total * seed, (total, weight)

    run = fp.vmap(
        lambda *args: torch.func.grad(rank, (0, 1), has_aux=True)(*args), "i", (0, None, 0, 0)
    )
    (g_x, g_head), (total, weight) = run(x, head, y, seeds)
    same(total, torch.stack(totals))
    same(weight, (y != IGNORED).sum(1).double())
    same(g_x, torch.stack(want[:-1]))
    same(g_head.sum(0), want[-1])
    leaves = x.clone().requires_grad_(), head.clone().requires_grad_()
    by_autograd = torch.autograd.grad(
        fp.vmap(rank, "i", (0, None, 0, 0))(*leaves, y, seeds)[0].sum(), leaves
    )
    optree.tree_map(
        same, by_autograd, (torch.stack(want[:-1]), want[-1])
    )  # runs backward after the mapped function
    outside = lambda x, head: fp.vmap(rank, "i", (0, None, 0, 0))(x, head, y, seeds)[0].sum()  # noqa: E731
    g_x, g_head = torch.func.grad(outside, (0, 1))(x, head)
    same(g_x, torch.stack(want[:-1]))
    same(g_head, want[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_over_ranks(dtype: torch.dtype) -> None:
    case = Case((60,) * 4, vocab=33, features=8, smoothing=0.1, chunk=7, ignored=0.1, seed=0)
    xs, head, labels = case.data(dtype)
    totals, want = by_torch(case, [x.double() for x in xs], head.double(), labels)
    found = on_ranks(case, xs, head, labels, fp.Mesh(a=4), "a")
    eps = torch.finfo(dtype).eps
    for (total, g_x, _, _), wanted, w_x in zip(found, totals, want, strict=False):
        assert total.dtype == torch.float32 and g_x.dtype == dtype
        assert abs(total.item() / wanted.item() - 1) < eps
        assert (g_x.double() - w_x).norm() < 2 * eps * w_x.norm()
    assert (sum(g.double() for _, _, g, _ in found) - want[-1]).norm() < 2 * eps * want[-1].norm()


# ---- memory


class Watch(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an op makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max(
            self.largest,
            *(t.numel() for t in optree.tree_leaves(out) if isinstance(t, torch.Tensor)),
            0,
        )
        return out


MEMORY = Case((96,), vocab=64, features=5, smoothing=0.1, chunk=8, ignored=0.1, seed=0)


def test_full_logits_never_exist() -> None:
    (x,), head, (labels,) = MEMORY.data()
    leaves = x.requires_grad_(), head.requires_grad_()
    with _one_thread(), Watch() as ours:
        gradients(cross_entropy(x, head, labels, **MEMORY.options).total, *leaves)
    with _one_thread(), Watch() as torchs:
        gradients(MEMORY.torchs(x @ head.T, labels), *leaves)
    assert ours.largest == max(8 * 64, x.numel(), head.numel()) == 512
    assert torchs.largest == 96 * 64


def test_full_logits_exist_on_no_rank() -> None:
    """What was said of a chunk holds of its logits on a rank, too: those of all ranks' tokens, for
    a share of columns."""
    mesh = fp.Mesh(a=4)
    case = replace(MEMORY, tokens=(96,) * 4)
    xs, head, labels = case.data()

    def body(comm: Any) -> int:
        with (
            bind_rank(comm),
            bind_mesh(mesh, "a"),
            torch.enable_grad(),
            _one_thread(),
            Watch() as watch,
        ):
            leaves = xs[comm.rank].clone().requires_grad_(), head.clone().requires_grad_()
            gradients(
                cross_entropy(*leaves, labels[comm.rank], axis="a", **case.options).total, *leaves
            )
        return watch.largest

    # Beside a chunk's logits there are lse and its two gradients of all tokens: 3 * 4 * 96.
    assert set(run_ranks(mesh, body)) == {max(8 * 64, 3 * 4 * 96)}


def test_logits_are_widened_in_chunks() -> None:
    logits = torch.randn(96, 64).bfloat16().requires_grad_()
    sizes: list[int] = []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in optree.tree_leaves(out)
                if getattr(t, "dtype", None) == torch.float32
            )
            return out

    with _one_thread(), Wide():
        gradients(cross_entropy(logits, None, torch.arange(96) % 64, chunk_tokens=8).total, logits)
    assert max(sizes) == 8 * 64


# ---- graphs


@given(st.integers(1, 4).flatmap(lambda n: cases(n, even=True)))
def test_one_graph_serves_all_ranks(case: Case) -> None:
    """Traced outside of any rank on fakes, forward and backward; every rank then runs the same
    graph, bit by bit."""
    xs, head, labels = case.data()
    mesh = fp.Mesh(a=len(xs))

    def joint(x: torch.Tensor, head: torch.Tensor, y: torch.Tensor, seed: torch.Tensor) -> Any:
        x, head = x.detach().requires_grad_(), head.detach().requires_grad_()
        with torch.enable_grad():
            total, weight = cross_entropy(x, head, y, axis="a", **case.options)
        return total, *torch.autograd.grad(total, (x, head), seed), weight

    seeds = [torch.tensor(r + 1.0, dtype=torch.float64) for r in range(mesh.size)]
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in (xs[0], head, labels[0], seeds[0])]
    with bind_mesh(mesh, "a"), _one_thread(), mode:
        module = make_fx(joint, tracing_mode="fake")(*fakes)
    assert make_functional(module)  # no second trace is needed
    assert axes_of(module.graph) == (set() if mesh.size == 1 else {("a",)})
    assert not [n for n in module.graph.nodes if n.op == "get_attr"]  # no constants of a rank

    def body(comm: Any) -> Any:
        with bind_rank(comm):
            return module(xs[comm.rank], head, labels[comm.rank], seeds[comm.rank])

    want = on_ranks(case, xs, head, labels, mesh, "a")
    for got, wanted in zip(run_ranks(mesh, body), want, strict=True):
        assert all(torch.equal(g.detach(), w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("data", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sharded", [False, True])
def test_in_a_transformed_step(pipe: int, data: int, sharded: bool) -> None:
    """Tied to the embedding, a vocabulary that does not divide, padding that shards hold
    unequally."""

    def loss_fn(params: Any, batch: Any) -> fp.Mean:
        x = F.embedding(batch["tokens"], params["embed"])
        for w in params["layers"]:
            x = fp.stage_boundary(x + torch.tanh(x @ w))
        return cross_entropy(
            x, params["embed"], batch["labels"], axis="data", label_smoothing=0.1, chunk_tokens=3
        )

    def step(state: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state, batch)
        return optree.tree_map(lambda p, g: p - 0.1 * g, state, grads), {"loss": loss}

    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    params = {"embed": rand(10, 4), "layers": [0.5 * rand(4, 4) for _ in range(3)]}
    batches = []
    for _ in range(2):
        tokens = torch.randint(10, (8, 5), generator=g)
        batches.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:].clone()})
        batches[-1]["labels"][1:5] = -100
    fast = fp.data_parallel(step, axis="data")
    fast = fp.pipelined(fast, axis="pipe", microbatches=2, schedule=fp.schedules.zb_h1())
    fast = fp.sharded_weights(fast, axis="data") if sharded else fast
    assert_equivalent(
        step, fast, fp.Mesh(pipe=pipe, data=data), lambda p: p, params, batches, rtol=FLOAT64
    )


# ---- the hook


def test_a_hook_is_asked() -> None:
    x, head, labels = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, 2])
    asked: list[Any] = []

    class Asked:
        def cross_entropy(self, *args: Any) -> Any:
            asked.append(args)
            with hook.bound(None):
                return losses.compute(*args)

    with hook.bound(Asked()):  # type: ignore[arg-type]
        got = cross_entropy(
            x, head, labels, axis="seq", chunk_tokens=1, label_smoothing=0.5, ignore_index=2
        )
    ((*operands, options),) = asked
    assert all(a is b for a, b in zip(operands, (x, head, labels), strict=True))
    assert options == Options(
        "seq", ignore_index=2, label_smoothing=0.5, chunk_tokens=1, tokens=None
    )
    assert isinstance(got, fp.Mean) and got.weight.item() == 1


# ---- what is refused

X, HEAD, LABELS = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        (
            (X.long(), HEAD, LABELS),
            {},
            "x has shape (2, 3) and dtype torch.int64; it takes floating-point rows (..., d)",
        ),
        (
            (torch.tensor(1.0), None, LABELS),
            {},
            "x has shape () and dtype torch.float32; it takes floating-point rows (..., d)",
        ),
        (
            (X, None, LABELS),
            {"axis": "seq"},
            "axis='seq' spreads the vocabulary over ranks, but without a head x is logits of all "
            "of it already; pass hidden states and the head, or leave axis out",
        ),
        (
            (X, HEAD.T, LABELS),
            {},
            "head has shape (3, 5), and x (2, 3); for x (..., d) it takes (vocab, d), as in "
            "torch.nn.Linear(d, vocab).weight",
        ),
        (
            (X, HEAD.bfloat16(), LABELS),
            {},
            "head has dtype torch.bfloat16, and x torch.float32; write head.to(x.dtype), or use "
            "torch.autocast",
        ),
        (
            (X, HEAD, LABELS.int()),
            {},
            "labels have dtype torch.int32; they are the numbers of columns: write labels.long()",
        ),
        (
            (X, HEAD, LABELS[:1]),
            {},
            "labels have shape (1,), and x (2, 3); there is one label per row of x",
        ),
        (
            (X, HEAD, LABELS),
            {"label_smoothing": 1.5},
            "label_smoothing=1.5; it is a number from 0 to 1",
        ),
        (
            (X, HEAD, LABELS),
            {"chunk_tokens": 0},
            "chunk_tokens=0; a chunk has a whole number of tokens, 1 or more",
        ),
        (
            (X, HEAD, LABELS),
            {"chunk_tokens": 2.0},
            "chunk_tokens=2.0; a chunk has a whole number of tokens, 1 or more",
        ),
    ],
)
def test_operands_that_do_not_fit(args: Any, options: Any, text: str) -> None:
    with pytest.raises(TraceError, match=f"^{re.escape('cross_entropy: ' + text)}$"):
        cross_entropy(*args, **options)


def test_an_axis_that_is_not_bound() -> None:
    with bind_mesh(fp.Mesh(data=2), ("data",)), pytest.raises(AxisError) as caught:
        cross_entropy(X, HEAD, LABELS, axis="seq")
    assert str(caught.value) == (
        "cross_entropy: axis 'seq' is not bound here: Mesh(data=2) lacks it, and bound are 'data' "
        "(of the mesh). Name one of those, or add it to the mesh and stack a transform on it"
    )


def test_more_axes_than_split_the_sequence() -> None:
    text = (
        "cross_entropy: axis=('a', 'b') has 4 ranks, but the sequence is split over 2: name the "
        "axes that split the sequence, and no others"
    )
    with (
        bind_mesh(fp.Mesh(a=2, b=2), ("a", "b")),
        pytest.raises(TraceError, match=f"^{re.escape(text)}$"),
    ):
        losses.compute(X, HEAD, LABELS, Options(("a", "b"), tokens=(2, 1)))
