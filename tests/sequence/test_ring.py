"""Ring attention: every rank's queries attend to the whole sequence, as on one device."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from funcpipe._src.collectives import bind_mesh, bind_rank
from funcpipe._src.collectives.ops import STARTS
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.functional.dispatch import Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.sequence import blockwise as tiles
from funcpipe._src.sequence.ring import ring_attention
from funcpipe.errors import AxisError, TraceError

# Sums over keys are rescaled at every step of the ring, in another order on every rank.
RTOL = 1e-10
SEND = STARTS["ppermute"]
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """An attention, the ring it is split over, and its operands: q, k, v, what multiplies the
    result, a bias."""

    mesh: Mesh
    axes: tuple[str, ...]
    sizes: tuple[int, int]
    zigzag: bool
    causal: bool
    shape: tuple[int, int, int, int, int]  # batch, kv heads, query heads for each, head dims
    scale: float | None = None
    cu_seqlens: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    seed: int = 0
    tensors: Tensors = field(default_factory=list)

    def __post_init__(self) -> None:
        batch, heads, group, d, dv = self.shape
        g = torch.Generator().manual_seed(self.seed)
        (n, m), many = self.sizes, heads * group
        shapes = [
            (batch, many, n, d),
            (batch, heads, m, d),
            (batch, heads, m, dv),
            (batch, many, n, dv),
        ]
        self.tensors.extend(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)

    @property
    def ring(self) -> int:
        return self.mesh.axis_size(self.axes)

    @property
    def layouts(self) -> tuple[SequenceLayout, SequenceLayout]:
        others = tuple(a for a in self.mesh.axes if a not in self.axes)
        heads = self.mesh.size // self.ring
        q, k = (
            SequenceLayout(n, self.axes, others, self.ring, heads, self.zigzag) for n in self.sizes
        )
        return q, k

    @property
    def spec(self) -> Spec:
        return Spec(self.causal, self.scale, self.bias, self.cu_seqlens)

    def places(self, which: int, r: int) -> torch.Tensor:
        """The positions of a ring rank."""
        return torch.cat([torch.arange(a, b) for a, b in self.layouts[which].ring_ranges(r)])

    def own(self, r: int) -> Tensors:
        """What a ring rank holds."""
        rows, cols = self.places(0, r), self.places(1, r)
        q, k, v, w = self.tensors
        out = [q[:, :, rows], k[:, :, cols], v[:, :, cols], w[:, :, rows]]
        out = [
            x.transpose(1, 2).contiguous().transpose(1, 2) for x in out
        ]  # as projections lie in memory
        if self.bias is not None:
            out.append(self.bias if self.bias.shape[2] == 1 else self.bias[:, :, rows])
        return out

    def like(self, r: int) -> int:
        """The first ring rank that shares a graph with ``r``."""
        return next(
            s for s in range(self.ring) if all(lengths(p, s) == lengths(p, r) for p in self.layouts)
        )

    def joint(self, r: int) -> Callable[..., Tensors]:
        """From what a ring rank holds to its result and its gradients."""

        def body(
            *tensors: torch.Tensor, cu_seqlens: torch.Tensor | None = self.cu_seqlens
        ) -> Tensors:
            with torch.enable_grad():
                q, k, v, w, *bias = (x.detach() for x in tensors)
                wanted = [x.requires_grad_() for x in (q, k, v, *bias) if x.is_floating_point()]
                spec = replace(self.spec, bias=bias[0] if bias else None, cu_seqlens=cu_seqlens)
                out = ring_attention(q, k, v, spec, *self.layouts, self.like(r))
                return [out.detach(), *torch.autograd.grad((out * w).sum(), wanted)]

        return body

    def whole(self, results: list[Tensors]) -> Tensors:
        """The results of all ring ranks, put together; gradients of a bias are summed."""
        found: Tensors = []
        for i, which in enumerate((0, 0, 1, 1)):
            places = torch.cat([self.places(which, r) for r in range(self.ring)])
            found.append(torch.cat([x[i] for x in results], 2)[:, :, places.argsort()])
        if len(results[0]) > 4 and self.bias is not None:
            dbias = torch.zeros_like(self.bias)
            for r, x in enumerate(results):
                rows = slice(None) if self.bias.shape[2] == 1 else self.places(0, r)
                dbias[:, :, rows] += x[4]
            found.append(dbias)
        return found


def lengths(layout: SequenceLayout, r: int) -> list[int]:
    return [b - a for a, b in layout.ring_ranges(r)]


def on_ranks(case: Case, body: Callable[[int], Tensors]) -> Tensors:
    """The result of ``body(ring rank)`` on every rank of the mesh, put together; all rings of the
    mesh agree."""

    def rank(comm: Any) -> Tensors:
        with bind_rank(comm), bind_mesh(case.mesh, tuple(case.mesh.axes)), one_thread():
            return body(case.mesh.index(comm.rank, case.axes))

    results = run_ranks(case.mesh, rank)
    rings: dict[int, list[Tensors]] = {}
    for r in range(case.mesh.size):
        rings.setdefault(min(case.mesh.group(r, case.axes)), [])
    for first_rank in rings:
        group = case.mesh.group(first_rank, case.axes)
        rings[first_rank] = [results[r] for r in group]
    first, *others = (case.whole(x) for x in rings.values())
    for other in others:
        assert all(map(torch.equal, first, other))
    return first


def one_thread() -> contextlib.AbstractContextManager:
    return torch.autograd.set_multithreading_enabled(False)


def around_the_ring(case: Case) -> Tensors:
    return on_ranks(case, lambda r: case.joint(r)(*case.own(r)))


def one_device(case: Case, dtype: torch.dtype = torch.float64) -> Tensors:
    """The same attention by its formula: all scores, one softmax over what is seen."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in case.tensors[:3])
    bias = None if case.bias is None else case.bias.detach()
    scores = q @ k.repeat_interleave(case.shape[2], 1).mT
    scores = scores * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    rows, cols = (torch.arange(n) for n in case.sizes)
    seen = torch.ones(case.sizes, dtype=torch.bool)[None, None]
    if case.causal:
        seen = seen & (cols <= rows[:, None])
    if case.cu_seqlens is not None:
        number = [
            (x[:, None] >= case.cu_seqlens[..., None, :]).sum(-1).view(-1, len(x))
            for x in (rows, cols)
        ]
        inside = (number[0] > 0) & (number[0] < case.cu_seqlens.shape[-1])
        same = number[0][:, :, None] == number[1][:, None, :]
        seen = seen & (same & inside[:, :, None])[:, None]
    if bias is not None and bias.dtype == torch.bool:
        seen, bias = seen & bias, None
    elif bias is not None:
        bias.requires_grad_()
        scores = scores + bias
    some = seen.any(-1, keepdim=True)
    p = scores.masked_fill(~seen & some, -math.inf).softmax(-1).masked_fill(~some, 0)
    out = p @ v.repeat_interleave(case.shape[2], 1)
    wanted = [q, k, v, *([] if bias is None else [bias])]
    return [out.detach(), *torch.autograd.grad((out * case.tensors[3].to(dtype)).sum(), wanted)]


def assert_same(found: Tensors, wanted: Tensors, rtol: float = RTOL) -> None:
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        size = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got, want, rtol=0, atol=rtol * max(size, 1))


# ---- equal to one device


@st.composite
def meshes(draw: st.DrawFn, most: int) -> tuple[Mesh, tuple[str, ...]]:
    """One ring, one beside an axis over which heads are split, or one over two axes."""
    kind = draw(st.sampled_from(["one", "one", "beside", "two"]))
    if kind == "one":
        return Mesh(ring=draw(st.integers(1, most))), ("ring",)
    if kind == "beside":
        sizes = {"heads": 2, "ring": draw(st.integers(1, 4))}
        return Mesh(**{a: sizes[a] for a in draw(st.permutations(list(sizes)))}), ("ring",)
    a, b = draw(st.sampled_from([(1, 3), (2, 2), (most // 2, 2)]))
    return Mesh(a=a, b=b), draw(st.sampled_from([("a", "b"), ("b", "a")]))


@st.composite
def documents(draw: st.DrawFn, n: int, batch: int) -> torch.Tensor:
    """Ends of documents, some of them empty; positions may lie outside of all."""
    count = draw(st.integers(1, 4))
    row = st.lists(st.integers(0, n), min_size=count + 1, max_size=count + 1).map(sorted)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    if draw(st.booleans()):
        return torch.tensor(draw(row), dtype=dtype)
    return torch.tensor([draw(row) for _ in range(batch)], dtype=dtype)


MASKS = ["none", "documents", "bool", "float", "both"]


@st.composite
def cases(
    draw: st.DrawFn, mask: str | None = None, causal: bool | None = None, most: int = 8
) -> Case:
    mask = draw(st.sampled_from(MASKS)) if mask is None else mask
    causal = draw(st.booleans()) if causal is None else causal
    mesh, axes = draw(meshes(most))
    zigzag, ring = draw(st.booleans()), mesh.axis_size(axes)
    lengths = st.one_of(
        st.integers(1, 3).map(lambda n: n * ring * (2 if zigzag else 1)), st.integers(1, 20)
    )
    n = draw(lengths)
    m = n if draw(st.booleans()) else draw(lengths)
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    shape = batch, heads, group, draw(st.integers(1, 4)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 99))
    cu = draw(documents(max(n, m), batch)) if mask in ("documents", "both") else None
    bias = None
    if mask in ("bool", "float", "both"):
        full = [batch, heads * group, n, m]
        sizes = [draw(st.sampled_from([1, size])) for size in full]
        bias = torch.randn(
            sizes, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
        )
        bias = bias > 0 if mask == "bool" else bias
    return Case(
        mesh,
        axes,
        (n, m),
        zigzag,
        causal,
        shape,
        draw(st.sampled_from([None, 0.7])),
        cu,
        bias,
        seed,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@given(data=st.data())
def test_results_and_gradients_are_those_of_one_device(
    mask: str, causal: bool, data: st.DataObject
) -> None:
    case = data.draw(cases(mask, causal))
    assert_same(around_the_ring(case), one_device(case))


@given(st.integers(1, 8), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_causal_and_even(ring: int, n: int, zigzag: bool, seed: int) -> None:
    """Blocks whose masks follow from the order of ranks alone."""
    size = n * ring * (2 if zigzag else 1)
    case = Case(Mesh(ring=ring), ("ring",), (size, size), zigzag, True, (2, 2, 2, 3, 4), seed=seed)
    assert_same(around_the_ring(case), one_device(case))


@given(cases(most=4))
def test_a_traced_graph_is_what_runs_without_it(case: Case) -> None:
    """One graph, traced on fakes without ranks, for all ring ranks with the same lengths."""
    graphs = {s: traced(case, s) for s in {case.like(r) for r in range(case.ring)}}
    extra = [] if case.cu_seqlens is None else [case.cu_seqlens]
    found = on_ranks(case, lambda r: list(graphs[case.like(r)](*case.own(r), *extra)))
    assert all(map(torch.equal, found, around_the_ring(case)))


def traced(case: Case, r: int) -> torch.fx.GraphModule:
    def body(*tensors: torch.Tensor) -> Tensors:
        count = len(tensors) - (case.cu_seqlens is not None)
        return case.joint(r)(
            *tensors[:count], cu_seqlens=tensors[-1] if count < len(tensors) else None
        )

    extra = [] if case.cu_seqlens is None else [case.cu_seqlens]
    with bind_mesh(case.mesh, tuple(case.mesh.axes)), one_thread():
        return make_fx(body, tracing_mode="fake")(*case.own(r), *extra)


# ---- what is sent, and what is computed


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(
    "ring", [1, 2, 3, *[pytest.param(n, marks=pytest.mark.slow) for n in (5, 8)]]
)
@pytest.mark.parametrize("extra", [0, 3])
def test_messages(ring: int, zigzag: bool, extra: int) -> None:
    """Forward R - 1 blocks of keys and values; backward as many, and R times their gradients."""
    n = 4 * ring + extra
    case = Case(Mesh(ring=ring), ("ring",), (n, n), zigzag, True, (2, 2, 3, 4, 5))
    longest = max(p.ring_length(r) for r in range(ring) for p in case.layouts)
    with bind_mesh(case.mesh, ("ring",)):
        forward = make_fx(
            lambda q, k, v: ring_attention(q, k, v, case.spec, *case.layouts, 0),
            tracing_mode="fake",
        )
        once = sent(forward(*case.own(0)[:3]))
    block = 2 * 2 * longest * (4 + 5)
    assert once == [block] * (ring - 1)
    assert sent(traced(case, 0)) == [block] * (3 * ring - 2 if ring > 1 else 0)


def sent(graph: torch.fx.GraphModule) -> list[int]:
    return [x.args[0].meta["val"].numel() for x in graph.graph.nodes if x.target is SEND]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ring", [1, 2, 4, 7])
def test_no_rank_computes_a_block_that_nobody_sees(ring: int, causal: bool) -> None:
    """With a zigzag every rank computes half of the scores; scores are counted by the products that
    make them."""
    n = 8 * ring
    case = Case(Mesh(ring=ring), ("ring",), (n, n), True, causal, (1, 1, 1, 16, 3))
    graph = traced(case, 0)
    found = 0
    for x in graph.graph.nodes:
        if x.target is torch.ops.aten.bmm.default and x.args[0].meta["val"].shape[2] == 16:
            found += x.meta["val"].numel()
    block, half = 8 * 8, 4 * 4
    forward = (
        block * ring // 2 + half if causal else block * ring
    )  # of the own block, both halves against themselves are whole
    assert found == 2 * forward


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(
    "n", [pytest.param(12, marks=pytest.mark.slow), 13, pytest.param(2, marks=pytest.mark.slow)]
)
def test_ranks_of_equal_lengths_share_a_graph(n: int, zigzag: bool, causal: bool) -> None:
    case = Case(Mesh(ring=3), ("ring",), (n, n), zigzag, causal, (1, 1, 2, 2, 2))
    code = {r: traced(replace(case, tensors=[]), r).code for r in range(3)}
    assert len(set(code.values())) == len({tuple(lengths(case.layouts[0], r)) for r in range(3)})


def test_only_operands_and_result_are_kept_for_the_gradient() -> None:
    case = Case(Mesh(ring=1), ("ring",), (64, 64), True, True, (1, 2, 2, 8, 4))
    q, k, v, w = (x.requires_grad_() for x in case.own(0))
    kept: Counter[tuple[int, ...]] = Counter()

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[tuple(x.shape)] += 1
        return x

    with (
        bind_mesh(case.mesh, ("ring",)),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        out = ring_attention(q, k, v, case.spec, *case.layouts, 0)
    assert kept == Counter(tuple(x.shape) for x in (q, k, v, out, w[..., 0]))


# ---- precision


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_do_not_grow_with_the_ring(dtype: torch.dtype, causal: bool, zigzag: bool) -> None:
    errors = [error(ring, dtype, causal, zigzag) for ring in (1, 2, 4, 8)]
    bound = (
        4 if dtype == torch.float32 else 0.5
    )  # sums of 128 in float32; else the last rounding alone
    assert max(errors) <= bound * torch.finfo(dtype).eps
    assert max(errors) <= 1.1 * errors[0]


def error(ring: int, dtype: torch.dtype, causal: bool, zigzag: bool) -> float:
    """The largest relative error of result and gradients."""
    case = Case(Mesh(ring=ring), ("ring",), (128, 128), zigzag, causal, (1, 2, 2, 16, 16), seed=5)
    case.tensors[:] = [x.to(dtype) for x in case.tensors]
    found = around_the_ring(case)
    assert all(x.dtype == dtype for x in found)
    pairs = zip(found, one_device(case), strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def test_autocast_does_not_narrow_sums() -> None:
    case = Case(Mesh(ring=2), ("ring",), (16, 16), True, True, (1, 1, 1, 8, 8))
    case.tensors[:] = [x.float() for x in case.tensors]

    def body(r: int) -> Tensors:
        with torch.autocast("cpu", torch.bfloat16):
            return case.joint(r)(*case.own(r))

    assert all(map(torch.equal, on_ranks(case, body), around_the_ring(case)))


# ---- what is not seen does not matter


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("n", [24, 23])
def test_huge_scores_of_later_keys(n: int, zigzag: bool) -> None:
    """Their probabilities overflow, but are not seen."""
    case = Case(Mesh(ring=4), ("ring",), (n, n), zigzag, True, (1, 1, 1, 4, 4))
    q, k, *_ = case.tensors
    q.abs_()
    k.copy_(torch.linspace(0, 3000, n, dtype=torch.float64)[:, None] + k)
    assert_same(around_the_ring(case), one_device(case))


def test_queries_that_see_nothing_get_zeros() -> None:
    seen = torch.zeros(1, 1, 10, 1, dtype=torch.bool)
    seen[:, :, ::3] = True
    case = Case(Mesh(ring=4), ("ring",), (10, 10), False, True, (1, 1, 1, 2, 2), bias=seen)
    out, dq, dk, dv = around_the_ring(case)
    rows = ~seen.flatten()
    assert (out[:, :, rows] == 0).all()
    assert (dq[:, :, rows] == 0).all()
    assert_same([out, dq, dk, dv], one_device(case))


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_is_seen_at_all(bias: bool) -> None:
    hidden = (
        torch.full((1, 1, 1, 1), -math.inf, dtype=torch.float64)
        if bias
        else torch.zeros(1, 1, 1, 9).bool()
    )
    case = Case(Mesh(ring=3), ("ring",), (9, 9), True, False, (2, 1, 2, 3, 2), bias=hidden)
    assert all((x == 0).all() for x in around_the_ring(case))


# ---- kernels


def test_flash_kernels_have_the_shapes_of_products() -> None:
    q, k, v = (
        torch.empty(2, h, n, 16, dtype=torch.bfloat16, device="meta")
        for h, n in ((6, 8), (3, 8), (3, 8))
    )
    for t in (tiles.Tile(), tiles.Tile(causal=True)):
        flash, products = (x.forward(q, k, v, t, 0.25) for x in (tiles.FLASH, tiles.MATMUL))
        assert like(flash) == like(products)
        operands = (q, q, q, products.lse, k, v, t, 0.25)
        assert like(tiles.FLASH.backward(*operands)[:3]) == like(
            tiles.MATMUL.backward(*operands)[:3]
        )


def like(xs: tuple[torch.Tensor, ...]) -> list[tuple]:
    return [(x.shape, x.dtype, x.device) for x in xs]


@pytest.mark.parametrize(
    ("dtype", "d", "dv", "plain", "flash"),
    [
        (torch.bfloat16, 64, 64, True, True),
        (torch.float16, 256, 256, True, True),
        (torch.float32, 64, 64, True, False),
        (torch.bfloat16, 64, 32, True, False),
        (torch.bfloat16, 12, 12, True, False),
        (torch.bfloat16, 264, 264, True, False),
        (torch.bfloat16, 64, 64, False, False),
    ],
)
def test_flash_attention_is_used_where_it_can(
    dtype: torch.dtype, d: int, dv: int, plain: bool, flash: bool
) -> None:
    with FakeTensorMode():
        q, v = (torch.empty(1, 2, 4, n, dtype=dtype, device="cuda") for n in (d, dv))
        assert tiles.kernel(q, v, plain) is (tiles.FLASH if flash else tiles.MATMUL)
        assert (
            tiles.kernel(torch.empty(1, 2, 0, d, dtype=dtype, device="cuda"), v, plain)
            is tiles.MATMUL
        )
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert tiles.kernel(q, v, plain) is tiles.MATMUL
    on_cpu = torch.empty(1, 2, 4, d, dtype=dtype)
    assert tiles.kernel(on_cpu, on_cpu, plain) is tiles.MATMUL


# ---- refused


def refused(**changes: Any) -> str:
    case = Case(Mesh(ring=2, other=2), ("ring",), (7, 7), False, False, (1, 1, 1, 2, 2))
    q, k, v, _ = case.own(0)
    given = {
        "q": q,
        "k": k,
        "v": v,
        "spec": Spec(),
        "q_layout": case.layouts[0],
        "k_layout": case.layouts[1],
        "ring_rank": 0,
    }
    with pytest.raises(AxisError) as caught:
        ring_attention(**{**given, **changes})
    return str(caught.value)


def test_rings_that_differ() -> None:
    assert refused(k_layout=SequenceLayout(7, ("other",), (), 2, 1)) == (
        "ring_attention: queries are split over a ring of 2 on ('ring',), keys over one of 2 on "
        "('other',): keys meet all queries on one ring only. Split both over the same axes"
    )


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"q": torch.ones(1, 1, 3, 2)}, "dim 2 of q has 3 positions, not 4"),
        ({"k": torch.ones(1, 1, 7, 2)}, "dim 2 of k has 7 positions, not 4"),
        ({"spec": Spec(bias=torch.ones(1, 1, 7, 7))}, "dim 2 of the bias has 7 positions, not 4"),
        ({"spec": Spec(bias=torch.ones(1, 1, 1, 4))}, "dim 3 of the bias has 4 positions, not 7"),
    ],
)
def test_operands_of_other_lengths(changes: dict[str, Any], where: str) -> None:
    assert refused(**changes) == (
        f"ring_attention: {where}, on ring rank 0 of 2 on ('ring',): give it the queries and keys "
        "of the ring rank (heads are exchanged before), and a bias with 1 or these queries and 1 "
        "or all keys"
    )


def test_a_second_derivative() -> None:
    case = Case(Mesh(ring=1), ("ring",), (4, 4), False, True, (1, 1, 1, 2, 2))
    q, k, v, _ = (x.requires_grad_() for x in case.own(0))
    with bind_mesh(case.mesh, ("ring",)):
        out = ring_attention(q, k, v, case.spec, *case.layouts, 0)
    text = (
        "ring_attention: the gradient of an attention around a ring is differentiated once more "
        "(create_graph=True, or torch.func inside the loss), but it has no derivative; split the "
        "sequence by seq_all_to_all instead, whose attention is torch's own"
    )
    with pytest.raises(TraceError, match=re.escape(text)):
        torch.autograd.grad(out.sum(), [q], create_graph=True)
