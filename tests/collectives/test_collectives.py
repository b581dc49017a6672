"""Collectives against plain loops over ranks, however the axes are bound, and in real processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.worlds import (
    GRID,
    LAYERS,
    RUNNERS,
    Case,
    by_hand,
    cases,
    gradient,
    make_step,
    mapped,
    rand,
    runners,
    same,
    setup,
)

import funcpipe as fp
from funcpipe._src.collectives import bind_mesh, bind_rank, ops
from funcpipe._src.comm.simulated import run_ranks
from funcpipe.testing import assert_equivalent


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

    def pull(x, c):
        return torch.func.vmap(lambda x, c: torch.func.vjp(case, x)[1](c)[0], (-1, 0), -1)(x, c)

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
    """A constant is there on every rank: psum(c) is n * c, and its gradient on a rank is from all
    ranks."""
    x = case.operand(seed, equal=True)
    whole = {"axis_size": None, "in_dims": None}
    a, b = ({**whole, "axis_size": n} for n in case.sizes)
    want = by_hand(case, x)
    same(fp.vmap(fp.vmap(case, "b", **b), "a", **a)(x[0, 0]), want)
    c = rand(seed + 1, want.shape)
    pull = lambda c, x: torch.func.vjp(case, x)[1](c)[0]  # noqa: E731
    got = fp.vmap(fp.vmap(pull, "b", (0, None)), "a", (0, None))(c, x[0, 0])
    same(got, gradient(case, x, c))
    outside = torch.func.grad(lambda x: (fp.vmap(fp.vmap(case, "b", **b), "a", **a)(x) * c).sum())(
        x[0, 0]
    )
    same(outside, gradient(case, x, c).sum((0, 1)))


@pytest.mark.parametrize("runner", RUNNERS)
def test_axis_index_and_size(runner):
    def place(x):
        return {
            axes: fp.axis_index(axes) + 0 * x.long() for axes in ("a", "b", ("a", "b"), ("b", "a"))
        } | {"size": x * fp.axis_size(("b", "a"))}

    out = runner(place, (2, 3), torch.ones(2, 3))
    a, b = torch.arange(2)[:, None].expand(2, 3), torch.arange(3).expand(2, 3)
    want = {
        "a": a,
        "b": b,
        ("a", "b"): a * 3 + b,
        ("b", "a"): b * 2 + a,
        "size": torch.full((2, 3), 6.0),
    }
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
    assert (
        runner(lambda x: fp.pmax(x, "a"), (2, 2), torch.tensor([[1.0, torch.nan], [2.0, 0]]))[:, 1]
        .isnan()
        .all()
    )


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
    got = fp.vmap(
        f, "i", in_dims=({"x": 1, "w": None}, None), out_dims={"sum": 0, "own": (None, -1)}
    )({"x": x, "w": w}, 2, scale=scale)
    same(got["sum"], x.sum(1) * scale[:, None])
    same(got["own"][0], w + 2)
    same(got["own"][1], x)
    same(
        fp.vmap(lambda x: fp.psum(x, "i"), "i", in_dims=-1, out_dims=1)(x),
        x.sum(1, keepdim=True).expand(4, 3),
    )
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


# ---- processes


def in_a_process(sizes, seed):
    """What `test_gloo` runs in each of its processes."""
    from funcpipe._src.comm.process_group import ProcessGroupCommunicator

    mesh = fp.Mesh(a=sizes[0], b=sizes[1])
    comm = ProcessGroupCommunicator(mesh, device="cpu")
    comm.prepare([("a",), ("b",), ("a", "b"), ("b", "a")])
    for case in samples(sizes):
        x = case.operand(seed)
        want = by_hand(case, x)
        c = rand(seed + 1, want.shape)
        i, j = divmod(comm.rank, sizes[1])
        with bind_rank(comm), bind_mesh(mesh, ("a", "b")):
            got, pull = torch.func.vjp(case, x[i, j])
            same(got, want[i, j])
            same(pull(c[i, j])[0], gradient(case, x, c)[i, j])
            assert fp.axis_index(("b", "a")).item() == j * sizes[0] + i
    comm.flush()
    step = make_step(list(LAYERS), drop_last=True)
    params, batches = setup(len(LAYERS), rows=4, seed=seed)
    fast = fp.data_parallel(
        fp.pipelined(step, axis="pipe", microbatches=1, schedule=fp.schedules.zb_h1()), axis="data"
    )
    return assert_equivalent(
        step,
        fast,
        fp.Mesh(pipe=sizes[0], data=sizes[1]),
        lambda p: p,
        params,
        batches,
        runner=fp.spmd,
    ).compared


def samples(sizes):
    for axes in (("a",), ("b",), ("a", "b"), ("b", "a")):
        n = math.prod(sizes["ab".index(a)] for a in axes)
        yield Case("psum", sizes, axes, (3,), {})
        yield Case("pmean", sizes, axes, (), {})
        yield Case("all_gather", sizes, axes, (2, 3), {"dim": 1, "tiled": True})
        yield Case("all_gather", sizes, axes, (2,), {"dim": -1, "tiled": False})
        yield Case("psum_scatter", sizes, axes, (3, 2 * n), {"dim": 1, "tiled": True})
        yield Case(
            "all_to_all", sizes, axes, (n, 3), {"split_dim": 0, "concat_dim": 1, "tiled": True}
        )
        yield Case("ppermute", sizes, axes, (2, 2), {"perm": [(i, (i + 1) % n) for i in range(n)]})
        yield Case("ppermute", sizes, axes, (2,), {"perm": [(0, n - 1)]})
    yield Case("pmax", sizes, ("a",), (5,), {})


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2)], ids=str)
def test_gloo(sizes):
    assert all(n > 0 for n in fp.launch(in_a_process, math.prod(sizes), sizes, 7, timeout=240))
