"""Ranks that hold, are given or compute other values than the rest: the leaf, the op and the ranks
are named.

Ranks are threads of this process; test_spmd.py has a sample in processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
import pytest
import torch

import funcpipe as fp
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.planning.lazy_init import LazyParams
from funcpipe._src.runtime import replicas
from funcpipe._src.runtime.mismatch_text import other_step
from funcpipe._src.runtime.replica_watch import BATCH, STATE, Watch
from funcpipe.errors import MismatchError, StackError
from funcpipe.optim import adamw, warmup_cosine

MESH = fp.Mesh(pipe=2, data=2)
OPTIMIZER = adamw(0.1, eps=1e-3)
X = torch.arange(12.0, dtype=torch.float64).view(4, 3)
STACKS = {
    "replicated": [fp.pipelined(axis="pipe", microbatches=2), fp.data_parallel(axis="data")],
    "sharded": [
        fp.pipelined(axis="pipe", microbatches=2),
        fp.data_parallel(axis="data"),
        fp.sharded_weights(axis="data"),
    ],
}


def params() -> dict[str, Any]:
    """``tied`` is held by both stages."""
    eye = torch.eye(3, dtype=torch.float64)
    return {"first": eye.clone(), "last": eye * 2, "tied": eye * 3}


def loss_fn(p: dict[str, Any], x: torch.Tensor) -> fp.Mean:
    x = fp.stage_boundary((x @ p["first"] @ p["tied"]).tanh())
    return fp.Mean(
        (x @ p["last"] @ p["tied"]).square().sum(), torch.tensor(float(len(x)), dtype=x.dtype)
    )


def step(state: Any, x: torch.Tensor) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(state["params"], x)
    new, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
    return {"params": new, "opt": opt, "n": state["n"] + 1, "text": state["text"]}, {"loss": loss}


def start(p: Any) -> dict[str, Any]:
    return {"params": p, "opt": OPTIMIZER.init(p), "n": torch.zeros(()), "text": "a"}


def made(name: str) -> tuple[Any, list[Any]]:
    run = fp.simulate(fp.compose(*STACKS[name])(step), MESH)
    return run, run.init(start, params(), X)


def told(run: Any, states: list[Any]) -> str | None:
    held = [replicas.of_state(s, run._placement, r) for r, s in enumerate(states)]
    try:
        replicas.check(held, {"state": run._placement.analysis.state_paths}, False)
    except MismatchError as error:
        return str(error)
    return None


# ---- states


@pytest.mark.parametrize("name", STACKS)
def test_equal_replicas_are_equal_before_and_after_steps(name: str) -> None:
    run, states = made(name)
    for _ in range(2):
        states, _ = run(states, X)
        assert told(run, states) is None


@pytest.mark.parametrize("name", STACKS)
def test_sets_are_those_of_the_ranks_that_hold_the_same(name: str) -> None:
    run, states = made(name)
    place = run._placement
    for j, path in enumerate(place.analysis.state_paths):
        held = {r: place.held_as(r, j) for r in range(4) if place.copies(r, j)}
        for r, how in held.items():
            same = [q for q in held if held[q] == how]
            assert place.copies(r, j) == len(same)
            leaves = [place.state_leaves(states[q], "")[j] for q in same]
            assert all(
                torch.equal(x, leaves[0]) if torch.is_tensor(x) else x == leaves[0] for x in leaves
            ), path


@pytest.mark.parametrize(
    "name, rank, leaf, odd, rest",
    [
        ("replicated", 1, "first", "rank 1", "rank 0"),  # ranks 2 and 3 do not hold it
        (
            "replicated",
            2,
            "last",
            "rank 3",
            "rank 2",
        ),  # of two equally large parties the lowest rank's is right
        ("replicated", 2, "tied", "rank 2", "ranks 0, 1 and 3"),
        ("sharded", 3, "tied", "rank 3", "rank 1"),  # the second shard
    ],
)
def test_a_leaf_of_one_rank_that_differs(
    name: str, rank: int, leaf: str, odd: str, rest: str
) -> None:
    run, states = made(name)
    states[rank]["params"][leaf].view(-1)[-1] += 1e-12
    text = told(run, states)
    assert text is not None
    assert text.startswith(
        f"state['params']['{leaf}'] is not the same on {odd} as on {rest}: copies of a leaf have "
        "to be"
    )


@pytest.mark.parametrize("leaf", ["first", "last"])
def test_a_shard_that_no_other_rank_holds_is_not_read(leaf: str) -> None:
    run, states = made("sharded")
    states[1 if leaf == "first" else 3]["params"][leaf] += 1
    assert told(run, states) is None


def test_several_leaves_zero_dims_and_what_is_no_tensor() -> None:
    run, states = made("replicated")
    states[3]["n"] += 1
    states[3]["text"] = "b"
    text = told(run, states)
    assert text is not None
    assert text.startswith(
        "state['n'] (and 1 more leaf) is not the same on rank 3 as on ranks 0, 1 and 2: "
    )


def test_an_init_state_that_differs_between_ranks() -> None:
    run = fp.simulate(fp.compose(*STACKS["replicated"])(step), MESH)
    with pytest.raises(
        MismatchError, match=r"state\['n'\] is not the same on ranks 1, 2 and 3 as on rank 0:"
    ):
        run.init(lambda p: start(p) | {"n": torch.rand(())}, params(), X)


@pytest.mark.parametrize("every", [0, True, 2.0, "2"])
def test_how_often_to_compare(every: Any) -> None:
    with pytest.raises(
        StackError, match=f"check_every={every!r}; give a number of steps, 1 or more"
    ):
        fp.spmd(fp.compose(*STACKS["replicated"])(step), MESH, check_every=every)


# ---- what ranks are given


def watched(body: Any, local: bool = False) -> list[str]:
    """What every rank says, whose ``body`` gets its `Watch` and number."""
    run, states = made("replicated")
    resolved = replace(run._resolved, local=local)

    def rank(comm: Any) -> str:
        try:
            body(Watch(comm, resolved, 2), comm.rank, states[comm.rank], run._planner)
        except MismatchError as error:
            return str(error)
        return "nothing"

    return run_ranks(MESH, rank)


def test_params_that_differ() -> None:
    def body(watch: Watch, rank: int, *_: Any) -> None:
        given = params()
        given["tied"] += rank == 2
        given["first"] += rank in (0, 2)
        watch.given(given, replicas.checksums(optree.tree_leaves(given)), X)

    for text in watched(body):
        assert text.startswith(
            "params['first'] (and 1 more leaf) is not the same on ranks 1 and 3 as on ranks 0 and "
            "2: every rank passes run.init the same params. Draw them from one seed"
        )


def test_a_batch_that_differs() -> None:
    def body(watch: Watch, rank: int, *_: Any) -> None:
        watch.given({}, [], {"x": X + (rank == 3), "n": torch.ones(())})

    for text in watched(body):
        assert text.startswith(
            "batch['x'] is not the same on rank 3 as on ranks 0, 1 and 2: every rank passes the "
            "same global"
        )
        assert "batch='local'" in text


def test_what_is_due_before_which_step() -> None:
    """The batch before the first step; all before every second one."""
    due: list[int] = []

    def body(watch: Watch, rank: int, state: Any, planner: Any) -> None:
        watch.made(state, planner.placement)
        for _ in range(5):
            due.extend([watch.due] * (rank == 0))
            watch.before_step(state, X, planner)

    assert watched(body) == ["nothing"] * 4
    assert due == [BATCH, 0, 7, 0, 7]


def test_a_state_that_drifts_is_found_at_the_next_comparison() -> None:
    def body(watch: Watch, rank: int, state: Any, planner: Any) -> None:
        watch.due = STATE
        if rank == 3:
            state["opt"].m["last"] += 1
        watch.before_step(state, X, planner)

    for text in watched(body):
        assert text.startswith("state['opt'].m['last'] is not the same on rank 3 as on rank 2:")


def test_rows_of_a_rank() -> None:
    """Ranks of one pipeline bring the same rows; what has no rows is the same on all."""

    def rows(watch: Watch, rank: int, *_: Any) -> None:
        watch.given({}, [], {"x": X + rank % 2, "n": torch.ones(())})

    def other_rows(watch: Watch, rank: int, *_: Any) -> None:
        watch.given({}, [], {"x": X + rank, "n": torch.ones(())})

    def other_number(watch: Watch, rank: int, *_: Any) -> None:
        watch.given({}, [], {"x": X, "n": torch.ones(()) + (rank == 1)})

    assert watched(rows, local=True) == ["nothing"] * 4
    told = (
        "batch['x'] is not the same on rank 2 as on rank 0: ranks of one pipeline or one sequence "
        "pass the same rows"
    )
    assert all(text.startswith(told) for text in watched(other_rows, local=True))
    told = "batch['n'] is not the same on rank 1 as on ranks 0, 2 and 3: "
    assert all(text.startswith(told) for text in watched(other_number, local=True))


# ---- params from a key


def lazy(seed: int = 0, scale: float = 1.0, table: float = 0.5) -> list[int]:
    def params_fn(key: torch.Tensor) -> Any:
        a = fp.random.normal(fp.random.fold_in(key, "a"), (3,)) * scale
        return {"a": a, "b": a + 1, "c": torch.ones(2) * torch.tensor(table), "d": torch.zeros(1)}

    return LazyParams(params_fn, fp.random.key(seed)).digests()


@pytest.mark.parametrize(
    "options, leaves",
    [({}, ""), ({"seed": 1}, "ab"), ({"scale": 2.0}, "ab"), ({"table": 0.25}, "c")],
)
def test_params_from_a_key_are_told_apart_by_what_makes_them(
    options: dict[str, Any], leaves: str
) -> None:
    pairs = zip("abcd", lazy(), lazy(**options), strict=True)
    assert "".join(name for name, a, b in pairs if a != b) == leaves


# ---- what a step computes outside value_and_grad


def ops(update: Any, start: Any = lambda p: p) -> Any:
    """What a runner notes of a step with this update."""

    def step(state: Any, x: torch.Tensor) -> Any:
        p = state.get("params", state)
        loss, grads = fp.value_and_grad(loss_fn)(p, x)
        return update(state, grads), {"loss": loss}

    run = fp.simulate(fp.data_parallel(step, axis="data"), fp.Mesh(data=2))
    run.init(start, params(), X)
    return run._planner.outside(X)


def descend(rate: Any) -> Any:
    return lambda p, grads: optree.tree_map(lambda w, g: w - rate * g, p, grads)


def with_adamw(**options: Any) -> tuple[Any, Any]:
    optimizer = adamw(**options)

    def update(state: Any, grads: Any) -> Any:
        new, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": new, "opt": opt}

    return update, lambda p: {"params": p, "opt": optimizer.init(p)}


@pytest.mark.parametrize(
    "first, other",
    [
        ((descend(0.1),), (descend(0.2),)),
        ((descend(torch.tensor(0.1)),), (descend(torch.tensor(0.2)),)),
        (with_adamw(lr=0.1), with_adamw(lr=0.2)),
        (with_adamw(lr=0.1, betas=(0.8, 0.9)), with_adamw(lr=0.1, betas=(0.8, 0.95))),
        (with_adamw(lr=warmup_cosine(0.1, 5, 9)), with_adamw(lr=warmup_cosine(0.1, 6, 9))),
    ],
)
def test_another_python_value_of_an_update_is_another_op(first: Any, other: Any) -> None:
    mine, again, theirs = ops(*first), ops(*first), ops(*other)
    assert mine == again
    text = other_step(mine, theirs, 0, [1])
    assert (
        text.startswith("the step at test_replicas.py:")
        and " on rank 0 and " in text
        and " on rank 1, outside " in text
    )


def test_the_text_has_both_values_and_the_line() -> None:
    text = other_step(ops(descend(0.1)), ops(descend(0.2)), 2, [0, 1])
    assert (
        "`return lambda p, grads: optree.tree_map(lambda w, g: w - rate * g, p, grads)` computes "
        in text
    )
    assert (
        "`aten.mul.Tensor(params['first'], 0.1)` on rank 2 and `aten.mul.Tensor(params['first'], "
        "0.2)` on ranks 0 and 1" in text
    )


def test_the_order_of_leaves_and_values_that_no_op_takes_do_not_matter() -> None:
    def in_order(names: str, printed: int) -> Any:
        return lambda p, grads: (
            {k: p[k] - 0.1 * grads[k] for k in names.split()} if printed >= 0 else p
        )

    texts = [
        [op for op, _ in ops(in_order(*x))]
        for x in [("first last tied", 0), ("tied first last", 1)]
    ]
    assert texts[0] == texts[1]


def test_ops_of_others_are_left_out_and_those_that_make_results_are_not() -> None:
    def update(number: float) -> Any:
        def of(p: Any, grads: Any) -> Any:
            torch.empty(1).add_(number)  # as of an object that is collected meanwhile
            rate = torch.zeros(()).add_(0.1)
            return optree.tree_map(lambda w, g: w - rate * g, p, grads)

        return of

    assert [op for op, _ in ops(update(1.0))] == [op for op, _ in ops(update(2.0))]
    assert "aten.add_.Tensor(float32[], 0.1)" in [op for op, _ in ops(update(1.0))]
