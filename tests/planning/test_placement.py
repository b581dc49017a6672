"""StatePlacement: place and unplace, owners, who counts."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from support.models import D, batch, body, count, descend, params, pipe, same_bits, start

import funcpipe as fp
from funcpipe._src.planning.placement import StatePlacement
from funcpipe._src.program.shard_shapes import extent

MESHES = [fp.Mesh(pipe=3), fp.Mesh(pipe=3, data=2), fp.Mesh(data=2, pipe=3)]


def loss(p: Any, b: Any) -> fp.Mean:
    """Three stages; "first" and "last" are tied over all of them but the middle one; "unused" by
    none."""
    x = body(p, {"x": b["x"] @ p["tied"]})
    return fp.Mean((x @ p["tied"] * p["scale"]).sum(), count(x))


def model() -> dict[str, Any]:
    return {
        **params(2),
        "tied": torch.eye(D, dtype=torch.float64),
        "scale": torch.tensor(2.0, dtype=torch.float64),
        "unused": torch.ones(3),
    }


def step(state: Any, b: Any) -> Any:
    value, grads = fp.value_and_grad(loss)(state["params"], b)
    new = descend(state["params"], grads)
    return {"params": new, "m": grads, "n": state["n"] + 1}, {
        "loss": value,
        "norm": fp.global_norm(grads),
    }


def init(p: Any) -> Any:
    return {"params": p, "m": optree.tree_map(torch.zeros_like, p), "n": 0}


def placed(mesh: fp.Mesh) -> tuple[Any, list[Any], StatePlacement]:
    stacked = pipe(step, stages="even")
    run, state = start(
        fp.data_parallel(stacked, axis="data") if "data" in mesh.axes else stacked,
        mesh,
        model(),
        init=init,
    )
    return run, state, run._placement


@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_a_leaf_lies_on_the_ranks_whose_stages_use_it(mesh: fp.Mesh) -> None:
    _, state, placement = placed(mesh)
    owners = dict(zip(placement.analysis.paths, (x.owners for x in placement.layouts), strict=True))
    assert owners == {
        "['w'][0]": (0,),
        "['w'][1]": (1,),
        "['tied']": (0, 2),
        "['scale']": (2,),
        "['unused']": (0,),
    }
    for rank, held in enumerate(state):
        place = mesh.coords(rank)["pipe"]
        for tree_ in (held["params"], held["m"]):
            leaves = placement.analysis.params_spec.flatten_up_to(tree_)
            assert [x is not None for x in leaves] == [place in x.owners for x in placement.layouts]
        assert held["n"] == 0


@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_unplace_undoes_place(mesh: fp.Mesh) -> None:
    run, state, _ = placed(mesh)
    full = init(model())
    full["m"] = optree.tree_map(lambda x: x + 7, full["m"])
    assert same_bits(run.unplace(run.place(full)), full)
    assert same_bits(run.unplace(state), init(model()))
    assert all(same_bits(a, b) for a, b in zip(run.place(init(model())), state, strict=True))


def test_ranks_own_their_memory() -> None:
    run, _, _ = placed(MESHES[1])
    full = init(model())
    state = run.place(full)
    tensors = [
        x
        for x in optree.tree_leaves([full, state, run.unplace(state)])
        if isinstance(x, torch.Tensor)
    ]
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize("mesh", MESHES, ids=repr)
def test_every_leaf_counts_once(mesh: fp.Mesh) -> None:
    _, _, placement = placed(mesh)
    for param in (*range(5), None):
        counting = [r for r in range(mesh.size) if placement.counts(r, param)]
        assert len(counting) == 1
        assert param is None or placement.holds(counting[0], param)
    for leaf in range(len(placement.analysis.state)):
        (holder,) = placement.holders(leaf)
        assert placement.present[placement.pipeline_rank(holder)][leaf]


def test_norms_and_sums_are_those_of_one_device() -> None:
    run, state, _ = placed(MESHES[1])
    state, metrics = run(state, batch())
    expected, plain = step(init(model()), batch())
    assert torch.allclose(metrics["norm"], plain["norm"], rtol=1e-12, atol=0)
    assert same_bits(run.unplace(state)["params"]["unused"], expected["params"]["unused"])


def test_extents_divide_the_elements() -> None:
    for numel in range(12):
        for parts in range(1, 6):
            ends = [extent(numel, parts, i) for i in range(parts)]
            assert [n for a, b in ends for n in range(a, b)] == list(range(numel))
            assert max(b - a for a, b in ends) == -(-numel // parts)
