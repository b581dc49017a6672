"""Collectives against plain loops over ranks, however the axes are bound; inside losses; and every error text.

A *world* is a grid of ``(a, b)`` ranks. Its tensors have shape ``(a, b, *s)``; ``RUNNERS`` run a function of one rank's
``s`` on all of them: two vmaps, two axes of an in-process mesh, or one of each.
"""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe.collectives import axes_of, bind_mesh, bind_rank, lanes_of, ops
from funcpipe.comm.inprocess import run_ranks
from funcpipe.errors import AxisError, BatchError
from funcpipe.testing import assert_equivalent

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
        return getattr(fp, self.kind)(x, self.axes if len(self.axes) > 1 else self.axes[0], **self.options)

    @property
    def n(self):
        return math.prod(self.sizes["ab".index(a)] for a in self.axes)

    def operand(self, seed, equal=False):
        g = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (*self.sizes, *self.shape), generator=g).double()  # with ties for pmax
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
    out = [_of_rank(case, [x[r] for r in group(case, *own)], group(case, *own).index(own)) for own in ranks]
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
        return sum((x for (s, d), x in ((p, xs[p[0]]) for p in o["perm"]) if d == me), torch.zeros_like(xs[0]))
    if kind == "all_gather":
        return torch.cat(xs, o["dim"]) if o["tiled"] else torch.stack(xs, o["dim"])
    if kind == "psum_scatter":
        return _piece(sum(xs), o["dim"], n, me, o["tiled"])
    pieces = [_piece(x, o["split_dim"], n, me, o["tiled"]) for x in xs]
    return torch.cat(pieces, o["concat_dim"]) if o["tiled"] else torch.stack(pieces, o["concat_dim"])


def _piece(x, dim, n, i, tiled):
    return x.chunk(n, dim)[i] if tiled else x.select(dim, i)


@st.composite
def cases(draw, kinds=("psum", "pmean", "pmax", "all_gather", "psum_scatter", "all_to_all", "ppermute")):
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
        options["perm"] = [(s, d) for s, d in enumerate(to) if draw(st.sampled_from([True, True, False]))]
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
    return torch.autograd.grad(by_hand(case, x) + 0 * x.sum(), x, cotangent)[0]  # an empty ppermute has no x


@given(cases(), runners, st.integers(0, 99), st.booleans())
def test_values_and_derivatives_are_those_of_a_loop_over_ranks(case, runner, seed, equal):
    x = case.operand(seed, equal)
    want = by_hand(case, x)
    same(runner(case, case.sizes, x), want)
    c, t = rand(seed + 1, want.shape, x.shape)

    # every rank seeds its own cotangent, so its gradient is that of the sum over all ranks
    want_grad = gradient(case, x, c)
    same(runner(lambda x, c: torch.func.vjp(case, x)[1](c)[0], case.sizes, x, c), want_grad)
    if runner is mapped:  # torch's forward mode knows one thread
        value, slope = runner(lambda x, t: torch.func.jvp(case, (x,), (t,)), case.sizes, x, t)
        same(value, want)
        same((slope * c).sum(), (want_grad * t).sum())


@given(cases(), st.integers(0, 99), st.sampled_from(["vjp", "grad", "jvp", "autograd"]))
def test_transforms_around_vmap(case, seed, how):
    x = case.operand(seed)
    c, t = rand(seed + 1, by_hand(case, x).shape, x.shape)
    whole = lambda x: mapped(case, case.sizes, x)  # noqa: E731
    want = gradient(case, x, c)
    if how == "vjp":
        same(torch.func.vjp(whole, x)[1](c)[0], want)
    elif how == "grad":
        same(torch.func.grad(lambda x: (whole(x) * c).sum())(x), want)
    elif how == "jvp":
        same((torch.func.jvp(whole, (x,), (t,))[1] * c).sum(), (want * t).sum())
    else:
        leaf = x.clone().requires_grad_()
        same(torch.autograd.grad(whole(leaf) + 0 * leaf.sum(), leaf, c)[0], want)


@given(cases(), runners, st.integers(0, 99))
def test_other_dims_may_be_mapped_inside(case, runner, seed):
    """A vmap without collectives of its own, over any dim, in and out."""
    xs = torch.stack([case.operand(seed + k) for k in range(3)], -1)
    want = torch.stack([by_hand(case, xs[..., k]) for k in range(3)], 2)
    got = runner(lambda x: torch.func.vmap(case, in_dims=-1)(x), case.sizes, xs)
    same(got, want)
    c = rand(seed + 1, want.shape)
    pull = lambda x, c: torch.func.vmap(lambda x, c: torch.func.vjp(case, x)[1](c)[0], (-1, 0), -1)(x, c)  # noqa: E731
    grads = [gradient(case, xs[..., k], c[:, :, k]) for k in range(3)]
    same(runner(pull, case.sizes, xs, c), torch.stack(grads, -1))


@given(cases(), runners, st.integers(0, 99))
def test_second_derivatives(case, runner, seed):
    x = case.operand(seed)
    slope = torch.func.grad(lambda x: case(x).sin().sum())
    nested = torch.func.grad(lambda x: slope(x).square().sum())
    leaf = x.clone().requires_grad_()
    loss = by_hand(case, leaf).sin().sum() + 0 * leaf.square().sum()
    first = torch.autograd.grad(loss, leaf, create_graph=True)[0]
    same(runner(nested, case.sizes, x), torch.autograd.grad(first.square().sum(), leaf)[0])


@given(cases(), st.integers(0, 99))
def test_operands_that_are_not_mapped(case, seed):
    """A constant is there on every rank: psum(c) is n * c, and its gradient on a rank is from all ranks."""
    x = case.operand(seed, equal=True)
    whole = {"axis_size": None, "in_dims": None}
    a, b = ({**whole, "axis_size": n} for n in case.sizes)
    want = by_hand(case, x)
    same(fp.vmap(fp.vmap(case, "b", **b), "a", **a)(x[0, 0]), want)
    c = rand(seed + 1, want.shape)
    pull = lambda c, x: torch.func.vjp(case, x)[1](c)[0]  # noqa: E731
    got = fp.vmap(fp.vmap(pull, "b", (0, None)), "a", (0, None))(c, x[0, 0])
    same(got, gradient(case, x, c))
    outside = torch.func.grad(lambda x: (fp.vmap(fp.vmap(case, "b", **b), "a", **a)(x) * c).sum())(x[0, 0])
    same(outside, gradient(case, x, c).sum((0, 1)))


@pytest.mark.parametrize("runner", RUNNERS)
def test_axis_index_and_size(runner):
    def place(x):
        return {axes: fp.axis_index(axes) + 0 * x.long() for axes in ("a", "b", ("a", "b"), ("b", "a"))} | {
            "size": x * fp.axis_size(("b", "a"))
        }

    out = runner(place, (2, 3), torch.ones(2, 3))
    a, b = torch.arange(2)[:, None].expand(2, 3), torch.arange(3).expand(2, 3)
    want = {"a": a, "b": b, ("a", "b"): a * 3 + b, ("b", "a"): b * 2 + a, "size": torch.full((2, 3), 6.0)}
    assert out.keys() == want.keys()
    assert all(torch.equal(out[k], want[k]) for k in want)


@pytest.mark.parametrize("runner", RUNNERS)
def test_trees_and_dtypes(runner):
    def all_of_them(x):
        tree = {"n": x.int(), "flags": [x > 1], "empty": x.new_empty(0), "c": torch.complex(x, -x)}
        real = {k: v for k, v in tree.items() if k != "c"}
        pair = {"x": x.expand(2), "flag": (x > 1).expand(2)}
        return (
            fp.psum(tree, ("a", "b")),
            fp.pmean(tree["flags"], "a"),
            fp.pmax(real, ("a", "b")),
            fp.all_gather(tree["flags"][0], "b", tiled=False),
            fp.psum_scatter(pair, "a"),
            fp.ppermute(tree, ("a", "b"), [(0, 3), (2, 0)]),
            fp.all_to_all(pair, "b", 0, 0),
        )

    out = runner(all_of_them, (2, 2), torch.arange(4.0).view(2, 2))
    total, mean, top, gathered, scattered, moved, exchanged = out
    same(total["n"], torch.full((2, 2), 6, dtype=torch.int32))
    same(total["flags"][0], torch.full((2, 2), 2))
    same(total["c"], torch.full((2, 2), 6 - 6j, dtype=torch.complex64))
    assert total["empty"].shape == (2, 2, 0)
    same(mean[0], torch.full((2, 2), 0.5))
    same(top["n"], torch.full((2, 2), 3, dtype=torch.int32))
    assert top["flags"][0].all() and top["flags"][0].dtype == torch.bool
    same(gathered, torch.tensor([[[False, False]] * 2, [[True, True]] * 2]))
    same(scattered["x"].squeeze(-1), torch.tensor([[2.0, 4.0], [2.0, 4.0]]))
    same(scattered["flag"].squeeze(-1), torch.tensor([[1, 1], [1, 1]]))
    same(moved["n"], torch.tensor([[2, 0], [0, 0]], dtype=torch.int32))
    same(moved["flags"][0], torch.tensor([[True, False], [False, False]]))
    same(exchanged["flag"], torch.tensor([[[False, False]] * 2, [[True, True]] * 2]))


@pytest.mark.parametrize("runner", RUNNERS)
def test_gradients_of_a_maximum_are_shared(runner):
    """Over two axes, axis by axis: first a row's maximum, then that of the column of maxima."""
    x = torch.tensor([[2.0, 2.0], [2.0, 1.0]])
    got = runner(torch.func.grad(lambda x: fp.pmax(x, ("a", "b"))), (2, 2), x)
    same(got, 4 * torch.tensor([[0.25, 0.25], [0.5, 0.0]]))
    low = torch.full((2, 2), -torch.inf)
    same(runner(lambda x: fp.pmax(x, ("a", "b")), (2, 2), low), low)
    assert runner(lambda x: fp.pmax(x, "a"), (2, 2), torch.tensor([[1.0, torch.nan], [2.0, 0]]))[:, 1].isnan().all()


def test_the_innermost_binding_wins():
    double = fp.vmap(lambda x: fp.vmap(lambda y: fp.psum(y, "i"), "i")(x), "i")
    same(double(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), torch.tensor([[3.0, 3.0], [7.0, 7.0]]))
    with bind_mesh(fp.Mesh(i=5), ("i",)):
        same(fp.vmap(lambda x: fp.psum(x, "i"), "i")(torch.ones(3)), torch.full((3,), 3.0))
        assert fp.axis_size("i") == 5


def test_vmap_takes_trees_dims_and_keywords():
    def f(p, n, *, scale):
        return {"sum": fp.psum(p["x"], "i") * scale, "own": (p["w"] + n, p["x"])}

    x, w, scale = rand(0, (4, 3), 4, 3)
    got = fp.vmap(f, "i", in_dims=({"x": 1, "w": None}, None), out_dims={"sum": 0, "own": (None, -1)})(
        {"x": x, "w": w}, 2, scale=scale
    )
    same(got["sum"], x.sum(1) * scale[:, None])
    same(got["own"][0], w + 2)
    same(got["own"][1], x)
    same(fp.vmap(lambda x: fp.psum(x, "i"), "i", in_dims=-1, out_dims=1)(x), x.sum(1, keepdim=True).expand(4, 3))
    same(fp.vmap(lambda: fp.axis_index("i"), "i", axis_size=3)(), torch.arange(3))


def test_plain_pytorch_is_one_rank():
    x = rand(0, (1, 3))
    for f in (fp.psum, fp.pmean, fp.pmax, fp.all_gather, fp.psum_scatter):
        assert torch.equal(f({"x": x}, ("data", "seq"))["x"], x)
    assert torch.equal(fp.all_to_all(x, "data", 0, 1), x)
    assert torch.equal(fp.ppermute(x, "data", [(0, 0)]), x)
    assert torch.equal(fp.ppermute(x, "data", []), torch.zeros(1, 3))
    assert fp.all_gather(x, "data", dim=1, tiled=False).shape == (1, 1, 3)
    assert fp.psum_scatter(x, "data", tiled=False).shape == (3,)
    assert (fp.axis_size("data"), fp.axis_index("data").item()) == (1, 0)
    assert fp.psum(x > 0, "data").dtype == torch.int64


# ---- inside a loss


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


LAYERS = {f.__name__: f for f in (normalized, top_normalized, contrasted, by_columns, shifted, scattered)}


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


@given(names, st.sampled_from([1, 2, 4]), st.integers(1, 3), schedules, st.booleans(), st.integers(0, 99))
def test_a_loss_with_collectives_equals_one_device(names, data, pipe, schedule, sharded, seed):
    pipe = min(pipe, len(names) + 1, 8 // data)
    step = make_step(names, drop_last=True)
    params, batches = setup(len(names), rows=4, seed=seed)
    mesh = fp.Mesh(pipe=pipe, data=data)
    fast = fp.data_parallel(fp.pipelined(step, axis="pipe", microbatches=1, schedule=schedule), axis="data")
    fast = fp.sharded_weights(fast, axis="data") if sharded else fast
    assert_equivalent(step, fast, mesh, lambda p: p, params, batches)


def run_steps(step, mesh, params, batches):
    run = fp.simulate(step, mesh)
    state = run.init(lambda p: p, params, batches[0])
    losses = []
    for batch in batches:
        state, metrics = run(state, batch)
        losses.append(metrics["loss"])
    return losses, run.unplace(state)


@given(names, schedules, st.integers(0, 99))
def test_each_microbatch_is_a_batch_of_its_own(names, schedule, seed):
    """With and without a pipeline, the ranks that meet have the same rows."""
    step = fp.data_parallel(make_step(names), axis="data")
    params, batches = setup(len(names), rows=8, seed=seed)
    batches = batches[:1]
    want = run_steps(fp.accumulated(step, microbatches=2), fp.Mesh(data=2), params, batches)
    pipelined = fp.pipelined(step, axis="pipe", microbatches=2, schedule=schedule)
    same(run_steps(pipelined, fp.Mesh(pipe=2, data=2), params, batches), want)


def test_two_axes_split_the_batch():
    def loss_fn(w, x):
        everyone = fp.all_gather(x @ w, ("seq", "data"))  # the axes need not be in mesh order
        local = x @ w - fp.psum((x @ w).sum(0), ("data", "seq")) / len(everyone)
        return fp.Mean((local * everyone.tanh().sum(0)).square().sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    w, x = rand(0, (3, 3), (8, 3))
    fast = fp.data_parallel(step, axis=("data", "seq"))
    assert_equivalent(step, fast, fp.Mesh(data=2, seq=2), lambda w: w, w, [x, x])


def test_vmap_and_torch_func_inside_a_traced_loss():
    """Per-row gradients, and an axis of vmap beside one of the mesh."""

    def loss_fn(w, x):
        energy = lambda row: (row @ w).tanh().sum() * fp.psum(row.sum(), "data")  # noqa: E731
        forces = torch.func.vmap(torch.func.grad(energy))(x)  # a collective in a vmap that it does not name
        rows = fp.vmap(lambda f: fp.psum(f, ("row", "data")), "row")(forces)
        return fp.Mean((rows * (x @ w)).square().sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    w, x = rand(0, (3, 3), (2, 3))
    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    state, metrics = run(run.init(lambda w: w, w, x), x)

    def total(w):  # two ranks with one row each
        return fp.vmap(lambda x: loss_fn(w, x[None]).total, "data")(x).sum() / 2

    want = torch.func.grad(lambda w: fp.vmap(lambda x: loss_fn(w, x[None]).total, "data")(x).sum() / 2)(w)
    same(metrics["loss"], total(w))
    same(run.unplace(state), w - 0.1 * want)


def test_aux_may_be_gathered_or_a_place():
    def loss_fn(w, x):
        place = fp.axis_index("data") * torch.ones(len(x), dtype=torch.int64)
        total = (x * w).square().sum()
        return fp.Mean(total, x.new_ones(len(x)).sum()), {"rank": fp.Rows(place), "top": fp.Mean(total, total * 0 + 1)}

    def step(w, x):
        (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(w, x)
        return w, {"loss": loss, "aux": aux}

    w, x = torch.ones(2), torch.ones(6, 2)
    run = fp.simulate(fp.accumulated(fp.data_parallel(step, axis="data"), microbatches=2), fp.Mesh(data=3))
    _, metrics = run(run.init(lambda w: w, w, x), x)
    assert metrics["aux"]["rank"].tolist() == [0, 0, 1, 1, 2, 2]


# ---- graphs


def plan_of(names, mesh, schedule=None, rows=8):
    step = fp.data_parallel(make_step(names), axis="data")
    step = fp.pipelined(step, axis="pipe", microbatches=2, schedule=schedule or fp.schedules.zb_h1())
    params, batches = setup(len(names), rows, seed=0)
    run = fp.simulate(step, mesh)
    state = run.init(lambda p: p, params, batches[0])
    return run.plan(state, batches[0])


def nodes_of(unit, name):
    return [n for n in unit.code.module.graph.nodes if f"funcpipe.{name}" in str(n.target)]


def test_one_graph_serves_all_ranks():
    """Nodes name the axis, and nothing else of the mesh; every collective is a start and a wait, where the loss put it."""
    plan = plan_of(["normalized", "shifted", "contrasted"], fp.Mesh(pipe=2, data=2))
    units = plan.calls[0].cuts[0].units
    psums = lambda kind, segment: len(nodes_of(units[kind, segment], "psum_start"))  # noqa: E731
    assert [psums("F", s) for s in range(4)] == [3, 0, 0, 0]  # never computed again in another unit
    assert [psums(k, 0) for k in "BIW"] == [2, 2, 0]  # the transposes; that of the count has nothing to do
    assert [len(nodes_of(units[k, 1], "ppermute_start")) for k in "FB"] == [1, 1]
    assert len(nodes_of(units["F", 2], "all_gather_start")) == len(nodes_of(units["B", 2], "psum_scatter_start")) == 1
    for unit in units.values():
        starts = nodes_of(unit, "psum_start") + nodes_of(unit, "all_gather_start") + nodes_of(unit, "ppermute_start")
        assert all([str(u.target) for u in n.users] == ["funcpipe.wait.default"] for n in starts)
        assert all(n.args[1] == "data" for n in starts)
    assert set().union(*(axes_of(u.code.module.graph) for u in units.values())) == {("data",)}
    lanes = set().union(*(lanes_of(u.code.module.graph, fp.Mesh(pipe=2, data=2)) for u in units.values()))
    assert lanes == {(0, 1, "ppermute"), (2, 3, "ppermute"), (1, 0, "ppermute"), (3, 2, "ppermute")}


def test_the_place_of_a_rank_is_a_constant_of_the_rank():
    """Folded once on every rank, not in the graph; labels that follow from it are, too."""
    plan = plan_of(["contrasted"], fp.Mesh(pipe=2, data=2))
    call = plan.calls[0]
    units = call.cuts[0].units.values()
    assert not any(nodes_of(u, "axis_index") for u in units)
    constants = call.cuts[0].constants
    (labels,) = (fold for v, fold in constants.items() if v.dtype == torch.int64)

    def body(comm):
        with bind_rank(comm):
            return labels().tolist()

    assert run_ranks(call.splits.mesh, body) == [[0, 1], [2, 3], [0, 1], [2, 3]]


# ---- processes


def in_a_process(seed):
    """What `test_gloo` runs in each of four processes."""
    from funcpipe.comm.process_group import ProcessGroupCommunicator

    mesh = fp.Mesh(a=2, b=2)
    comm = ProcessGroupCommunicator(mesh, device="cpu")
    comm.prepare([("a",), ("b",), ("a", "b"), ("b", "a")])
    for case in samples():
        x = case.operand(seed)
        want = by_hand(case, x)
        c = rand(seed + 1, want.shape)
        i, j = divmod(comm.rank, 2)
        with bind_rank(comm), bind_mesh(mesh, ("a", "b")):
            got, pull = torch.func.vjp(case, x[i, j])
            same(got, want[i, j])
            same(pull(c[i, j])[0], gradient(case, x, c)[i, j])
            assert fp.axis_index(("b", "a")).item() == j * 2 + i
    comm.flush()
    step = make_step(list(LAYERS), drop_last=True)
    params, batches = setup(len(LAYERS), rows=4, seed=seed)
    fast = fp.data_parallel(fp.pipelined(step, axis="pipe", microbatches=1, schedule=fp.schedules.zb_h1()), axis="data")
    return assert_equivalent(step, fast, fp.Mesh(pipe=2, data=2), lambda p: p, params, batches, runner=fp.spmd).compared


def samples():
    sizes = (2, 2)
    for axes in (("a",), ("b",), ("a", "b"), ("b", "a")):
        n = 2 ** len(axes)
        yield Case("psum", sizes, axes, (3,), {})
        yield Case("pmean", sizes, axes, (), {})
        yield Case("all_gather", sizes, axes, (2, 3), {"dim": 1, "tiled": True})
        yield Case("all_gather", sizes, axes, (2,), {"dim": -1, "tiled": False})
        yield Case("psum_scatter", sizes, axes, (3, 2 * n), {"dim": 1, "tiled": True})
        yield Case("all_to_all", sizes, axes, (n, 3), {"split_dim": 0, "concat_dim": 1, "tiled": True})
        yield Case("ppermute", sizes, axes, (2, 2), {"perm": [(i, (i + 1) % n) for i in range(n)]})
        yield Case("ppermute", sizes, axes, (2,), {"perm": [(0, n - 1)]})
    yield Case("pmax", sizes, ("a",), (5,), {})


def test_gloo():
    assert all(n > 0 for n in fp.launch(in_a_process, 4, 7, timeout=120))


# ---- errors


def text_of(fn, *args, kind=AxisError):
    with pytest.raises(kind) as caught:
        fn(*args)
    return str(caught.value)


def in_loss(fn, **mesh):
    def loss_fn(w, x):
        return fp.Mean((fn(x) * w).sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, _ = fp.value_and_grad(loss_fn)(w, x)
        return w, {"loss": loss}

    fast = fp.data_parallel(step, axis="data")
    fast = fp.pipelined(fast, axis="pipe", microbatches=1) if "pipe" in mesh else fast
    return text_of(fp.simulate(fast, fp.Mesh(**mesh)).init, lambda w: w, torch.ones(2), torch.ones(4, 2))


def test_a_name_that_is_not_bound():
    x = torch.ones(2)
    assert text_of(fp.vmap(lambda x: fp.psum(x, "j"), "i"), x) == (
        "psum: axis 'j' is not bound here: bound are 'i' (of vmap). Name one of those, or map over it with "
        "fp.vmap(f, axis_name='j')"
    )
    assert in_loss(lambda x: fp.pmax(x, "seq"), data=2) == (
        "pmax: axis 'seq' is not bound here: Mesh(data=2) lacks it, and bound are 'data' (of the mesh). Name one of those, "
        "or add it to the mesh and stack a transform on it"
    )
    assert in_loss(lambda x: fp.all_gather(x, ("data", "pipe")), pipe=1, data=2) == (
        "all_gather: axis 'pipe' of Mesh(pipe=1, data=2) does not split the batch, so no collective runs over it: its ranks "
        "have the same rows, or other stages of a pipeline. Here, bound are 'data' (of the mesh); name one of those, or "
        "stack a transform that splits the batch over it (data_parallel)"
    )
    assert "psum: ('data', 'data') names an axis twice" in in_loss(lambda x: fp.psum(x, ("data", "data")), data=2)
    assert text_of(fp.psum, x, (0,)) == "psum: an axis is given by its name, or a tuple of names, not by 0"


def test_outside_of_the_loss():
    def step(w, x):
        loss, _ = fp.value_and_grad(lambda w, x: fp.Mean((w * x).sum(), torch.tensor(float(len(x)))))(w, x)
        return w, {"loss": fp.psum(loss, "data")}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    assert text_of(run.init, lambda w: w, torch.ones(2), torch.ones(4, 2)) == (
        "psum: axis 'data' is not bound here: the step runs on a mesh, and this is outside value_and_grad, where every rank "
        "has the global batch. Call it inside the loss function; fp.global_sum sums over leaves out here"
    )


def test_what_does_not_fit():
    two = lambda f: fp.vmap(f, "i")  # noqa: E731
    x = torch.ones(2, 3)
    assert text_of(two(lambda x: fp.psum_scatter(x, "i")), x) == (
        "psum_scatter: dim 0 of a tensor of shape (3,) is no multiple of 2, the number of ranks on 'i'; pad it, or name "
        "another dim"
    )
    assert text_of(two(lambda x: fp.all_to_all(x, "i", 0, 0, tiled=False)), x) == (
        "all_to_all: dim 0 of a tensor of shape (3,) is not 2, the number of ranks on 'i'; use tiled=True to cut it into "
        "pieces"
    )
    assert text_of(two(lambda x: fp.all_gather(x, "i", 1)), x) == "all_gather: a tensor of shape (3,) has no dim 1"
    assert text_of(two(lambda x: fp.psum(3, "i")), x) == (
        "psum: a leaf is 3, not a tensor; write torch.tensor(...), or fp.axis_size for a count"
    )
    assert text_of(two(lambda x: fp.pmax(x * 1j, "i")), x) == (
        "pmax: complex numbers (torch.complex64) have no maximum; take it of x.abs()"
    )
    assert text_of(two(lambda x: fp.ppermute(x, "i", [(0, 2)])), x) == (
        "ppermute: destination 2 is no place on an axis of 2 ranks: 0 to 1"
    )
    assert text_of(two(lambda x: fp.ppermute(x, "i", [(0, 1), (0, 0)])), x) == (
        "ppermute: [(0, 1), (0, 0)] names a source twice; use all_gather to send to several ranks"
    )


def test_vmap_refuses_dims_that_do_not_fit():
    f = lambda *xs: xs[0]  # noqa: E731
    x = torch.ones(2, 3)
    assert (
        text_of(fp.vmap(f, "i", (0, 1)), x, x)
        == "vmap over 'i': mapped dims differ in size: 2 in args[0], 3 in args[1]"
    )
    assert text_of(fp.vmap(f, "i", axis_size=5), x) == (
        "vmap over 'i': mapped dims differ in size: 5 in axis_size, 2 in args[0]"
    )
    assert text_of(fp.vmap(f, "i", None), x) == (
        "vmap over 'i': no argument is mapped; say how many elements: axis_size=..."
    )
    assert text_of(fp.vmap(f, "i", 2), x) == (
        "vmap over 'i': args[0] of shape (2, 3) has no dim 2; write in_dims=None for it"
    )
    assert text_of(fp.vmap(f, "i", ("x",)), x) == "vmap over 'i': in_dims=('x',) holds 'x'; a dim is an int or None"
    assert text_of(fp.vmap(f, "i", (0, 0)), x).startswith("vmap over 'i': in_dims=(0, 0) does not fit the arguments: ")


def test_an_operand_may_be_written_over_once_its_result_is_there():
    """A compiled unit uses the memory of an operand again; and the ranks' results are their own."""
    shapes = {
        "psum": (4,),
        "pmax": (4,),
        "all_gather": (4, 4),
        "psum_scatter": (),
        "all_to_all": (4,),
        "ppermute": (4,),
    }

    def body(comm):
        out = []
        with bind_rank(comm):
            for kind, shape in shapes.items():
                x = torch.full((4,), float(comm.rank))
                perm = ([0, 1, 1, 2, 2, 3, 3, 0],) if kind == "ppermute" else ()
                token = ops.STARTS[kind](x, "a,b", *perm)
                out.append(ops.WAIT(token, x, shape))
                x.fill_(100)
                assert token.shape == (0,) and out[-1].shape == shape
                comm.exchange(None)
        seen = [y.max().item() for y in out]
        comm.exchange(None)
        [y.fill_(100) for y in out]
        return seen

    assert run_ranks(GRID, body) == [[6, 3, 3, 6, 3, (r - 1) % 4] for r in range(4)]


def test_ops_outside_of_a_rank():
    assert text_of(torch.ops.funcpipe.psum_start, torch.ones(2), "data") == (
        "funcpipe::psum_start runs outside of a rank: wrap the call in bind_rank(communicator)"
    )


def test_a_closure_that_outlives_its_vmap():
    kept = []

    def f(x):
        kept.append(torch.func.vjp(lambda x: fp.psum(x, "i"), x)[1])
        return x

    fp.vmap(f, "i")(torch.ones(3))
    with pytest.raises((AxisError, RuntimeError)):
        kept[0](torch.ones(()))


def test_a_weight_that_is_summed_over_ranks_is_refused():
    def step(w, x):
        loss_fn = lambda w, x: fp.Mean((w * x).sum(), fp.psum(x.new_ones(()) * len(x), "data"))  # noqa: E731
        loss, _ = fp.value_and_grad(loss_fn)(w, x)
        return w, {"loss": loss}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    text = text_of(run.init, lambda w: w, torch.ones(2), torch.ones(4, 2), kind=BatchError)
    assert "Mean.weight of the whole batch is 4, but those of its 2 parts add up to 8" in text
