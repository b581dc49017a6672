"""The loss scale: it changes no bits, and a step whose gradients are not finite is skipped on all
ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from funcpipe.transforms import mixed_precision
from hypothesis import given
from hypothesis import strategies as st
from support.models import refused, same_bits
from support.precision import (
    CHAIN,
    DATA,
    FIRST,
    FLOAT32,
    OPTIMIZER,
    SHARDED,
    by_hand,
    close,
    ran,
    readable,
    scale_of,
    training,
)

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime.cuda_graph import update
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import StateBuffers
from funcpipe.errors import StateError
from funcpipe.testing import Model, microbatch_counts, models

# ---- the loss scale


@given(models(), microbatch_counts(2), st.integers(1, 20), st.booleans())
def test_the_scale_changes_no_bits(
    model: Model, microbatches: int, power: int, dynamic: bool
) -> None:
    """Of losses, and of gradients too while none is too small or too large."""
    step, init_state = training(model)
    params, batches = model.init(7), [model.batch(seed, 4 * microbatches) for seed in range(2)]
    stack = fp.compose(fp.pipelined(axis="pipe", microbatches=microbatches), DATA)
    mesh = fp.Mesh(pipe=2, data=2)
    plain = ran(mixed_precision(stack(step), compute="bfloat16"), mesh, init_state, params, batches)
    scale = 2.0**power
    scaled = mixed_precision(
        stack(step), compute="bfloat16", loss_scale="dynamic" if dynamic else scale
    )
    full, metrics = ran(
        scaled, mesh, init_state, params, batches, scale_of(scale) if dynamic else None
    )
    assert same_bits(full.state if dynamic else full, plain[0])
    assert all(
        torch.equal(a["loss"], b["loss"]) and torch.equal(a["norm"], b["norm"])
        for a, b in zip(metrics, plain[1], strict=True)
    )
    assert not dynamic or [m["loss_scale"].item() for m in metrics] == [scale] * 2


def test_a_scale_saves_small_gradients() -> None:
    """1e-9 is zero in float16, 1e-9 * 2**20 is not."""

    def step(w: Any, b: Any) -> Any:
        loss, grad = fp.value_and_grad(lambda p, b: (p * b).sum().float() * 1e-9)(w[0], b)
        return (w[0], grad), {"loss": loss}

    def grad(scale: float) -> torch.Tensor:
        step_ = mixed_precision(step, compute="float16", loss_scale=scale)
        return ran(
            step_, fp.Mesh(), lambda p: (p, torch.zeros_like(p)), torch.ones(2), [torch.ones(2)]
        )[0][1]

    assert torch.equal(grad(1), torch.zeros(2))
    torch.testing.assert_close(grad(2.0**20), torch.full((2,), 1e-9), rtol=2**-9, atol=0)


def dynamic_by_hand(
    model: Model,
    init_state: Callable,
    step: Callable,
    params: Any,
    batches: Sequence[Any],
    interval: int,
) -> tuple[Any, list[tuple[float, int]]]:
    """`GradScaler`'s rule with the host looking: the state, and (scale, skipped) of every step."""
    state, scale, good, skipped, told = init_state(params), FIRST, 0, 0, []
    for batch in batches:
        _, grads = by_hand(model, state["params"], batch, torch.float32, scale)
        finite = all(x.isfinite().all() for x in tree.leaves(grads))
        used = scale
        if finite:
            clipped, _ = fp.clip_by_global_norm(grads, 0.5)
            new, opt = OPTIMIZER.update(clipped, state["opt"], state["params"])
            state = {"params": new, "opt": opt, "n": state["n"] + 1}
            good += 1
            if good == interval:
                scale, good = scale * 2, 0
        else:
            scale, good, skipped = scale * 0.5, 0, skipped + 1
        told.append((used, skipped))
    return state, [*told, (scale, good)]


def spoiled(batch: Any, row: int) -> Any:
    """A batch of which a token's weight is beyond float32."""
    weight = batch["weight"].clone()
    weight[row, 0] = 1e39
    return batch | {"weight": weight}


@given(
    st.lists(st.sampled_from([None, 0, 3, 7]), min_size=1, max_size=5), st.integers(1, 3), st.booleans(),
    st.sampled_from([fp.Mesh(pipe=2, data=2), fp.Mesh(data=2), fp.Mesh(pipe=3)]),
)  # fmt: skip
def test_a_bad_step_is_skipped_everywhere(
    bad: list[int | None], interval: int, sharded: bool, mesh: fp.Mesh
) -> None:
    """One token of one microbatch of one shard is enough."""
    step, init_state = training(CHAIN)
    params = CHAIN.init(7)
    batches = [
        CHAIN.batch(k, 8) if row is None else spoiled(CHAIN.batch(k, 8), row)
        for k, row in enumerate(bad)
    ]
    stack = (
        [fp.pipelined(axis="pipe", microbatches=2)]
        if "pipe" in mesh.axes
        else [fp.accumulated(microbatches=2)]
    )
    stack += [DATA, *[SHARDED] * sharded] if "data" in mesh.axes else []
    lower = mixed_precision(compute="float32", loss_scale="dynamic", growth_interval=interval)
    # The spoiled weight is finite as written: a plan that compared the two would refuse it.
    run = fp.simulate(fp.compose(lower, *stack)(step), mesh)
    state, told = run.init(init_state, params, CHAIN.batch(9, 8)), []
    for batch, row in zip(batches, bad, strict=True):
        new, metrics = run(state, batch)
        told.append((metrics["loss_scale"].item(), metrics["skipped_steps"].item()))
        if row is not None:
            assert same_bits([s.state for s in new], [s.state for s in state])
        state = new
    full = run.unplace(state)
    assert len({(s.scale.item(), s.good_steps.item(), s.skipped.item()) for s in state}) == 1
    want, wanted = dynamic_by_hand(CHAIN, init_state, step, params, batches, interval)
    assert [*told, (full.scale.item(), full.good_steps.item())] == wanted
    close(full.state, want, FLOAT32)


def test_float16_overflows_and_recovers() -> None:
    """The scale that is too large comes down by itself; nothing but the scale changes until
    then."""
    step, init_state = training(CHAIN)
    step = mixed_precision(fp.pipelined(DATA(step), axis="pipe", microbatches=2), compute="float16")
    params, batch = CHAIN.init(7, torch.float32), CHAIN.batch(0, 8)
    run = fp.simulate(step, fp.Mesh(pipe=2, data=2))
    state = [scale_of(2.0**30)(s) for s in run.init(init_state, params, batch)]
    first, losses = state, []
    while (scale := state[0].scale.item()) == state[0].scale.item():
        before, (state, metrics) = state, run(state, batch)
        losses.append(metrics["loss"].item())
        if state[0].scale == scale:
            break
        assert same_bits([s.state for s in state], [s.state for s in first])
        assert state[0].scale == scale / 2
    assert metrics["skipped_steps"] > 5 and before[0].scale > 1
    assert len(set(losses)) == 1  # the loss never sees the scale
    assert not same_bits(state[0].state, first[0].state)
    assert all(x.isfinite().all() for x in tree.leaves(state[0].state))


def test_several_calls_skip_together() -> None:
    """A non-finite gradient of one of them, which the step itself has dealt with, skips all."""

    def step(w: Any, b: Any) -> Any:
        first, one = fp.value_and_grad(lambda p, b: (p * b).sum())(w, b)
        second, two = fp.value_and_grad(lambda p, b: (p * b * 2).sum())(w, b)
        one.nan_to_num_(0.0, 0.0, 0.0)
        return w - one - two * 0, {"loss": first + second}

    step = mixed_precision(step, compute="float16")
    run = fp.simulate(step, fp.Mesh())
    state = run.init(lambda p: p, torch.ones(2), torch.ones(2))
    state = [scale_of(1.0)(s) for s in state]
    good, _ = run(state, torch.ones(2))
    bad, metrics = run(good, torch.tensor([1.0, 1e6]))
    assert torch.equal(good[0].state, torch.zeros(2)) and torch.equal(bad[0].state, torch.zeros(2))
    assert metrics["skipped_steps"] == 1 and bad[0].scale == 0.5


@pytest.mark.parametrize("first", [2.0**127, 2.0**-149])
def test_the_scale_stays_in_range(first: float) -> None:
    """It neither grows to infinity nor shrinks to zero."""

    def step(w: Any, b: Any) -> Any:
        loss, grad = fp.value_and_grad(lambda p, b: (p * b).sum())(w, b)
        return w, {"loss": loss, "norm": fp.global_norm(grad)}

    step = mixed_precision(step, compute="float32", loss_scale="dynamic", growth_interval=1)
    batch = torch.full((2,), 1.0 if first > 1 else torch.inf)
    full, _ = ran(
        step, fp.Mesh(), lambda p: p, torch.ones(2) * 1e-3, [batch * 1e-3] * 3, scale_of(first)
    )
    assert full.scale == first


def test_checkpoints_hold_the_scale(tmp_path: Path) -> None:
    step, init_state = training(CHAIN)
    params, batches = (
        CHAIN.init(7),
        [CHAIN.batch(0, 8), spoiled(CHAIN.batch(1, 8), 3), CHAIN.batch(2, 8)],
    )
    lower = mixed_precision(compute="float32", loss_scale="dynamic")
    one = fp.simulate(lower(fp.accumulated(step, microbatches=4)), fp.Mesh())
    other = fp.simulate(
        fp.compose(lower, fp.pipelined(axis="pipe", microbatches=2), DATA, SHARDED)(step),
        fp.Mesh(pipe=2, data=2),
    )
    state = one.init(init_state, params, batches[0])
    other.init(init_state, params, batches[0])
    for batch in batches:
        state, _ = one(state, batch)
    fp.checkpoint.save(tmp_path, one, state, step=3)
    loaded, info = fp.checkpoint.load(tmp_path, other)
    full = other.unplace(loaded)
    assert info.step == 3 and same_bits(full, one.unplace(state))
    assert (full.scale, full.good_steps, full.skipped) == (FIRST / 2, 1, 1)


def test_a_captured_step_updates_the_scale_in_place() -> None:
    """On the CPU, where the step runs again in place of a replay."""
    step, init_state = training(CHAIN)
    params, batches = (
        CHAIN.init(7),
        [CHAIN.batch(0, 8), spoiled(CHAIN.batch(1, 8), 3), CHAIN.batch(2, 8)],
    )
    step = mixed_precision(
        fp.accumulated(step, microbatches=2), compute="float32", loss_scale="dynamic"
    )
    full, metrics = ran(step, fp.Mesh(), init_state, params, batches)
    run = fp.simulate(step, fp.Mesh())
    state = run.init(init_state, params, batches[0])[0]
    rank, buffers = Rank(run.plan(None, batches[0]), run._ranks.communicators[0]), StateBuffers()
    with torch.no_grad():
        for batch, told in zip(batches, metrics, strict=True):
            buffers.load(buffers.read(state))
            assert same_bits(
                readable(update(rank, buffers, batch, rank.plan.placement.free(0))), readable(told)
            )
            state = buffers.release()
    assert same_bits(state, full)


# ---- real processes


def work(ranks: int) -> tuple[Any, list[Any]]:
    torch.set_num_threads(1)
    step, init_state = training(CHAIN)
    step = fp.compose(mixed_precision(compute="float32", loss_scale="dynamic"), DATA, SHARDED)(step)
    run = fp.spmd(step, fp.Mesh(data=ranks), device="cpu", timeout=30)
    state, metrics = run.init(init_state, CHAIN.init(7), CHAIN.batch(0, 8)), []
    for batch in (CHAIN.batch(0, 8), spoiled(CHAIN.batch(1, 8), 7), CHAIN.batch(2, 8)):
        state, told = run(state, batch)
        metrics.append(told)
    full = run.unplace(state)
    assert same_bits(run.place(full), state)
    run.close()
    return full, metrics


@pytest.mark.slow
def test_processes_skip_together() -> None:
    step, init_state = training(CHAIN)
    step = fp.compose(mixed_precision(compute="float32", loss_scale="dynamic"), DATA, SHARDED)(step)
    batches = [CHAIN.batch(0, 8), spoiled(CHAIN.batch(1, 8), 7), CHAIN.batch(2, 8)]
    want = ran(step, fp.Mesh(data=2), init_state, CHAIN.init(7), batches)
    assert want[0].skipped == 1
    for full, metrics in fp.launch(work, 2, 2, timeout=120):
        assert same_bits(full, want[0]) and same_bits(readable(metrics), readable(want[1]))


# ---- what is refused


def started(step: Callable, params: Any, batch: Any, **options: Any) -> Any:
    run = fp.simulate(mixed_precision(step, **{"compute": "float16"} | options), fp.Mesh())
    return run, run.init(lambda p: p, params, batch)


def descend(w: Any, b: Any) -> Any:
    loss, grad = fp.value_and_grad(lambda p, b: (p * b).sum())(w, b)
    return w - grad, {"loss": loss}


def test_metrics_that_cannot_take_the_scale() -> None:
    def bare(w: Any, b: Any) -> Any:
        return w, descend(w, b)[1]["loss"]

    def taken(w: Any, b: Any) -> Any:
        return w, descend(w, b)[1] | {"loss_scale": 1}

    with refused(
        StateError,
        "the step returns a tensor of shape ()",
        "loss_scale and skipped_steps join them: return a dict",
    ):
        started(bare, torch.ones(2), torch.ones(2))
    with refused(StateError, "metrics['loss_scale'] is taken", "give yours another one"):
        started(taken, torch.ones(2), torch.ones(2))
    run, state = started(bare, torch.ones(2), torch.ones(2), loss_scale=8)  # nothing to report
    assert run(state, torch.ones(2))[1] == 2


def test_numbers_that_change() -> None:
    def step(state: Any, b: Any) -> Any:
        w, metrics = descend(state["w"], b)
        return {"w": w, "n": state["n"] + 1, "on": state["on"]}, metrics

    def start(n: Any, **options: Any) -> Any:
        run = fp.simulate(mixed_precision(step, compute="float16", **options), fp.Mesh())
        return run, run.init(lambda p: {"w": p, "n": n, "on": True}, torch.ones(2), torch.ones(2))

    with refused(
        StateError, "state['n'] goes from 0 to 1", "Make it a tensor, such as torch.zeros(())"
    ):
        start(0)
    for run, state in (start(torch.zeros(())), start(0, loss_scale=4)):
        assert tree.leaves(run(state, torch.ones(2))[0])[0] == 1


def test_a_state_without_its_scale() -> None:
    run, state = started(descend, torch.ones(2), torch.ones(2))
    with refused(StateError, "the state is a tensor", "it is an fp.Scaled. Pass the state that"):
        run([state[0].state], torch.ones(2))
    with refused(StateError, "place: the state has another structure than init_state made"):
        run.place({"w": torch.ones(2)})


def test_what_is_wrong_with_the_step_itself() -> None:
    """Is said as without a scale."""
    with refused(StateError, "a step returns (state, metrics); this one returned None"):
        started(lambda w, b: None, torch.ones(2), torch.ones(2))
    with refused(StateError, "the step returns a state of another structure than it takes"):
        started(lambda w, b: ({"w": descend(w, b)[0]}, {}), torch.ones(2), torch.ones(2))
