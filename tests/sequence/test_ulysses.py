"""Heads for positions and back, on in-process ranks, against attention on one device."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh, bind_rank
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.functional.attention import whole
from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence.ulysses import split_attention
from funcpipe.errors import TraceError

TOLERANCE = 1e-12  # float64, sums of a few numbers in another order
AXES = ("ring", "seq")
sizes = st.integers(1, 4)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- an attention, split


@dataclass(frozen=True)
class Case:
    """An attention and how it lies on ranks; ``shapes`` are those of q, k, v and the result, in
    hook layout."""

    shapes: tuple[tuple[int, ...], ...]
    held: Held
    causal: bool = False
    cu: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    seed: int = 0

    @property
    def mesh(self):
        return fp.Mesh(ring=self.held.queries.ring, seq=self.held.queries.heads)

    @property
    def learned(self):
        return self.bias is not None and self.bias.is_floating_point()

    def operands(self):
        """Queries, keys, values, what the result is multiplied with, and the bias if there is
        one."""
        return [rand(self.seed + i, *s) for i, s in enumerate(self.shapes)] + (
            [] if self.bias is None else [self.bias]
        )

    def splits(self):
        """Of every operand, the layout that splits it and along which dim; None: every rank has all
        of it."""
        held = self.held
        bias = (held.queries, 2) if held.bias_query else (held.keys, 3) if held.bias_key else None
        keys = None if held.keys is None else (held.keys, 2)
        return [(held.queries, 2), keys, keys, (held.queries, 2), bias][: len(self.operands())]

    def of(self, sequence_rank):
        """The operands as a sequence rank holds them."""
        return [
            x if s is None else take(x, *s, sequence_rank)
            for x, s in zip(self.operands(), self.splits(), strict=True)
        ]

    def joint(self, attend):
        """A function of the operands: the result, and gradients of q, k, v and a bias of floating
        dtype."""

        def run(*operands):
            moving = [0, 1, 2, *([4] if self.learned else [])]
            x = [t.detach().requires_grad_() if i in moving else t for i, t in enumerate(operands)]
            with torch.enable_grad():
                out = attend(*x[:3], Spec(self.causal, None, x[4] if len(x) > 4 else None, self.cu))
            wanted = [x[i] for i in moving]
            return [
                out.detach(),
                *torch.autograd.grad(out, wanted, x[3], allow_unused=True, materialize_grads=True),
            ]

        return run

    def on_one_device(self):
        return self.joint(whole)(*self.operands())

    def on_ranks(self, run=None):
        """The same of all ranks together: slices put side by side, gradients of what all ranks have
        added up."""

        def body(comm):
            sequence_rank = comm.rank
            joint = self.joint(
                lambda q, k, v, spec: split_attention(q, k, v, spec, self.held, sequence_rank)
            )
            with (
                bind_rank(comm),
                bind_mesh(self.mesh, AXES),
                torch.autograd.set_multithreading_enabled(False),
            ):
                return (joint if run is None else run[sequence_rank])(*self.of(sequence_rank))

        found = list(zip(*run_ranks(self.mesh, body), strict=True))
        out, dq, dk, dv, *dbias = found
        splits = self.splits()
        splits = [splits[3], *splits[:3], *splits[4 : 4 + len(dbias)]]
        return [put(xs, s) for xs, s in zip((out, dq, dk, dv, *dbias), splits, strict=True)]


def take(x, layout, dim, sequence_rank):
    spans = [x.narrow(dim, a, b - a) for a, b in layout.ranges(sequence_rank)]
    return torch.cat(spans, dim) if spans else x.narrow(dim, 0, 0).contiguous()


def put(xs, split):
    """One tensor from those of all sequence ranks."""
    if split is None:
        return sum(xs[1:], xs[0])
    layout, dim = split
    places = torch.cat(
        [torch.arange(a, b) for m in range(layout.members) for a, b in layout.ranges(m)]
        or [torch.arange(0)]
    )
    return torch.cat(list(xs), dim).index_select(dim, places.argsort())


@st.composite
def documents(draw, n, batch):
    ends = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=5)))
    return torch.tensor(draw(st.sampled_from([ends, [ends] * batch])))


@st.composite
def biases(draw, *full):
    """With its sizes 1 or full, and whether its queries or its keys are split."""
    shape = [draw(st.sampled_from([1, n])) for n in full]
    x = rand(draw(st.integers(0, 99)), *shape)
    query = shape[2] == full[2] != 1 and draw(st.booleans())
    key = shape[3] == full[3] != 1 and not query and draw(st.booleans())
    return x > 0 if draw(st.booleans()) else x, query, key


@st.composite
def cases(draw, rings=(1, 1), ranks=(1, 8)):
    ring, seq, zigzag = draw(st.integers(*rings)), draw(st.integers(*ranks)), draw(st.booleans())
    batch, heads, groups, n, d = (
        draw(sizes),
        draw(st.integers(1, 5)),
        draw(sizes),
        draw(st.integers(0, 20)),
        draw(sizes),
    )
    alike = draw(st.booleans())  # keys and values of the same sequence
    m = n if alike else draw(st.integers(0, 20))
    queries, keys = (
        SequenceLayout(size, ("ring",), ("seq",), ring, seq, zigzag) for size in (n, m)
    )
    bias, of_query, of_key = draw(
        st.one_of(st.just((None, False, False)), biases(batch, heads * groups, n, m))
    )
    everywhere = not of_key and draw(st.sampled_from([False, False, True]))
    dv = draw(st.sampled_from([d, draw(sizes)]))
    h = heads * groups
    return Case(
        ((batch, h, n, d), (batch, heads, m, d), (batch, heads, m, dv), (batch, h, n, dv)),
        Held(queries, None if everywhere else keys, of_query, of_key),
        draw(st.booleans()),
        draw(st.one_of(st.none(), documents(n, batch))) if alike else None,
        bias,
        draw(st.integers(0, 99)),
    )


@given(cases())
def test_split_over_heads_it_is_that_of_one_device(case):
    same(case.on_ranks(), case.on_one_device())


@given(cases((2, 3), (1, 3)))
def test_split_over_heads_and_a_ring_it_is_that_of_one_device(case):
    same(case.on_ranks(), case.on_one_device())


@given(
    st.integers(1, 8), sizes, sizes, sizes, st.integers(0, 20), st.booleans(), st.integers(0, 99)
)
def test_where_ranks_divide_heads_no_bit_differs(ranks, batch, heads, groups, n, causal, seed):
    """Also where they do not divide the sequence, and where query heads share heads."""
    h, layout = heads * ranks, SequenceLayout(n, (), ("seq",), 1, ranks)
    shapes = (
        (batch, h * groups, n, 4),
        (batch, h, n, 4),
        (batch, h, n, 4),
        (batch, h * groups, n, 4),
    )
    case = Case(shapes, Held(layout, layout), causal, seed=seed)
    assert all(
        torch.equal(a, b) for a, b in zip(case.on_ranks(), case.on_one_device(), strict=True)
    )


@given(cases())
def test_an_attention_that_is_not_split_runs_as_it_is(case):
    spec = Spec(case.causal, 0.3, case.bias, case.cu)
    q, k, v, *_ = case.operands()
    assert torch.equal(split_attention(q, k, v, spec, Held(), 0), whole(q, k, v, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_a_scale(dtype):
    layout = SequenceLayout(6, (), ("seq",), 1, 2)
    q, k, v = (rand(i, 1, 4, 6, 8).to(dtype) for i in range(3))

    def body(comm):
        with bind_rank(comm), bind_mesh(comm.mesh, ("seq",)):
            own = [take(x, layout, 2, comm.rank) for x in (q, k, v)]
            return split_attention(*own, Spec(True, 0.3), Held(layout, layout), comm.rank)

    assert torch.equal(
        torch.cat(run_ranks(fp.Mesh(seq=2), body), 2), whole(q, k, v, Spec(True, 0.3))
    )


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a"), ("a", "c")])
def test_heads_over_several_axes(axes):
    mesh = fp.Mesh(a=2, b=2, c=1)
    layout = SequenceLayout(5, (), axes, 1, mesh.axis_size(axes))
    q, k, v = (rand(i, 1, 4, 5, 8) for i in range(3))

    def body(comm):
        sequence_rank = comm.mesh.index(comm.rank, axes)
        with bind_rank(comm), bind_mesh(comm.mesh, ("a", "b", "c")):
            own = [take(x, layout, 2, sequence_rank) for x in (q, k, v)]
            return sequence_rank, split_attention(
                *own, Spec(True), Held(layout, layout), sequence_rank
            )

    found = dict(run_ranks(mesh, body))
    assert torch.equal(torch.cat([found[m] for m in sorted(found)], 2), whole(q, k, v, Spec(True)))


# ---- one graph for all ranks


def traced(case, sequence_rank):
    """The joint graph of a sequence rank, on fakes."""
    joint = case.joint(
        lambda q, k, v, spec: split_attention(q, k, v, spec, case.held, sequence_rank)
    )
    with bind_mesh(case.mesh, AXES), torch.autograd.set_multithreading_enabled(False):
        return make_fx(joint, tracing_mode="fake")(*case.of(sequence_rank))


@given(cases(ranks=(2, 4)).filter(lambda c: c.cu is None))
@example(
    Case(
        ((1, 6, 9, 2), (1, 3, 9, 2), (1, 3, 9, 2), (1, 6, 9, 2)),
        Held(*[SequenceLayout(9, ("ring",), ("seq",), 2, 2, zigzag=True)] * 2),
        causal=True,
        bias=rand(0, 1, 6, 9, 1),
    )
)
def test_ranks_with_equal_lengths_share_one_graph(case):
    layouts = [p for p in (case.held.queries, case.held.keys) if p is not None]
    keys = [tuple(p.variant(m) for p in layouts) for m in range(case.held.queries.members)]
    first, last = (
        {key: m for m, key in some} for some in (reversed([*enumerate(keys)]), enumerate(keys))
    )
    graphs = {key: traced(case, m) for key, m in first.items()}
    assert all(
        traced(case, m).code == graphs[key].code for key, m in last.items() if m != first[key]
    )
    same(case.on_ranks([graphs[key] for key in keys]), case.on_one_device())


def test_it_traces_on_fakes_of_another_device():
    layout = SequenceLayout(7, ("ring",), ("seq",), 1, 4)

    def joint(q, k, v, bias):
        return split_attention(
            q, k, v, Spec(True, None, bias), Held(layout, layout, bias_query=True), 0
        )

    with FakeTensorMode(), bind_mesh(fp.Mesh(ring=1, seq=4), AXES):
        q, k = (torch.empty(1, h, 2, 8, device="meta") for h in (5, 5))
        graph = make_fx(joint, tracing_mode="fake")(
            q, k, k, torch.empty(1, 1, 2, 7, device="meta")
        ).graph
    devices = {
        n.meta["val"].device.type
        for n in graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    }
    assert devices == {"meta"}


# ---- what travels


def sent(case, sequence_rank=0):
    """How many elements a rank sends in every all-to-all, forward then backward; other collectives
    by name."""
    out, others = [], Counter()
    for node in traced(case, sequence_rank).graph.nodes:
        name = str(node.target)
        if name == "funcpipe.all_to_all_start.default":
            out.append(node.args[0].meta["val"].numel())
        elif name.endswith("_start.default"):
            others[name.removeprefix("funcpipe.").removesuffix("_start.default")] += 1
    return out, others


def split_evenly(n, ranks, heads, keys, d=8, **options):
    layout = SequenceLayout(n, (), ("seq",), 1, ranks)
    shapes = ((1, heads, n, d), (1, keys, n, d), (1, keys, n, d), (1, heads, n, d))
    return Case(shapes, Held(layout, layout), **options)


@pytest.mark.parametrize(
    ("ranks", "heads", "keys", "travel"),
    [
        (4, 8, 8, 8),  # MHA
        (4, 8, 4, 4),  # GQA: every rank has heads of its own
        (
            4,
            8,
            2,
            4,
        ),  # fewer heads of keys and values than ranks: each is sent to those ranks that use it
        (4, 8, 1, 4),  # MQA
        (2, 6, 3, 4),  # both ranks use the second one
        (8, 8, 2, 8),
    ],
)
def test_two_exchanges_and_no_byte_too_many(ranks, heads, keys, travel):
    n, d = 16, 8
    exchanges, others = sent(split_evenly(n, ranks, heads, keys, d, causal=True))
    there, back = (heads + 2 * travel) * d * n // ranks, heads * d * n // ranks
    assert exchanges == [there, back, back, there] and not others
    if heads % ranks == 0 and math.lcm(ranks, keys) == max(ranks, keys):
        assert there + back == (2 * heads + 2 * max(keys, ranks)) * d * n // ranks


@pytest.mark.parametrize(
    ("ranks", "heads", "keys", "n"), [(4, 5, 5, 16), (4, 6, 3, 15), (8, 3, 1, 5), (3, 7, 7, 1)]
)
def test_two_exchanges_also_where_nothing_divides(ranks, heads, keys, n):
    exchanges, others = sent(split_evenly(n, ranks, heads, keys))
    each, longest = -(-heads // ranks), -(-n // ranks)
    assert (
        len(exchanges) == 4
        and exchanges[1] == exchanges[2] == ranks * each * 8 * longest
        and not others
    )


def test_two_exchanges_of_sequences_of_unequal_length_and_with_documents():
    case = split_evenly(8, 4, 4, 4, cu=torch.tensor([0, 3, 8]))
    with FakeTensorMode() as mode:
        case = replace(case, cu=mode.from_tensor(case.cu))
        with bind_mesh(case.mesh, AXES):
            graph = make_fx(
                lambda q, k, v: split_attention(q, k, v, Spec(cu_seqlens=case.cu), case.held, 0)
            )
            graph = graph(*map(mode.from_tensor, case.of(0)[:3])).graph
    assert sum("all_to_all_start" in str(n.target) for n in graph.nodes) == 2
    other = SequenceLayout(12, (), ("seq",), 1, 4)
    shapes = ((1, 4, 8, 8), (1, 4, 12, 8), (1, 4, 12, 8), (1, 4, 8, 8))
    exchanges, others = sent(Case(shapes, Held(case.held.queries, other)))
    assert (
        exchanges == [(2 + 2 * 3) * 4 * 8, 2 * 4 * 8, 2 * 4 * 8, (2 + 2 * 3) * 4 * 8] and not others
    )


def test_a_bias_travels_no_wider_than_it_is():
    def travels(shape, **held):
        case = split_evenly(8, 4, 4, 4, bias=rand(0, *shape) > 0)
        exchanges, others = sent(replace(case, held=replace(case.held, **held)))
        return len(exchanges) - 4, others["all_gather"]

    assert travels((1, 1, 8, 8)) == travels((1, 4, 8, 8)) == travels((1, 4, 1, 1)) == (0, 0)
    assert travels((1, 1, 8, 8), bias_query=True) == (0, 1)
    assert travels((1, 4, 8, 8), bias_query=True) == (1, 0)
    assert travels((1, 1, 1, 8), bias_key=True) == (0, 1)


def test_keys_that_every_rank_holds_do_not_travel():
    case = split_evenly(8, 4, 4, 4, causal=True)
    exchanges, others = sent(replace(case, held=Held(case.held.queries)))
    assert not exchanges and not others


def test_autocast_narrows_what_travels():
    case = split_evenly(8, 4, 4, 4, causal=True)
    x = [t.float() for t in case.of(0)[:3]]
    with bind_mesh(case.mesh, AXES), torch.autocast("cpu", torch.bfloat16):
        graph = make_fx(lambda *x: split_attention(*x, Spec(), case.held, 0), tracing_mode="fake")(
            *x
        ).graph
    travelling = [
        n.args[0].meta["val"].dtype for n in graph.nodes if "all_to_all_start" in str(n.target)
    ]
    assert travelling == [torch.bfloat16] * 2


def test_a_bias_that_is_split_along_keys_that_are_not_is_refused():
    layout = SequenceLayout(4, (), ("seq",), 1, 2)
    x = rand(0, 1, 2, 2, 4)
    with (
        bind_mesh(fp.Mesh(seq=2), ("seq",)),
        pytest.raises(TraceError, match=r"every rank holds all keys.*dims=None"),
    ):
        split_attention(
            x, x, x, Spec(bias=torch.zeros(1, 1, 1, 2)), Held(layout, None, bias_key=True), 0
        )
