"""Worlds of ranks for tests of collectives, what each collective is, and losses that use them.

A *world* is a grid of ``(a, b)`` ranks. Its tensors have shape ``(a, b, *s)``; ``RUNNERS`` run a
function of one rank's ``s`` on all of them: two vmaps, two axes of an in-process mesh, or one of
each. ``by_hand`` is the plain loop over ranks.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh, bind_rank
from funcpipe._src.comm.simulated import run_ranks

RTOL = 1e-12  # float64, a few sums in another order
GRID = fp.Mesh(a=2, b=2)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch warns of itself at the first jvp of a process
    torch.func.jvp(torch.sin, (torch.ones(()),), (torch.ones(()),))


def rand(seed, *shapes):
    """Normal numbers in float64, the same in every process that asks."""
    g = torch.Generator().manual_seed(seed)
    out = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return out if len(out) > 1 else out[0]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=RTOL, atol=RTOL)


def in_processes(size):
    """The marks of a test that looks at what ``size`` processes did: two are for the plain tier,
    more for the slow one."""
    return [pytest.mark.slow] if size > 2 else []


# ---- a collective, and what it is


@dataclass(frozen=True)
class Case:
    """A collective on a world of ``sizes``, over ``axes``, with its options."""

    kind: str
    sizes: tuple[int, int]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    options: dict

    def __call__(self, x):
        return getattr(fp, self.kind)(
            x, self.axes if len(self.axes) > 1 else self.axes[0], **self.options
        )

    @property
    def n(self):
        return math.prod(self.sizes["ab".index(a)] for a in self.axes)

    def operand(self, seed, equal=False):
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(
            -2, 3, (*self.sizes, *self.shape), generator=g
        ).double()  # with ties for pmax
        if self.kind != "pmax":
            x = x + torch.rand(x.shape, generator=g, dtype=torch.float64)
        return x[:1, :1].expand(x.shape).clone() if equal else x


def group(case, i, j):
    """The ranks that take part in the collective of rank (i, j), in order."""
    own = {"a": i, "b": j}
    places = itertools.product(*(range(case.sizes["ab".index(a)]) for a in case.axes))
    return [tuple((own | dict(zip(case.axes, p, strict=True)))[a] for a in "ab") for p in places]


def by_hand(case, x):
    """What every rank gets, one rank after another."""
    ranks = itertools.product(*map(range, case.sizes))
    out = [
        _of_rank(case, [x[r] for r in group(case, *own)], group(case, *own).index(own))
        for own in ranks
    ]
    return torch.stack(out).unflatten(0, case.sizes)


def _of_rank(case, xs, me):
    kind, o, n = case.kind, case.options, case.n
    if kind == "psum":
        return sum(xs)
    if kind == "pmean":
        return sum(xs) / n
    if kind == "pmax":
        return torch.stack(xs).amax(0)
    if kind == "ppermute":
        return sum(
            (x for (s, d), x in ((p, xs[p[0]]) for p in o["perm"]) if d == me),
            torch.zeros_like(xs[0]),
        )
    if kind == "all_gather":
        return torch.cat(xs, o["dim"]) if o["tiled"] else torch.stack(xs, o["dim"])
    if kind == "psum_scatter":
        return _piece(sum(xs), o["dim"], n, me, o["tiled"])
    pieces = [_piece(x, o["split_dim"], n, me, o["tiled"]) for x in xs]
    return (
        torch.cat(pieces, o["concat_dim"]) if o["tiled"] else torch.stack(pieces, o["concat_dim"])
    )


def _piece(x, dim, n, i, tiled):
    return x.chunk(n, dim)[i] if tiled else x.select(dim, i)


@st.composite
def cases(
    draw, kinds=("psum", "pmean", "pmax", "all_gather", "psum_scatter", "all_to_all", "ppermute")
):
    kind = draw(st.sampled_from(kinds))
    sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    axes = draw(st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "a")]))
    if kind == "pmax":
        axes = axes[:1]  # ties over two axes are shared axis by axis: a test of its own
    shape = draw(st.lists(st.integers(1, 3), max_size=3).map(list))
    n = math.prod(sizes["ab".index(a)] for a in axes)
    options = {}
    if kind in ("all_gather", "psum_scatter", "all_to_all"):
        options["tiled"] = draw(st.booleans())
        shape = shape or [2]
        dims = st.integers(-len(shape), len(shape) - 1)
    if kind == "all_gather":
        extra = not options["tiled"]
        options["dim"] = draw(st.integers(-len(shape) - extra, len(shape) - 1 + extra))
    elif kind in ("psum_scatter", "all_to_all"):
        name = "dim" if kind == "psum_scatter" else "split_dim"
        dim = options[name] = draw(dims)
        shape[dim] = n * draw(st.integers(0, 2)) if options["tiled"] else n
        if kind == "all_to_all":
            options["concat_dim"] = draw(dims)
    elif kind == "ppermute":
        to = draw(st.permutations(range(n)))
        options["perm"] = [
            (s, d) for s, d in enumerate(to) if draw(st.sampled_from([True, True, False]))
        ]
    return Case(kind, sizes, axes, tuple(shape), options)


# ---- running a function on all ranks


def mapped(fn, sizes, *xs):
    return fp.vmap(fp.vmap(fn, "b"), "a")(*xs)


def in_process(fn, sizes, *xs):
    mesh = fp.Mesh(a=sizes[0], b=sizes[1])

    def body(comm):
        with bind_rank(comm), bind_mesh(mesh, ("a", "b")), torch.enable_grad():
            return fn(*(x.flatten(0, 1)[comm.rank].clone() for x in xs))

    out = run_ranks(mesh, body)
    return optree.tree_map(lambda *leaves: torch.stack(leaves).unflatten(0, sizes), *out)


def mixed(fn, sizes, *xs):
    mesh = fp.Mesh(b=sizes[1])

    def body(comm):
        with bind_rank(comm), bind_mesh(mesh, ("b",)), torch.enable_grad():
            return fp.vmap(fn, "a")(*(x[:, comm.rank].clone() for x in xs))

    out = run_ranks(mesh, body)
    return optree.tree_map(lambda *leaves: torch.stack(leaves, 1), *out)


RUNNERS = [mapped, in_process, mixed]
runners = st.sampled_from(RUNNERS)


def gradient(case, x, cotangent):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(by_hand(case, x) + 0 * x.sum(), x, cotangent)[
        0
    ]  # an empty ppermute has no x


# ---- losses with collectives

WIDTH = 4


def normalized(x):
    """Batch normalization over the rows of all ranks."""
    n = fp.psum(x.new_ones(()) * x.shape[0], "data")
    mean = fp.psum(x.sum(0), "data") / n
    return (x - mean) / (fp.psum((x - mean).square().sum(0), "data") / n + 0.1).sqrt()


def top_normalized(x):
    """A softmax over the rows of all ranks."""
    x = (x - fp.pmax(x.amax(0), "data")).exp()
    return x / fp.psum(x.sum(0), "data")


def contrasted(x):
    """The log-probability of every row among the rows of all ranks."""
    logits = x @ fp.all_gather(x, "data").T
    here = torch.arange(x.shape[0]) + fp.axis_index("data") * x.shape[0]
    return x + logits.log_softmax(-1).gather(1, here[:, None])


def by_columns(x):
    """All rows of some columns, and back."""
    columns = fp.all_to_all(x, "data", 1, 0)
    return fp.all_to_all(columns.cumsum(0).tanh(), "data", 0, 1)


def shifted(x):
    """Every row plus the row before it, across ranks."""
    n = fp.axis_size("data")
    before = fp.ppermute(x[-1:], "data", [(i, i + 1) for i in range(n - 1)])
    return x + 0.5 * torch.cat([before, x[:-1]])


def scattered(x):
    """The column sums of all ranks, of which each rank makes the sines of some."""
    sums = fp.psum_scatter(x.sum(0), "data").sin()
    return x * fp.all_gather(sums, "data")


LAYERS = {
    f.__name__: f for f in (normalized, top_normalized, contrasted, by_columns, shifted, scattered)
}


def make_step(names, drop_last=False):
    def loss_fn(params, batch):
        x = batch["x"]
        for w, name in zip(params["layers"], names, strict=True):
            x = fp.stage_boundary(x + torch.tanh(LAYERS[name](x @ w)))
        weight = torch.ones(x.shape[0], dtype=x.dtype)
        if drop_last:  # the last row of all is not counted
            last = fp.axis_index("data") == fp.axis_size("data") - 1
            weight = torch.cat([weight[:-1], 1 - last.to(x.dtype)[None]])
        return fp.Mean(((x - batch["y"]).square().sum(1) * weight).sum(), weight.sum())

    def step(state, batch):
        loss, grads = fp.value_and_grad(loss_fn)(state, batch)
        return optree.tree_map(lambda p, g: p - 0.1 * g, state, grads), {"loss": loss}

    return step


def setup(layers, rows, seed):
    weights, x, y = rand(seed, (layers, WIDTH, WIDTH), (2, rows, WIDTH), (2, rows, WIDTH))
    return {"layers": [0.5 * w for w in weights]}, [{"x": x[i], "y": y[i]} for i in range(2)]


names = st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3)
schedules = st.sampled_from([fp.schedules.one_f_one_b(), fp.schedules.zb_h1()])
