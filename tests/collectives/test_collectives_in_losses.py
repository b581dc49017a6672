"""Collectives inside a loss: equal to one device under every stack, and one graph for all ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused
from support.worlds import make_step, names, rand, same, schedules, setup

import funcpipe as fp
from funcpipe._src.collectives import axes_of, bind_rank, channels_of
from funcpipe._src.comm.simulated import run_ranks
from funcpipe.errors import BatchError
from funcpipe.testing import assert_equivalent


@given(
    names,
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    schedules,
    st.booleans(),
    st.integers(0, 99),
)
def test_a_loss_with_collectives_equals_one_device(names, data, pipe, schedule, sharded, seed):
    pipe = min(pipe, len(names) + 1, 8 // data)
    step = make_step(names, drop_last=True)
    params, batches = setup(len(names), rows=4, seed=seed)
    mesh = fp.Mesh(pipe=pipe, data=data)
    fast = fp.data_parallel(
        fp.pipelined(step, axis="pipe", microbatches=1, schedule=schedule), axis="data"
    )
    fast = fp.sharded_weights(fast, axis="data") if sharded else fast
    assert_equivalent(step, fast, mesh, lambda p: p, params, batches)


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
    """Per-row gradients, and a collective of all of them."""

    def loss_fn(w, x):
        energy = lambda row: (row @ w).tanh().sum() * row.sum()  # noqa: E731
        forces = torch.func.vmap(torch.func.grad(energy))(x)
        sums = fp.psum(forces.sum(0), "data")
        return fp.Mean((forces * sums * (x @ w)).square().sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    w, x = rand(0, (3, 3), (4, 3))
    assert_equivalent(
        step, fp.data_parallel(step, axis="data"), fp.Mesh(data=2), lambda w: w, w, [x]
    )


def test_a_collective_over_rows_stays_outside_of_vmap():
    def loss_fn(w, x):
        sums = torch.func.vmap(lambda column: fp.psum(column.sum(), "data"))(x.T)
        return fp.Mean((sums * (x @ w)).square().sum(), torch.tensor(float(len(x))))

    def step(w, x):
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    w, x = rand(0, (3, 3), (4, 3))
    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    with refused(
        BatchError,
        "fp.psum over 'data' at test_collectives_in_losses.py",
        "Call it outside, on the whole",
    ):
        run.init(lambda w: w, w, x)


def test_the_place_of_a_rank_is_no_aux_value():
    """One device has one place; a value that depends on how many ranks there are is refused."""

    def loss_fn(w, x):
        place = fp.axis_index("data") * torch.ones(len(x), dtype=torch.int64)
        return fp.Mean((x * w).square().sum(), x.new_ones(len(x)).sum()), {"rank": fp.Rows(place)}

    def step(w, x):
        (loss, aux), _ = fp.value_and_grad(loss_fn, has_aux=True)(w, x)
        return w, {"loss": loss, "aux": aux}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=3))
    with refused(
        BatchError,
        "aux['rank'], fp.Rows along dim 0, is the place of a rank",
        "the rows of the part",
    ):
        run.init(lambda w: w, torch.ones(2), torch.ones(6, 2))


# ---- graphs


def plan_of(names, mesh, schedule=None, rows=8):
    step = fp.data_parallel(make_step(names), axis="data")
    step = fp.pipelined(
        step, axis="pipe", microbatches=1, schedule=schedule or fp.schedules.zb_h1()
    )
    params, batches = setup(len(names), rows, seed=0)
    run = fp.simulate(step, mesh)
    state = run.init(lambda p: p, params, batches[0])
    return run.plan(state, batches[0])


def nodes_of(unit, name):
    return [n for n in unit.code.module.graph.nodes if f"funcpipe.{name}" in str(n.target)]


def test_one_graph_serves_all_ranks():
    """Nodes name the axis, and nothing else of the mesh; every collective is a start and a wait,
    where the loss put it."""
    plan = plan_of(["normalized", "shifted", "contrasted"], fp.Mesh(pipe=2, data=2))
    units = plan.calls[0].units.units
    psums = lambda kind, segment: len(nodes_of(units[kind, segment], "psum_start"))  # noqa: E731
    assert [psums("F", s) for s in range(4)] == [3, 0, 0, 0]  # never computed again in another unit
    assert [psums(k, 0) for k in "BIW"] == [
        2,
        2,
        0,
    ]  # the transposes; that of the count has nothing to do
    assert [len(nodes_of(units[k, 1], "ppermute_start")) for k in "FB"] == [1, 1]
    assert (
        len(nodes_of(units["F", 2], "all_gather_start"))
        == len(nodes_of(units["B", 2], "psum_scatter_start"))
        == 1
    )
    for unit in units.values():
        starts = (
            nodes_of(unit, "psum_start")
            + nodes_of(unit, "all_gather_start")
            + nodes_of(unit, "ppermute_start")
        )
        assert all([str(u.target) for u in n.users] == ["funcpipe.wait.default"] for n in starts)
        assert all(n.args[1] == "data" for n in starts)
    assert set().union(*(axes_of(u.code.module.graph) for u in units.values())) == {("data",)}
    channels = set().union(
        *(channels_of(u.code.module.graph, fp.Mesh(pipe=2, data=2)) for u in units.values())
    )
    assert channels == {
        (0, 1, "ppermute"),
        (2, 3, "ppermute"),
        (1, 0, "ppermute"),
        (3, 2, "ppermute"),
    }


def test_the_place_of_a_rank_is_a_constant_of_the_rank():
    """Folded once on every rank, not in the graph; labels that follow from it are, too."""
    plan = plan_of(["contrasted"], fp.Mesh(pipe=2, data=2))
    call = plan.calls[0]
    units = call.units.units.values()
    assert not any(nodes_of(u, "axis_index") for u in units)
    constants = call.units.constants
    (labels,) = (fold for v, fold in constants.items() if v.dtype == torch.int64)

    def body(comm):
        with bind_rank(comm):
            return labels().tolist()

    first, last = list(range(4)), list(range(4, 8))
    assert run_ranks(call.split.mesh, body) == [first, last, first, last]


# ---- constants and numbers

TWO = fp.Mesh(data=2)
CONSTANTS = {
    "psum of a constant": (lambda x: fp.psum(torch.tensor(4.0), "data"), 8.0),
    "psum of rows": (lambda x: fp.psum(torch.tensor(float(len(x))), "data"), 8.0),
    "psum of a product": (lambda x: fp.psum(torch.tensor(3.0) * 2 + 1, "data"), 14.0),
    "psum of a negative zero": (
        lambda x: torch.copysign(x.new_ones(()), fp.psum(torch.tensor(-0.0), "data")),
        -1.0,
    ),
    "psum of a vector": (lambda x: fp.psum(torch.tensor([1.0, 2.0]), "data").sum(), 6.0),
    "psum of 1": (lambda x: fp.psum(1, "data"), 2.0),
    "psum of True": (lambda x: fp.psum(True, "data"), 2.0),
    "psum of 2.5": (lambda x: fp.psum(2.5, "data"), 5.0),
    "psum of a complex number": (lambda x: fp.psum(1 + 2j, "data").imag, 4.0),
    "psum of a number of numpy": (lambda x: fp.psum(np.float64(2.5), "data"), 5.0),
    "psum of a tree": (lambda x: fp.psum({"a": 1, "b": torch.tensor(2.0)}, "data")["b"], 4.0),
    "pmean of 3": (lambda x: fp.pmean(3, "data"), 3.0),
    "pmax of 3": (lambda x: fp.pmax(3, "data"), 3.0),
    "all_gather of a constant": (lambda x: fp.all_gather(torch.tensor([4.0]), "data").sum(), 8.0),
    "all_gather of 4": (lambda x: fp.all_gather(4, "data", tiled=False).sum(), 8.0),
    "psum_scatter of a constant": (
        lambda x: fp.psum_scatter(torch.tensor([1.0, 1.0]), "data").sum(),
        2.0,
    ),
    "all_to_all of a constant": (
        lambda x: fp.all_to_all(torch.tensor([1.0, 1.0]), "data", 0, 0).sum(),
        2.0,
    ),
    "ppermute of a constant": (
        lambda x: fp.ppermute(torch.tensor(3.0), "data", [(0, 1), (1, 0)]),
        3.0,
    ),
    "psum inside a vmap": (
        lambda x: (
            fp.psum(2.0, "data")
            + fp.vmap(lambda c: fp.psum(1, "column") + 0 * c[0], "column")(x.T)[0]
        ),
        7.0,
    ),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_collectives_of_constants(name, sharded):
    """Computed by the ranks, not while the loss is traced."""
    read, want = CONSTANTS[name]

    def loss_fn(w, x):
        total = (x @ w).square().sum()
        return fp.Mean(total, x.new_ones(len(x)).sum()), {
            "factor": fp.Mean(read(x) * len(x), x.new_ones(len(x)).sum())
        }

    def step(w, x):
        (loss, aux), grads = fp.value_and_grad(loss_fn, has_aux=True)(w, x)
        return w - 0.1 * grads, {"loss": loss, **aux}

    w, x = rand(0, (3,), (8, 3))
    fast = fp.data_parallel(step, axis="data")
    run = fp.simulate(fp.sharded_weights(fast, axis="data") if sharded else fast, TWO)
    _, metrics = run(run.init(lambda w: w, w, x), x)
    assert metrics["factor"].double() == want


def test_numbers_have_the_dtype_that_torch_gives_them():
    for x in (1, True, 2.5, 1j):
        own = torch.tensor(x)
        summed = own.to(torch.int64) if own.dtype == torch.bool else own
        assert fp.psum(x, "data").dtype == summed.dtype
        assert (
            fp.vmap(lambda r, x=x: fp.psum(x, "i") + 0 * r, "i")(
                torch.zeros(2, dtype=torch.int64)
            ).dtype
            == summed.dtype
        )
        assert fp.pmean(x, "data").dtype == (summed / 1).dtype


def test_a_weight_that_is_a_mean_over_ranks_counts_what_there_is():
    def loss_fn(w, x):
        return fp.Mean((x @ w).square().sum(), fp.psum(torch.tensor(float(len(x))), "data") / 2)

    def step(w, x):
        loss, grads = fp.value_and_grad(loss_fn)(w, x)
        return w - 0.1 * grads, {"loss": loss}

    w, x = rand(0, (3,), (8, 3))
    run = fp.simulate(fp.data_parallel(step, axis="data"), TWO)
    _, metrics = run(run.init(lambda w: w, w, x), x)
    same(metrics["loss"], (x @ w).square().mean())


def test_a_permutation_of_no_axis_is_the_identity():
    assert fp.ppermute(3, "data", [(0, 1), (1, 0)]) == 3
    assert fp.ppermute(torch.ones(2), "data", []).tolist() == [0, 0]
