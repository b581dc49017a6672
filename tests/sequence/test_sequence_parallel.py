"""Sequence parallelism: any attention, on any mesh and in any stack, computes what it computes on
one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused
from support.transformers import Transformer, transformed, transformers

import funcpipe as fp
from funcpipe._src.collectives import collectives_of
from funcpipe._src.program import check_same_order
from funcpipe._src.spec.resolve import resolve
from funcpipe.errors import BatchError, CutError, SequenceError, StackError
from funcpipe.testing import assert_equivalent

# Head projections and their gradients are summed over ranks instead of in one matrix product.
FLOAT64 = 1e-12
# Running sums of a ring are rescaled at every hop.
RING = 1e-10


def check(
    model: Transformer,
    step: Callable,
    mesh: fp.Mesh,
    rtol: float = FLOAT64,
    parts: int = 1,
    runner: Any = None,
) -> None:
    batches = [model.batch(seed, model.rows * parts) for seed in range(2)]
    assert_equivalent(
        model.step, step, mesh, model.init_state, model.init(7), batches, rtol=rtol, runner=runner
    )


# On up to three ranks in the plain tier: the ranks of a simulation run one after another.
few, many = st.integers(1, 3), st.integers(4, 8)


@given(transformers(), few)
def test_any_attention_over_exchanged_heads(model: Transformer, ranks: int) -> None:
    check_heads(model, ranks)


@pytest.mark.slow
@given(transformers(), many)
def test_any_attention_over_heads_of_many_ranks(model: Transformer, ranks: int) -> None:
    check_heads(model, ranks)


def check_heads(model: Transformer, ranks: int) -> None:
    check(model, fp.seq_all_to_all(model.step, axis="seq", dims=model.dims), fp.Mesh(seq=ranks))


@given(transformers(), few, st.booleans())
def test_any_attention_around_a_ring(model: Transformer, ranks: int, zigzag: bool) -> None:
    check_ring(model, ranks, zigzag)


@pytest.mark.slow
@given(transformers(), many, st.booleans())
def test_any_attention_around_a_ring_of_many_ranks(
    model: Transformer, ranks: int, zigzag: bool
) -> None:
    check_ring(model, ranks, zigzag)


def check_ring(model: Transformer, ranks: int, zigzag: bool) -> None:
    step = fp.seq_ring(model.step, axis="ring", dims=model.dims, zigzag=zigzag)
    check(model, step, fp.Mesh(ring=ranks), RING)


SPLITS = st.booleans(), st.booleans()


@given(transformers(), st.integers(1, 2), st.integers(1, 2), *SPLITS)
def test_both_on_two_axes(
    model: Transformer, ring: int, seq: int, zigzag: bool, ring_first: bool
) -> None:
    check_both(model, ring, seq, zigzag, ring_first)


@pytest.mark.slow
@given(transformers(), st.integers(1, 3), st.integers(1, 3), *SPLITS)
def test_both_on_two_axes_of_more_ranks(
    model: Transformer, ring: int, seq: int, zigzag: bool, ring_first: bool
) -> None:
    check_both(model, ring, seq, zigzag, ring_first)


def check_both(model: Transformer, ring: int, seq: int, zigzag: bool, ring_first: bool) -> None:
    step = fp.seq_all_to_all(model.step, axis="seq", dims=model.dims)
    step = fp.seq_ring(step, axis="ring", dims=model.dims, zigzag=zigzag)
    mesh = fp.Mesh(ring=ring, seq=seq) if ring_first else fp.Mesh(seq=seq, ring=ring)
    check(model, step, mesh, RING)


@given(transformers(), st.data())
def test_any_stack(model: Transformer, data: st.DataObject) -> None:
    """Pipelines, data parallelism and weights sharded over the sequence (ISP), the data (FSDP), or
    both."""
    sizes = {axis: data.draw(st.integers(1, 2), label=axis) for axis in ("pipe", "data", "seq")}
    order = data.draw(st.permutations(list(sizes)), label="order")
    microbatches = data.draw(st.integers(1, 2), label="microbatches")
    sharded = data.draw(
        st.sampled_from([(), ("seq",), ("data",), ("data", "seq")]), label="sharded"
    )
    seq = fp.seq_all_to_all(axis="seq", dims=model.dims)
    step = transformed(model, seq, microbatches, sharded, data=True)
    check(model, step, fp.Mesh(**{a: sizes[a] for a in order}), parts=microbatches * sizes["data"])


def test_leaves_sharded_over_the_data_and_the_sequence_and_others_over_one_of_them() -> None:
    model = Transformer(layers=1, rows=4, heads=4, kv_heads=2, call="three")
    step = fp.compose(
        fp.seq_all_to_all(axis="seq", dims=model.dims),
        fp.data_parallel(axis="data"),
        fp.sharded_weights(axis=("data", "seq"), only=lambda path: "embed" in path),
        fp.sharded_weights(axis="seq", only=lambda path: "embed" not in path, reduce="last"),
    )(model.step)
    check(model, step, fp.Mesh(data=2, seq=2), parts=2)


def test_every_order_of_stacking_is_the_same_program() -> None:
    """All orders resolve alike; every fifth is run, and has the same bits."""
    model = Transformer(layers=1, rows=4, heads=4, kv_heads=2, call="three")
    some = [
        fp.seq_all_to_all(axis="seq"), fp.data_parallel(axis="data"), fp.sharded_weights(axis="seq"),
        fp.pipelined(axis="pipe", microbatches=2),
    ]  # fmt: skip
    mesh, orders = fp.Mesh(pipe=2, data=2, seq=2), list(itertools.permutations(some))
    resolved = [resolve(fp.compose(*order)(model.step), mesh).specs for order in orders]
    assert all(records == resolved[0] for records in resolved)
    found = []
    for order in orders[::5]:
        run = fp.simulate(fp.compose(*order)(model.step), mesh)
        state, _ = run(run.init(model.init_state, model.init(1), model.batch(0)), model.batch(0))
        found.append(
            torch.cat([x.flatten() for x in torch.utils._pytree.tree_leaves(run.unplace(state))])
        )
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_rank_may_hold_no_token_that_counts() -> None:
    """Nor any token at all: 3 positions on 4 ranks."""
    model = Transformer(length=3, heads=4, kv_heads=4)
    batch = model.batch(0)
    batch["labels"][:, 1:] = -100
    step = fp.seq_all_to_all(model.step, axis="seq")
    assert_equivalent(
        model.step, step, fp.Mesh(seq=4), model.init_state, model.init(7), [batch], rtol=FLOAT64
    )


@pytest.mark.parametrize("length", [8, 10])
def test_rows_come_back_in_order(length: int) -> None:
    model = Transformer(length=length, aux=True)
    step = fp.seq_ring(model.step, axis="ring", zigzag=True)
    check(model, step, fp.Mesh(ring=2), RING)


# ---- what it costs


def planned(model: Transformer, step: Callable, mesh: fp.Mesh) -> fp.Plan:
    run = fp.simulate(step, mesh)
    return run.plan(run.init(model.init_state, model.init(1), model.batch(0)), model.batch(0))


def exchanges(plan: fp.Plan, kind: str) -> dict[str, int]:
    """How many collectives of a kind the units of one microbatch hold, by kind of unit."""
    out: dict[str, int] = {}
    for unit in plan.calls[0].units.units.values():
        found = [x for x in collectives_of(unit.code.module.graph) if x.startswith(kind)]
        out[unit.kind] = out.get(unit.kind, 0) + len(found)
    return out


@pytest.mark.parametrize("call", ["sdpa", "three", "kv", "qkv"])
def test_two_exchanges_a_layer_each_way(call: str) -> None:
    model = Transformer(heads=4, kv_heads=4, layers=2, call=call)
    plan = planned(model, fp.seq_all_to_all(model.step, axis="seq"), fp.Mesh(seq=2))
    assert exchanges(plan, "all_to_all") == {"F": 4, "B": 4}


@pytest.mark.parametrize(
    ("group", "kv", "ranks", "layers"), [(1, 1, 4, 2), (1, 2, 2, 1), (3, 1, 2, 2), (2, 2, 4, 1)]
)
def test_bytes_of_an_attention(group: int, kv: int, ranks: int, layers: int) -> None:
    """4 N h / P numbers a layer for equal heads, (2 h + 2 h_kv) N / P for fewer of keys and values;
    a P-th of them stay."""
    model = Transformer(
        length=16, rows=1, kv_heads=kv * ranks, heads=group * kv * ranks, d=2, dv=2, layers=layers
    )
    mesh = fp.Mesh(seq=ranks)
    plan = planned(model, fp.seq_all_to_all(model.step, axis="seq"), mesh)
    numbers = layers * (2 * model.heads + 2 * model.kv_heads) * model.d * model.length // ranks
    moved = 2 * 8 * numbers * (ranks - 1) // ranks  # forward and backward, float64
    summed = sum(
        2 * (ranks - 1) * 8 * x.numel() // ranks
        for x in torch.utils._pytree.tree_leaves(model.init())
    )
    assert plan.traffic[0][("seq",)] == moved + summed


def test_heads_are_repeated_only_as_far_as_needed() -> None:
    model = Transformer(length=16, rows=1, heads=8, kv_heads=2, d=2, dv=2, layers=1)
    plan = planned(model, fp.seq_all_to_all(model.step, axis="seq"), fp.Mesh(seq=4))
    numbers = (2 * 8 + 2 * 4) * 2 * 16 // 4  # every rank needs one head of keys and values
    summed = sum(2 * 3 * 8 * x.numel() // 4 for x in torch.utils._pytree.tree_leaves(model.init()))
    assert plan.traffic[0][("seq",)] == 2 * 8 * numbers * 3 // 4 + summed


@pytest.mark.parametrize(
    "transform",
    [fp.seq_all_to_all, pytest.param(fp.seq_ring, marks=pytest.mark.slow)],
    ids=["heads", "ring"],
)
def test_activations_fall_as_the_axis_grows(transform: Any) -> None:
    model = Transformer(length=256, rows=1, heads=4, kv_heads=4, d=8, dv=8, layers=2)
    need = {}
    for n in (1, 2, 4):
        plan = planned(model, transform(model.step, axis="seq"), fp.Mesh(seq=n))
        need[n] = plan.memory[0]["residuals"]
    assert need[2] <= 0.55 * need[1] and need[4] <= 0.3 * need[1], need


def test_a_ring_sends_each_block_once_around() -> None:
    model = Transformer(length=12, heads=2, kv_heads=2, layers=2)
    plan = planned(model, fp.seq_ring(model.step, axis="ring"), fp.Mesh(ring=3))
    assert exchanges(plan, "ppermute")["F"] == 2 * 2


def vocabulary_over(axis: Any, length: int) -> tuple[Transformer, Callable]:
    """A model, and a step whose loss is in chunks, with the vocabulary over an axis; embedding and
    head are one leaf."""
    model = Transformer(length=length, heads=2, layers=1)

    def loss_fn(p: Any, b: Any) -> fp.Mean:
        x = torch.nn.functional.embedding(b["tokens"], p["embed"])
        x = model._block(p["blocks"][0], x, fp.positions(b["tokens"]), b)
        return fp.losses.cross_entropy(x, p["embed"], b["labels"], axis=axis, chunk_tokens=3)

    def step(p: Any, b: Any) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(p, b)
        return optree.tree_map(lambda x, g: x - 0.1 * g, p, grads), {"loss": loss}

    return model, step


@pytest.mark.parametrize("length", [10, *[pytest.param(n, marks=pytest.mark.slow) for n in (8, 3)]])
@pytest.mark.parametrize("axis", [None, "seq"])
@pytest.mark.parametrize("sharded", [False, True])
def test_chunked_loss_and_vocabulary_over_the_sequence_axis(
    length: int, axis: str | None, sharded: bool
) -> None:
    model, step = vocabulary_over(axis, length)
    split = fp.seq_all_to_all(step, axis="seq")
    split = fp.sharded_weights(split, axis="seq") if sharded else split
    assert_equivalent(
        step, split, fp.Mesh(seq=2), lambda p: p, model.init(), [model.batch(0)], rtol=FLOAT64
    )


@pytest.mark.parametrize(
    ("length", "axis"), [(5, "data"), (8, "data"), (8, ("data", "seq")), (8, ("seq", "data"))]
)
def test_vocabulary_over_other_axes(length: int, axis: Any) -> None:
    """Ranks along "data" have equally many tokens, also where those along "seq" have not."""
    model, step = vocabulary_over(axis, length)
    split = fp.data_parallel(fp.seq_all_to_all(step, axis="seq"), axis="data")
    mesh = fp.Mesh(data=2, seq=2)
    assert_equivalent(step, split, mesh, lambda p: p, model.init(), [model.batch(0)], rtol=FLOAT64)


def test_vocabulary_over_more_axes_than_an_uneven_sequence() -> None:
    model, step = vocabulary_over(("data", "seq"), 5)
    split = fp.data_parallel(fp.seq_all_to_all(step, axis="seq"), axis="data")
    with refused(
        SequenceError, "over ('data', 'seq')", "split unevenly over ('seq',)", "or others alone"
    ):
        fp.simulate(split, fp.Mesh(data=2, seq=2)).init(lambda p: p, model.init(), model.batch(0))


# ---- what is refused


def test_options_and_dims_that_do_not_fit() -> None:
    model = Transformer()
    for transform, text in (
        (fp.seq_all_to_all, "split the sequence over"),
        (fp.seq_ring, "of the ring"),
    ):
        with refused(StackError, transform.__name__, "name the mesh axis or axes", text):
            transform(model.step, axis=())

    def start(step, mesh):
        return fp.simulate(step, mesh).init(model.init_state, model.init(), model.batch())

    with refused(
        BatchError, "seq_all_to_all: batch['labels'] of shape (2, 8) has no dim 2", "dims=..., None"
    ):
        start(
            fp.seq_all_to_all(model.step, axis="seq", dims={"tokens": 1, "labels": 2}),
            fp.Mesh(seq=2),
        )
    step = fp.seq_ring(
        fp.seq_all_to_all(model.step, axis="seq"), axis="ring", dims={"tokens": 0, "labels": 1}
    )
    with refused(BatchError, "split batch['tokens'] along dims", "give both the same dims"):
        start(step, fp.Mesh(seq=2, ring=2))


def test_ranks_of_unequal_slices_communicate_in_one_order() -> None:
    """Programs that do not are refused: here, those of two losses, of which one sums over ranks."""
    model = Transformer()

    def summed(p: Any, b: Any) -> fp.Mean:
        loss = model.loss_fn(p, b)
        return fp.Mean(loss.total + 0 * fp.psum(loss.total, "data"), loss.weight)

    programs = []
    for loss_fn in (model.loss_fn, summed):
        step = lambda p, b, f=loss_fn: (p, {"loss": fp.value_and_grad(f)(p, b)[0]})  # noqa: E731
        run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
        state = run.init(lambda p: p, model.init(), model.batch())
        programs.append(run.plan(state, model.batch()).calls[0].programs)
    check_same_order([programs[0], programs[0]])
    with refused(
        CutError,
        "slices of the sequence differ in length",
        "on rank 0 of the pipeline",
        "psum_start.default over data",
    ):
        check_same_order(programs)
