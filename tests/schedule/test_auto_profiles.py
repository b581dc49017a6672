"""``pipelined(schedule="auto")`` measures the units before it chooses, and is still equal to one
device."""

import pytest
import torch

import funcpipe as fp
from funcpipe._src.core import pytree as tree
from funcpipe._src.runtime import profile_pieces, runner
from funcpipe._src.runtime import profile_units as profile


def loss_fn(params: list[torch.Tensor], x: torch.Tensor) -> fp.Mean:
    for w in params:
        x = fp.stage_boundary(torch.tanh(x @ w))
    return fp.Mean(x.square().sum(), torch.ones_like(x[:, 0]).sum())


def step(state: list[torch.Tensor], x: torch.Tensor) -> tuple:
    loss, grads = fp.value_and_grad(loss_fn)(state, x)
    return tree.map(lambda w, g: w - 0.1 * g, state, grads), {"loss": loss}


@pytest.fixture
def params() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(6, 6, generator=g, dtype=torch.float64) for _ in range(5)]


def test_auto_measures_first(params, monkeypatch):
    seen = []
    real = runner.profile_units
    monkeypatch.setattr(runner, "profile_units", lambda *args: seen.append(real(*args)) or seen[-1])
    x = torch.randn(8, 6, dtype=torch.float64)
    fast = fp.pipelined(step, axis="pipe", microbatches=4, schedule="auto")
    fp.testing.assert_equivalent(step, fast, fp.Mesh(pipe=2), lambda p: p, params, [x, x])
    assert len(seen) == 1
    assert seen[0].of("F", 0) > 0


def test_auto_by_flops_measures_nothing(params, monkeypatch):
    monkeypatch.setattr(runner, "profile_units", lambda *args: pytest.fail("nothing to measure"))
    x = torch.randn(8, 6, dtype=torch.float64)
    fast = fp.pipelined(step, axis="pipe", microbatches=4, schedule=fp.schedules.auto())
    fp.simulate(fast, fp.Mesh(pipe=2)).init(lambda p: p, params, x)


def test_captured_units_are_timed_on_several_sets_of_tensors(params, monkeypatch):
    """No two sets of a unit share a tensor that is not of the batch, so that none is in a cache
    from the run before."""
    sets: list[set[int]] = []
    ready, make, counts = profile_pieces.Bench._ready, profile_pieces._input, []

    def remembered(*args):
        x = make(*args)
        sets[-1].update([x.data_ptr()] if args[1] is None else [])
        return x

    def timed(pieces, device, rounds):
        counts.extend(len(some) for some in pieces)
        return [1.0 for some in pieces if all(run() is None for run in some)]

    monkeypatch.setattr(profile_pieces, "_input", remembered)
    monkeypatch.setattr(
        profile_pieces.Bench, "_ready", lambda *args: sets.append(set()) or ready(*args)
    )
    monkeypatch.setattr(profile, "replayed_times", timed)
    x = torch.randn(8, 6, dtype=torch.float64)
    run = fp.simulate(fp.pipelined(step, axis="pipe", microbatches=4), fp.Mesh(pipe=2))
    state = run.init(lambda p: p, params, x)
    monkeypatch.setattr(run._backend, "captured", True)
    assert profile.profile_units(run, state, x).of("F", 0) > 0
    assert set(counts) == {profile._SETS}
    for k in range(0, len(sets), profile._SETS):
        of_a_piece = sets[k : k + profile._SETS]
        assert len({len(some) for some in of_a_piece}) == 1
        assert len(set.union(*of_a_piece)) == sum(map(len, of_a_piece))
    assert sum(map(bool, sets)) > len(sets) // 2  # the head's halves may read what is known alone
