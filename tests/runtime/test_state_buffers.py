"""Steps that take over the memory of their state: as a CUDA graph does, whose step runs again here
where it would be replayed on a GPU, and as other steps do, one at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import DonationAnalysis, Overwritable, memory, writable
from funcpipe._src.core.context import PlainContext, bind_context
from funcpipe._src.runtime.cuda_graph import update
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.state_buffers import DonatedStep, Given, StateBuffers
from funcpipe.errors import StateError

ADAMW = fp.optim.adamw(1e-2, eps=1e-3)


class State(NamedTuple):
    params: Any
    opt: Any
    more: Any = None


class Steps:
    """Steps on one rank, with their home."""

    def __init__(self, step: Callable, init_state: Callable, params: Any, batch: Any) -> None:
        run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
        self.first = StateBuffers.give(run.init(init_state, params, batch)[0])
        self.rank = Rank(run.plan(None, batch), run._ranks.communicators[0])
        self.home = StateBuffers()
        self.free = self.rank.plan.placement.free(0)

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return self.run(self.home.read(state), batch)

    def run(self, given: Given, batch: Any) -> tuple[Any, Any]:
        raise NotImplementedError


class Again(Steps):
    """A captured step whose replay runs the step again."""

    def run(self, given: Given, batch: Any) -> tuple[Any, Any]:
        self.home.enter(given)
        with self.home.kept():
            metrics = tree.map(torch.clone, update(self.rank, self.home, batch, self.free))
        return self.home.leave(), metrics


class Moving(Steps):
    """A step that is not captured."""

    def run(self, given: Given, batch: Any) -> tuple[Any, Any]:
        return DonatedStep(self.rank, self.home)(given, batch)


def params() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {"a": new(3, 4), "b": new(4), "c": new(4, 2)}


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_fn(p: Any, x: torch.Tensor) -> fp.Mean:
    y = torch.tanh(x @ p["a"] + p["b"]) @ p["c"]
    return fp.Mean(y.square().sum(), torch.tensor(float(len(x)), dtype=torch.float64))


def descend(state: State, x: torch.Tensor) -> tuple[Any, Any, torch.Tensor]:
    loss, grads = fp.value_and_grad(loss_fn)(state.params, x)
    return *ADAMW.update(grads, state.opt, state.params), loss


def plain(state: State, x: torch.Tensor) -> tuple[State, dict]:
    p, opt, loss = descend(state, x)
    return State(p, opt), {"loss": loss}


def drifting(state: State, x: torch.Tensor) -> tuple[State, dict]:
    """Reads one old param after the update."""
    p, opt, loss = descend(state, x)
    moved = {k: v - state.params[k] if k == "a" else v for k, v in p.items()}
    return State(p, opt), {"loss": loss, "drift": fp.global_norm(moved)}


def keeping(state: State, x: torch.Tensor) -> tuple[State, dict]:
    """Returns the old params."""
    p, opt, loss = descend(state, x)
    return State(p, opt, state.params), {"loss": loss}


def twice(state: State, x: torch.Tensor) -> tuple[State, dict]:
    """Differentiates again, at the old params."""
    p, opt, loss = descend(state, x)
    again, _ = fp.value_and_grad(loss_fn)(state.params, x)
    return State(p, opt), {"loss": loss, "again": again}


def swapping(state: State, x: torch.Tensor) -> tuple[State, dict]:
    """Two leaves change places."""
    p, opt, loss = descend(state, x)
    return State(p, opt, tuple(reversed(state.more))), {"loss": loss}


def init_state(p: Any) -> State:
    return State(p, ADAMW.init(p))


def with_old(p: Any) -> State:
    return State(p, ADAMW.init(p), tree.map(torch.clone, p))


def with_pair(p: Any) -> State:
    return State(p, ADAMW.init(p), (torch.zeros(2), torch.ones(2)))


STEPS = {
    "plain": (plain, init_state, 9),
    "drifting": (drifting, init_state, 8),
    "keeping": (keeping, with_old, 6),
    "twice": (twice, init_state, 6),
    "swapping": (swapping, with_pair, 9),
}


@pytest.mark.parametrize("kind", [Again, Moving])
@pytest.mark.parametrize("name", STEPS)
def test_donating_steps_are_the_pure_ones(name: str, kind: type) -> None:
    step, init, donated = STEPS[name]
    steps, state = kind(step, init, params(), batch()), init(params())
    mine = steps.first
    for seed in range(4):
        state, want = fp.accumulated(step, microbatches=2)(state, batch(seed))
        mine, metrics = steps(mine, batch(seed))
        for a, b in zip(tree.leaves((mine, metrics)), tree.leaves((state, want)), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert len(steps.free) == donated  # of 3 params and 6 moments


def where(state: Any) -> list[int]:
    return [x.data_ptr() for x in tree.leaves((state.params, state.opt.m, state.opt.v))]


@pytest.mark.parametrize("kind", [Again, Moving])
def test_memory_stays_where_it_is(kind: type) -> None:
    steps = kind(plain, init_state, params(), batch())
    state, before = steps.first, where(steps.first)
    for _ in range(3):
        state, _ = steps(state, batch())
        assert where(state) == before


def test_a_name_that_is_turned_or_emptied_names_nothing_else_later() -> None:
    """What a user does to a leaf that a step returned does not show in the leaves of later
    steps."""
    steps, want = Again(plain, init_state, params(), batch()), init_state(params())
    state = steps.first
    for k in range(5):
        want, _ = fp.accumulated(plain, microbatches=2)(want, batch())
        state, _ = steps(state, batch())
        for a, b in zip(tree.leaves(state), tree.leaves(want), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        if k == 0:
            state.params["b"].requires_grad_()
            state.params["c"].t_()
            state.params["a"].data = torch.zeros(3, 4, dtype=torch.float64)


def test_a_state_that_was_taken_apart_and_put_together_is_the_last_one() -> None:
    """Whatever it is made of, as long as the same leaves are where they were; elsewhere they are
    copied."""
    steps, want = Again(plain, init_state, params(), batch()), init_state(params())
    state, _ = steps(steps.first, batch())
    assert steps.home.read(State(dict(reversed(state.params.items())), state.opt)).last
    assert not steps.home.read(
        state._replace(params=state.params | {"a": state.params["a"].clone()})
    ).last
    with pytest.raises(StateError, match="another structure than when the step was captured"):
        steps(state._replace(more=torch.ones(2)), batch())
    for _ in range(2):
        want, _ = fp.accumulated(plain, microbatches=2)(want, batch())
    state, _ = steps(state, batch())
    assert torch.allclose(state.params["a"], want.params["a"], rtol=1e-12, atol=1e-12)


def test_what_the_runner_did_not_make_is_left_alone_where_the_home_moves() -> None:
    moving = Moving(plain, init_state, params(), batch())
    state, _ = moving(moving.first, batch())
    mine = params()
    kept = tree.map(torch.clone, mine)
    third, _ = moving(state._replace(params=mine), batch())
    assert all(map(torch.equal, mine.values(), kept.values()))
    assert third.opt.m["a"].data_ptr() == state.opt.m["a"].data_ptr()
    moving(third, batch())
    assert all(map(torch.equal, mine.values(), kept.values()))


def test_leaves_that_share_memory_are_not_donated_where_the_home_moves() -> None:
    def copying(state: State, x: torch.Tensor) -> tuple[State, dict]:
        """Keeps the new params twice."""
        p, opt, loss = descend(state, x)
        return State(p, opt, p), {"loss": loss}

    moving, state = Moving(copying, lambda p: State(p, ADAMW.init(p), p), params(), batch()), None
    mine, state = moving.first, State(params(), ADAMW.init(params()), params())
    for seed in range(4):
        state, _ = fp.accumulated(copying, microbatches=2)(state, batch(seed))
        mine, _ = moving(mine, batch(seed))
        for a, b in zip(tree.leaves(mine), tree.leaves(state), strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


# ---- old states


OLD = (
    r"state\.params\['a'\] was given to an earlier step, which has updated it in place, or is a view.*Pass the state that the last "
    r"step returned; clone what you want to keep.*donate=False"
)


def test_an_old_state_is_refused() -> None:
    again = Again(plain, init_state, params(), batch())
    first = again.first
    second, _ = again(first, batch())
    third, _ = again(second, batch())
    for old in (first, second, third._replace(params=first.params)):
        with pytest.raises(StateError, match=OLD):
            again(old, batch())
    again(third, batch())


def test_an_old_state_is_refused_where_the_home_moves() -> None:
    moving = Moving(plain, init_state, params(), batch())
    second, _ = moving(moving.first, batch())
    third, _ = moving(second, batch())
    fourth, _ = moving(third, batch())
    views = fourth._replace(params=tree.map(torch.detach, third.params))
    mixed = fourth._replace(params=second.params), fourth._replace(params=third.params)
    for old in (moving.first, second, third, *mixed, views):
        with pytest.raises(StateError, match=OLD):
            moving(old, batch())
        with pytest.raises(StateError, match=OLD):
            moving.home.read(old)
    other = StateBuffers.give(init_state(params()))  # as after a checkpoint was loaded
    moving(moving(other, batch())[0], batch())
    with pytest.raises(StateError, match=OLD):
        moving(second, batch())
    moving(fourth, batch())


def test_a_state_of_another_structure_is_refused_where_the_home_moves() -> None:
    moving = Moving(plain, init_state, params(), batch())
    with pytest.raises(
        StateError, match="step: the state has another structure than init_state made"
    ):
        moving(State(moving.first.params, ()), batch())
    moving(moving.first, batch())


def test_only_names_are_kept_where_the_home_moves() -> None:
    """So that there is memory for another state, such as one of a checkpoint, when the user lets go
    of this one."""
    moving = Moving(plain, init_state, params(), batch())
    state, _ = moving(moving.first, batch())
    moving.first, held = None, [weakref.ref(x) for x in tree.leaves(state)]
    del state
    assert not any(ref() is not None for ref in held)


def test_a_state_lives_on_where_the_step_fails() -> None:
    moving = Moving(plain, init_state, params(), batch())
    state, _ = moving(moving.first, batch())
    with pytest.raises(StateError, match="other shapes"):
        moving(state, batch()[:2])
    moving(state, batch())


def test_an_old_state_is_refused_where_it_is_only_read() -> None:
    home = StateBuffers()
    home.read({"x": torch.ones(2)})  # nothing was captured
    home.enter(home.read({"x": torch.ones(2)}))
    first = home.leave()
    home.read(first)
    home.leave()
    with pytest.raises(StateError, match="updated it in place"):
        home.read(first)


def test_names_that_are_made_ahead_of_a_step() -> None:
    home = StateBuffers()
    home.make_next()  # nothing was captured
    home.enter(home.read({"x": torch.ones(2)}))
    first = home.leave()
    home.make_next()
    home.read(first)  # no step has run since
    home.leaves[0].add_(1)
    second = home.leave()
    assert second["x"].tolist() == [2, 2]
    home.read(second)
    with pytest.raises(StateError, match="updated it in place"):
        home.read(first)


@given(replaced=st.sets(st.sampled_from(["a", "b", "c"])))
def test_new_leaves_are_taken_in(replaced: set[str]) -> None:
    home = StateBuffers()
    home.enter(home.read({k: v.clone() for k, v in params().items()}))
    state = home.leave()
    new = {k: torch.full_like(v, 7.0) if k in replaced else v for k, v in state.items()}
    home.enter(home.read(new))
    for k, v in home.state.items():
        assert torch.equal(v, torch.full_like(v, 7.0) if k in replaced else params()[k])


def test_leaves_that_change_places_between_steps() -> None:
    home = StateBuffers()
    home.enter(home.read([torch.zeros(2), torch.ones(2)]))
    a, b = home.leave()
    home.enter(home.read([b, a]))
    assert [x.tolist() for x in home.state] == [[1, 1], [0, 0]]


def test_a_tensor_that_a_state_holds_twice() -> None:
    home, x = StateBuffers(), torch.ones(2)
    home.enter(home.read({"params": x, "ema": x, "wide": torch.ones(1).expand(3)}))
    assert len({memory(x) for x in home.leaves}) == 3
    home.leaves[2].add_(1)
    assert home.state["ema"].tolist() == [1, 1]


def test_another_structure_is_refused() -> None:
    home = StateBuffers()
    home.enter(home.read({"x": torch.ones(2)}))
    home.leave()
    with pytest.raises(StateError, match="another structure than when the step was captured"):
        home.enter(home.read({"y": torch.ones(2)}))
    with pytest.raises(
        StateError,
        match=r"state\['x'\] is a tensor of shape \(3,\).*captured with a tensor of shape \(2,\)",
    ):
        home.enter(home.read({"x": torch.ones(3)}))
    with pytest.raises(StateError, match=r"state\['x'\] is a float"):
        home.enter(home.read({"x": 1.0}))


# ---- which leaves are overwritable


def test_outside_a_runner_a_copy() -> None:
    x = torch.ones(2)
    assert writable(x) is not x
    assert torch.equal(writable(x), x)


def test_only_the_state_is_donated() -> None:
    mine, other, empty = torch.ones(2), torch.ones(2), torch.ones(0)
    context = PlainContext()
    context.donation = analysis = DonationAnalysis([other, mine, empty])
    with bind_context(context), analysis.watch():
        assert writable(mine) is not mine and writable(empty) is not empty
        writable(torch.ones(2))
    assert analysis.overwritable == {1, 2}
    context = PlainContext()
    context.overwritable = Overwritable([mine])
    with bind_context(context):
        assert writable(mine) is mine and writable(other) is not other
    assert writable(mine) is not mine


def test_a_view_from_before_is_read() -> None:
    x = torch.ones(2, 3)
    old, context = x.t(), PlainContext()
    context.donation = analysis = DonationAnalysis([x])
    with bind_context(context), analysis.watch():
        writable(x)
        old.sum()
    assert not analysis.overwritable


def test_what_is_marked_twice_is_read() -> None:
    x, context = torch.ones(4), PlainContext()
    context.donation = analysis = DonationAnalysis([x])
    with bind_context(context), analysis.watch():
        writable(x[:2])
        writable(x[2:])
    assert not analysis.overwritable


# ---- steps that fail half-way


class Broken(BaseException):
    """As Ctrl-C is."""


def two_optimizers(fail: Callable[[], None]) -> Callable:
    """A step that may fail before, between or after its optimizers."""

    def step(state: State, x: torch.Tensor) -> tuple[State, dict]:
        loss, grads = fp.value_and_grad(loss_fn)(state.params, x)
        fail()
        a, opt = ADAMW.update({"a": grads["a"]}, state.opt, {"a": state.params["a"]})
        fail()
        rest = [name for name in state.params if name != "a"]
        b, more = ADAMW.update(
            {k: grads[k] for k in rest}, state.more, {k: state.params[k] for k in rest}
        )
        fail()
        return State({**a, **b}, opt, more), {"loss": loss}

    return step


def init_two(p: Any) -> State:
    return State(p, ADAMW.init({"a": p["a"]}), ADAMW.init({k: v for k, v in p.items() if k != "a"}))


class Failing:
    """Fails at a call with a number, counted from 0; never before it is set."""

    left = 0

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken

    def arm(self, at: int) -> None:
        self.left = at + 1


@pytest.mark.parametrize("kind", [Moving, Again])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_half_a_state_is_refused(kind: type[Steps], at: int) -> None:
    """By the same runner and by a new one, also as params and as a single-device state. What was
    not written to stays; a home whose leaves stay where they are does not know, once a step has
    been run."""
    fail = Failing()
    steps = kind(two_optimizers(fail), init_two, params(), batch())
    state, _ = steps(steps.first, batch())
    before = tree.map(torch.clone, state)
    fail.arm(at)
    with pytest.raises(Broken):
        steps(state, batch())
    kept = all(map(torch.equal, tree.leaves(state), tree.leaves(before)))
    assert kept == (at == 0)
    kept &= kind is Moving
    other = kind(two_optimizers(fail), init_two, params(), batch())
    for again in (steps, other):
        if kept:
            assert again.home.read(state) is not None
            continue
        with pytest.raises(StateError, match=OLD + "|used up"):
            again(state, batch())
    if not kept:
        run = fp.simulate(fp.accumulated(two_optimizers(fail), microbatches=2), fp.Mesh())
        run.init(init_two, params(), batch())
        for use in (
            lambda: run([state], batch()),
            lambda: run.place(state),
            lambda: run.unplace([state]),
        ):
            with pytest.raises(
                StateError,
                match=r"state.*\.params\['a'\] .* is used up \(half, if that step failed\)",
            ):
                use()
        with pytest.raises(StateError, match=r"params\['a'\] .* is used up"):
            run.init(init_two, state.params, batch())
    steps(state if kept else StateBuffers.give(init_two(params())), batch())
