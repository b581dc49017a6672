"""What `data_parallel` and `sharded_weights` refuse: stacks, options, and leaves touched other than
elementwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.sharded_steps import clipped, data, linear_batch, linear_params, pipe, sharded, start

import funcpipe as fp


def identity_step(state: Any, batch: Any) -> Any:
    return state, {}


@pytest.mark.parametrize(
    ("transforms", "text"),
    [
        (
            [fp.sharded_weights(axis="date")],
            "sharded_weights(axis='date'): axis 'date' is not in Mesh(pipe=2, data=2); its axes "
            "are 'pipe', 'data'",
        ),
        (
            [pipe, sharded, sharded],
            "sharded_weights(axis='data') and sharded_weights(axis='data') both shard over axis "
            "'data'; give each its own axis",
        ),
        (
            [pipe, data, fp.sharded_weights(axis="pipe")],
            "pipelined(axis='pipe') and sharded_weights(axis='pipe') share axis 'pipe'; the axis "
            "of a pipeline carries nothing else",
        ),
        (
            [pipe, fp.sharded_weights(axis=("data", "data"))],
            "sharded_weights(axis='data', axis='data') names an axis twice",
        ),
        (
            [sharded],
            "axis 'pipe' of Mesh(pipe=2, data=2) is used by no transform: its ranks would all "
            "compute the same; leave it out of the mesh or stack a transform on it",
        ),
    ],
)
def test_stacks_that_do_not_fit_the_mesh(transforms: list[Callable], text: str) -> None:
    with pytest.raises((fp.errors.MeshError, fp.errors.StackError)) as error:
        fp.simulate(fp.compose(*transforms)(identity_step), fp.Mesh(pipe=2, data=2))
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduce": "once"}, "sharded_weights: reduce='once'; write 'each' or 'last'"),
        ({"prefetch": -1}, "sharded_weights: prefetch is -1; it is a number of units, 0 or more"),
        (
            {"prefetch": True},
            "sharded_weights: prefetch is True; it is a number of units, 0 or more",
        ),
        (
            {"bucket_bytes": 0},
            "sharded_weights: bucket_bytes is 0; it has to be a whole number, 1 or more",
        ),
        (
            {"regather": "never"},
            "sharded_weights: regather='never'; write 'microbatch', 'step', or a number of "
            "microbatches",
        ),
        (
            {"regather": 0},
            "sharded_weights: regather=0; write 'microbatch', 'step', or a number of microbatches",
        ),
        (
            {"only": "embed"},
            "sharded_weights: only='embed'; pass a function from a parameter's path to True or "
            "False",
        ),
        (
            {"param_dtype": "bf16"},
            "sharded_weights: param_dtype='bf16'; pass a floating-point dtype such as "
            "torch.bfloat16",
        ),
        (
            {"reduce_dtype": torch.int8},
            "sharded_weights: reduce_dtype=torch.int8; pass a floating-point dtype such as "
            "torch.bfloat16",
        ),
        (
            {"axis": 3},
            "axis=3: write the name of a mesh axis, such as axis='data', or a tuple of names",
        ),
        ({"axis": ()}, "sharded_weights: axis=(); name the mesh axis or axes to shard over"),
    ],
)
def test_invalid_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(fp.errors.StackError) as error:
        fp.sharded_weights(identity_step, **{"axis": "data", **options})
    assert str(error.value) == text


def test_two_shardings_of_one_leaf_need_the_same_options() -> None:
    stack = [
        fp.sharded_weights(axis="a", prefetch=2),
        fp.sharded_weights(axis="b", only=lambda path: "w" in path),
    ]
    run = fp.simulate(fp.compose(*stack)(clipped), fp.Mesh(a=2, b=2))
    with pytest.raises(fp.errors.StackError) as error:
        run.init(start, linear_params(), linear_batch(0, [1]))
    assert str(error.value) == (
        "sharded_weights(axis='a') and sharded_weights(axis='b') both shard params['w'], one with "
        "prefetch=2, the other with prefetch=1: give both the same options, or each its own leaves "
        "(only=...)"
    )


def test_two_shardings_of_one_leaf_over_one_axis() -> None:
    stack = [
        fp.data_parallel(axis=("a", "b")),
        fp.sharded_weights(axis=("a", "b")),
        fp.sharded_weights(axis="a", only=lambda path: "w" in path),
    ]
    run = fp.simulate(fp.compose(*stack)(clipped), fp.Mesh(a=2, b=2))
    with pytest.raises(fp.errors.StackError) as error:
        run.init(start, linear_params(), linear_batch(0, [1] * 4))
    assert str(error.value) == (
        "params['w'] is sharded over axis 'a' by both sharded_weights(axis='a') and "
        "sharded_weights(axis='a', axis='b'): an axis cuts a leaf once. Give each its own leaves "
        "(only=...)"
    )


def test_a_leaf_of_no_dim_is_sharded_by_nobody() -> None:
    """It stays whole, whoever names it."""
    own = [
        fp.sharded_weights(axis="data", only=lambda path: path in ("['w']", "['scale']")),
        fp.sharded_weights(axis="data", only=lambda path: path != "['w']"),
    ]
    run = fp.simulate(fp.compose(data, *own)(clipped), fp.Mesh(data=2))
    state = run.init(start, linear_params(), linear_batch(0, [1, 1]))
    assert [tuple(params["scale"].shape) for params, _ in state] == [(), ()]


@pytest.mark.parametrize(
    ("touch", "text"),
    [
        (
            lambda p: p["w"].mean(),
            r"applies aten.mean to params\['w'\] \(or its gradient or state\) outside value_and_grad",
        ),
        (lambda p: p["w"].norm(), r"applies aten.linalg_vector_norm to params\['w'\]"),
        (lambda p: p["w"].T @ p["w"], r"applies aten.\w+ to params\['w'\]"),
        (lambda p: p["unused"].reshape(-1), r"applies aten.\w+ to params\['unused'\]"),
        (lambda p: p["w"][0], r"applies aten.\w+ to params\['w'\]"),
        (lambda p: p["w"] * p["one"], r"mixes params\['one'\] and params\['w'\] in aten.mul"),
    ],
)
def test_shards_are_touched_elementwise(touch: Callable, text: str) -> None:
    def step(state: Any, batch: Any) -> Any:
        state, metrics = clipped(state, batch)
        touch(state[0])
        return state, metrics

    run = fp.simulate(fp.compose(data, sharded)(step), fp.Mesh(data=2))
    with pytest.raises(fp.errors.StateError, match=text):
        run.init(start, linear_params(), linear_batch(0, [1, 1]))


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 1), (2, 1, 1)])
def test_a_shard_meets_no_tensor_of_another_shape(shape: tuple[int, ...]) -> None:
    """A mask of the whole leaf's shape does not fit a shard."""
    mask = torch.ones(shape, dtype=torch.float64)

    def step(state: Any, batch: Any) -> Any:
        (params, grads), metrics = clipped(state, batch)
        return ({**params, "w": params["w"] * mask}, grads), metrics

    run = fp.simulate(fp.compose(data, sharded)(step), fp.Mesh(data=2))
    with pytest.raises(fp.errors.StateError) as error:
        run.init(start, linear_params(), linear_batch(0, [1, 1]))
    assert "params['w']" in str(error.value)
