"""Real processes: what they compute is what the simulation computes, and a failure of one is an
error of all.

The processes of a mesh size are started once; each runs every case and every check, and hands back
what it saw.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from support.worlds import in_processes

import funcpipe as fp
from funcpipe._src.core.context import tap
from funcpipe.errors import MismatchError, RankError
from funcpipe.optim import adamw, statistics
from funcpipe.testing import Layer, Model, RandomTable, assert_equivalent

# Sums over microbatches, stages and shards are taken in another order than on one device: see
# test_equivalence.py.
FLOAT64 = 1e-12
# Seconds in which every rank must have stopped when one of them fails; one second is usual.
SOON = 10.0

PLAIN = Model(tuple((Layer("linear", (k, k)), Layer("norm", (k, k))) for k in range(4)))
# A leaf in three places, the first and the last among them, a skip over two stages, masks and ids
# through boundaries.
TIED = Model(
    (
        (Layer("linear", (0, 0)),),
        (Layer("mix", (1,)), Layer("linear", (0, 1))),
        (Layer("permute", (0,)), Layer("scale", (0,))),
        (Layer("skip", (0,)), Layer("gated", (0, 2))),
    ),
    carry="tuple",
    tied_head=True,
    aux=1,
    unused=True,
    zero_rows=True,
)
OPTIMIZER = adamw(1e-2, eps=1e-3)


def training(model: Model) -> tuple[Callable, Callable]:
    def init_state(params: Any) -> dict[str, Any]:
        return {"params": params, "opt": OPTIMIZER.init(params), "n": torch.zeros(())}

    def step(state: dict[str, Any], batch: Any) -> Any:
        out, grads = fp.value_and_grad(model.loss_fn, has_aux=model.has_aux)(state["params"], batch)
        grads, norm = fp.clip_by_global_norm(grads, 0.5)
        norms = optree.tree_map(
            lambda _, n: n / 2, grads, statistics(grads).norm
        )  # of held leaves alone
        params, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
        metrics = {"loss": out, "norm": norm, "norms": norms}
        return {"params": params, "opt": opt, "n": state["n"] + 1}, metrics

    return step, init_state


def pipe(microbatches: int = 4, **options: Any) -> Callable:
    return fp.pipelined(axis="pipe", microbatches=microbatches, **options)


# ---- cases: a model, a mesh, a stack of transforms

DATA = fp.data_parallel(axis="data")
CASES: dict[str, tuple[Model, fp.Mesh, tuple[Callable, ...]]] = {
    "pipe=2": (PLAIN, fp.Mesh(pipe=2), (pipe(),)),
    "pipe=2 tied zb": (TIED, fp.Mesh(pipe=2), (pipe(schedule=fp.schedules.zb_h1()),)),
    "pipe=2 tied, two stages a rank": (
        TIED,
        fp.Mesh(pipe=2),
        (pipe(schedule=fp.schedules.interleaved_1f1b(2)),),
    ),
    "data=2 accumulated": (TIED, fp.Mesh(data=2), (DATA, fp.accumulated(microbatches=2))),
    "pipe=4 tied": (TIED, fp.Mesh(pipe=4), (pipe(),)),
    "pipe=4 random table": (TIED, fp.Mesh(pipe=4), (pipe(schedule=RandomTable(seed=5)),)),
    "pipe=2 data=2 tied": (TIED, fp.Mesh(pipe=2, data=2), (pipe(2), DATA)),
    "pipe=2 data=2 sharded": (
        TIED,
        fp.Mesh(pipe=2, data=2),
        (pipe(2), DATA, fp.sharded_weights(axis="data")),
    ),
}


def prepared(name: str) -> tuple[Callable, Callable, Callable, Any, list[Any]]:
    """Step, transformed step, init_state, params and batches; the last batch has another shape."""
    model, _, stack = CASES[name]
    step, init_state = training(model)
    return (
        step,
        fp.compose(*stack)(step),
        init_state,
        model.init(),
        [model.batch(k, n) for k, n in enumerate([8, 8, 16])],
    )


def run_case(name: str, start: Callable) -> tuple[list, list, Any, Any]:
    """Three steps. Returns (rank, loss, grads) of every ``value_and_grad``, metrics, state and full
    state."""
    _, transformed, init_state, params, batches = prepared(name)
    run = start(transformed, CASES[name][1])
    state, metrics = run.init(init_state, params, batches[0]), []
    with tap() as seen:
        for batch in batches:
            state, new = run(state, batch)
            metrics.append(new)
    calls = [(context.rank.comm.rank, *call) for context, *call in seen if hasattr(context, "rank")]
    full = run.unplace(state)
    assert equal(run.place(full), state)
    assert equal(run.unplace(run.place(full)), full)
    return calls, metrics, state, full


def spmd(step: Callable, mesh: fp.Mesh) -> Any:
    return fp.spmd(step, mesh, device="cpu", timeout=30)


def equal(a: Any, b: Any) -> bool:
    if optree.tree_structure(a) != optree.tree_structure(b):
        return False
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return optree.tree_all(optree.tree_map(same, a, b))


# ---- failures: each has a runner of its own; what is kept is the error of this rank and how long
# it took

Outcome = tuple[str, str, float]
INIT = training(PLAIN)[1], PLAIN.init(), PLAIN.batch(0, 4)


def outcome(body: Callable[[], Any]) -> Outcome:
    began = time.monotonic()
    try:
        body()
    except (fp.errors.FuncpipeError, ValueError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "no error", "", 0.0


def runner(size: int, step: Callable | None = None, **options: Any) -> Any:
    return spmd(pipe(**options)(step or training(PLAIN)[0]), fp.Mesh(pipe=size))


def is_last(size: int) -> bool:
    return dist.get_rank() == size - 1


def other_rows(size: int) -> Outcome:
    """The last rank passes a batch of more rows; then all pass the same one, and go on."""
    run = runner(size)
    state = run.init(*INIT)
    found = outcome(lambda: run(state, PLAIN.batch(0, 8 if is_last(size) else 4)))
    run(state, PLAIN.batch(0, 4))
    return found


def other_params(size: int) -> Outcome:
    run = runner(size)
    init_state, params, batch = INIT
    embed = params["embed"][: 5 if is_last(size) else None]
    return outcome(lambda: run.init(init_state, params | {"embed": embed}, batch))


def other_schedule(size: int) -> Outcome:
    run = runner(
        size, schedule=fp.schedules.gpipe() if is_last(size) else fp.schedules.one_f_one_b()
    )
    return outcome(lambda: run.init(*INIT))


def other_backend(size: int) -> Outcome:
    how: dict[str, Any] = {"backend": "inductor"} if is_last(size) else {}
    run = fp.spmd(pipe()(training(PLAIN)[0]), fp.Mesh(pipe=size), device="cpu", timeout=30, **how)
    return outcome(lambda: run.init(*INIT))


def other_precision(size: int) -> Outcome:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = not is_last(size)
    try:
        return outcome(lambda: runner(size).init(*INIT))
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def no_plan(size: int) -> Outcome:
    """The loss function of the last rank raises when it is traced."""

    def loss_fn(params: Any, batch: Any) -> Any:
        if is_last(size):
            raise ValueError("boom")
        return PLAIN.loss_fn(params, batch)

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": fp.value_and_grad(loss_fn)(state["params"], batch)[0]}

    return outcome(lambda: runner(size, step).init(*INIT))


def raises(size: int, where: str) -> Outcome:
    """The last rank's step raises: while its neighbours wait for its messages, or for its part of a
    norm."""
    inner, armed = training(PLAIN)[0], []

    def step(state: Any, batch: Any) -> Any:
        if armed and where == "before":
            raise ValueError("boom")
        state, metrics = inner(state, batch)
        if armed and where == "after":
            raise ValueError("boom")
        return state, metrics | {"size": fp.global_norm(state["params"])}

    run = runner(size, step)
    state, _ = run(run.init(*INIT), INIT[2])
    armed.extend([True] * is_last(size))
    return outcome(lambda: run(state, INIT[2]))


def donated(size: int) -> tuple[tuple[Outcome, Outcome], Outcome, bool, bool]:
    """Old states are used again, by a runner that has updated them in place and by one that has
    not."""
    run = runner(size)
    first = run.init(*INIT)
    second, _ = run(first, INIT[2])
    where = [x.data_ptr() for x in optree.tree_leaves(second["opt"].m)]
    third, _ = run(second, INIT[2])
    in_place = [x.data_ptr() for x in optree.tree_leaves(third["opt"].m)] == where
    placed = run.place(run.unplace(third))  # leaves the newest state valid
    refused = (
        outcome(lambda: run(second if is_last(size) else third, INIT[2])),
        outcome(lambda: run.unplace(second)),
    )
    run(third, INIT[2])  # and goes on
    run(placed, INIT[2])
    pure = fp.spmd(
        pipe()(training(PLAIN)[0]), fp.Mesh(pipe=size), device="cpu", timeout=30, donate=False
    )
    one, _ = pure(pure.init(*INIT), INIT[2])
    return refused, outcome(lambda: runs_alike(pure, one)), in_place, runs_alike(pure, one)


def runs_alike(run: Any, state: Any) -> bool:
    return equal(*(run(state, INIT[2]) for _ in range(2)))


def carried(size: int, start: Callable) -> Any:
    """A param travels through boundaries, as it is: what a message holds must not change when the
    step updates the param."""

    def loss_fn(p: Any, x: torch.Tensor) -> fp.Mean:
        carry = (x @ p["w"], p["w"])
        for k in range(size):
            carry = fp.stage_boundary((torch.tanh(carry[0] @ p[f"w{k}"]), carry[1]))
        return fp.Mean(
            (carry[0] @ carry[1]).square().sum(), torch.tensor(float(len(x)), dtype=x.dtype)
        )

    def step(state: Any, x: torch.Tensor) -> Any:
        loss, grads = fp.value_and_grad(loss_fn)(state[0], x)
        params, opt = OPTIMIZER.update(grads, state[1], state[0])
        return (params, opt), {"loss": loss}

    g = torch.Generator().manual_seed(3)
    new = lambda: torch.randn(3, 3, generator=g, dtype=torch.float64)  # noqa: E731
    params = {"w": new()} | {f"w{k}": new() for k in range(size)}
    run = start(pipe(2)(step), fp.Mesh(pipe=size))
    x, losses = torch.ones(4, 3, dtype=torch.float64), []
    state = run.init(lambda p: (p, OPTIMIZER.init(p)), params, x)
    for _ in range(4):
        state, metrics = run(state, x)
        losses.append(float(metrics["loss"]))
    return losses, run.unplace(state)


def other_values(size: int) -> dict[str, Outcome]:
    """The last rank has params of another seed, another learning rate, another batch, and leaves
    that drift. The runner goes on after each."""
    _, params, batch = INIT
    last, out = is_last(size), {}

    def step(state: Any, batch: Any) -> Any:
        loss, grads = fp.value_and_grad(PLAIN.loss_fn)(state, batch)
        return optree.tree_map(lambda p, g: p - rate * g, state, grads), {"loss": loss}

    rate = 0.2 if last else 0.1
    run = fp.spmd(DATA(step), fp.Mesh(data=size), device="cpu", timeout=30, check_every=2)
    out["rate"] = outcome(lambda: run.init(lambda p: p, params, batch))
    rate = 0.1
    other = params | {"embed": params["embed"] + 1e-9 * last}
    out["seed"] = outcome(lambda: run.init(lambda p: p, other, batch))
    state = run.init(lambda p: p, params, batch)
    changed = batch | {"ids": batch["ids"].roll(int(last))}
    out["batch"] = outcome(lambda: run(state, changed))
    state, _ = run(state, batch)
    state, _ = run(state, batch)
    out["same"] = outcome(lambda: run(run.place(run.unplace(state)), batch))
    state, _ = run(run.place(run.unplace(state)), batch)
    rate = 0.2 if last else 0.1  # from the fifth step on
    out["later rate"] = outcome(lambda: run(state, batch))
    rate = 0.1
    state["embed"] += 1e-9 * last
    out["drift"] = outcome(lambda: run(state, batch))
    out["placed"] = outcome(lambda: run(run.place(other), batch))
    return out


# What two processes run in the plain tier, where each case costs a plan in each.
PLAIN_CASES = ["pipe=2 tied zb", "data=2 accumulated"]


def run_cases(names: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: run_case(name, spmd) for name in names}


def work(size: int) -> dict[str, Any]:
    """What every process runs, apart from the slow cases."""
    out: dict[str, Any] = run_cases(PLAIN_CASES if size == 2 else [])
    step, transformed, *rest = prepared(f"pipe={size}" + " tied" * (size > 2))
    out["report"] = assert_equivalent(
        step, transformed, fp.Mesh(pipe=size), *rest, rtol=FLOAT64, runner=spmd
    )
    out["carried"] = carried(size, spmd)
    for check in (
        other_rows,
        other_params,
        other_schedule,
        other_backend,
        other_precision,
        no_plan,
        donated,
        other_values,
    ):
        out[check.__name__] = check(size)
    return out | {where: raises(size, where) for where in ("before", "after")}


@functools.cache
def ran(size: int) -> list[dict[str, Any]]:
    """What every one of so many ranks saw."""
    return fp.launch(work, size, size, timeout=240)


@functools.cache
def ran_slowly(size: int) -> list[dict[str, Any]]:
    """What every one of so many ranks saw in the other cases."""
    names = [
        name for name, case in CASES.items() if case[1].size == size and name not in PLAIN_CASES
    ]
    return fp.launch(run_cases, size, names, timeout=240)


def case_marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in PLAIN_CASES else [pytest.mark.slow]


SIZES = pytest.mark.parametrize(
    "size", [pytest.param(size, marks=in_processes(size)) for size in (2, 4)]
)


# ---- tests


@pytest.mark.parametrize("name", [pytest.param(name, marks=case_marks(name)) for name in CASES])
def test_processes_compute_what_the_simulation_computes(name: str) -> None:
    """Bitwise: losses, gradients, metrics and every rank's state."""
    mesh = CASES[name][1]
    calls, metrics, states, full = run_case(name, fp.simulate)
    results = ran(mesh.size) if name in PLAIN_CASES else ran_slowly(mesh.size)
    for rank, seen in enumerate(result[name] for result in results):
        assert equal(seen[0], [call for call in calls if call[0] == rank])
        assert equal(seen[1:], (metrics, states[rank], full))


@pytest.mark.parametrize("name", CASES)
def test_the_simulation_computes_what_one_device_computes(name: str) -> None:
    step, transformed, *rest = prepared(name)
    assert_equivalent(step, transformed, CASES[name][1], *rest, rtol=FLOAT64)


@SIZES
def test_assert_equivalent_in_processes(size: int) -> None:
    assert all(
        result["report"].error <= FLOAT64 and result["report"].compared for result in ran(size)
    )


def raised(outcome: Outcome) -> tuple[str, str]:
    kind, text, seconds = outcome
    assert seconds < SOON
    return kind, text


@SIZES
def test_ranks_that_do_not_agree(size: int) -> None:
    """All ranks say the same, at once."""
    last = size - 1
    for result in ran(size):
        assert raised(result["other_rows"]) == (
            MismatchError.__name__,
            f"batch['ids'] is int64[4, 3] on rank 0 and int64[8, 3] on rank {last}: every rank "
            "passes the same global batch and params",
        )
        assert raised(result["other_params"]) == (
            MismatchError.__name__,
            f"params['embed'] is float64[7, 4] on rank 0 and float64[5, 4] on rank {last}: every "
            "rank passes the same global batch and params",
        )
        kind, text = raised(result["other_backend"])
        assert (
            kind == MismatchError.__name__
            and "backend='eager'" in text
            and "backend='inductor'" in text
        )
        assert "all ranks run the same calls in the same order" in text
        kind, text = raised(result["other_precision"])
        assert (
            kind == MismatchError.__name__
            and "in the precision of products" in text
            and "bfloat16 False" in text
        )
        kind, text = raised(result["other_schedule"])
        assert kind == MismatchError.__name__
        assert text.startswith(
            f"rank {last} has planned another program than rank 0 for the same shapes"
        )
        assert "in the schedule of value_and_grad 0" in text


@SIZES
def test_ranks_whose_values_differ(size: int) -> None:
    """All ranks name the leaf, and the rank that differs from most."""
    others = "rank 0" if size == 2 else "ranks 0, 1 and 2"
    here = f"is not the same on rank {size - 1} as on {others}: "
    for result in ran(size):
        found = {name: raised(one) for name, one in result["other_values"].items()}
        assert found.pop("same") == ("no error", "")
        assert {kind for kind, _ in found.values()} == {"MismatchError"}
        for name in ("rate", "later rate"):
            text = found[name][1]
            assert (
                text.startswith("the step at test_spmd.py:")
                and f", 0.2)` on rank {size - 1}" in text
            )
            assert ", 0.1)` on rank 0" in text and "the same learning rate" in text
        assert found["seed"][1].startswith(f"params['embed'] {here}")
        assert found["batch"][1].startswith(f"batch['ids'] {here}")
        assert found["drift"][1].startswith(f"state['embed'] {here}")
        assert found["placed"][1].startswith(f"state['embed'] {here}")


@SIZES
def test_old_states(size: int) -> None:
    for rank, result in enumerate(ran(size)):
        (by_one, by_all), kept, in_place, alike = result["donated"]
        kind, text = raised(by_all)
        assert (
            kind == "StateError"
            and "was given to an earlier step, which has updated it in place" in text
        )
        if rank == size - 1:
            assert raised(by_one) == (kind, text)
        else:
            assert raised(by_one)[0] == "MismatchError"
            assert (
                f"rank {size - 1} cannot use the state that it was given: state"
                in raised(by_one)[1]
            )
        assert in_place and alike and raised(kept) == ("no error", "")


@SIZES
def test_a_param_that_travels_and_is_updated_in_place(size: int) -> None:
    want = carried(size, fp.simulate)
    assert all(equal(result["carried"], want) for result in ran(size))


@pytest.mark.parametrize("where", ["before", "after", "no_plan"])
@SIZES
def test_a_rank_that_raises(size: int, where: str) -> None:
    """It raises its own error; all others one that names it."""
    *others, last = [raised(result[where]) for result in ran(size)]
    assert last == ("ValueError", "boom")
    assert others == [(RankError.__name__, f"rank {size - 1} failed: ValueError: boom")] * (
        size - 1
    )
