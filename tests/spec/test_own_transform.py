"""A transform that asks for what stages understand is one file: these two stand in this one."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import optree
import pytest
import torch
from torch.overrides import TorchFunctionMode

import funcpipe as fp
from funcpipe.errors import StackError
from funcpipe.extend import MicrobatchSplit, TransformSpec, WeightSharding, with_spec


class _Replacing(TorchFunctionMode):
    """Calls of one function become calls of another."""

    def __init__(self, old: Callable, new: Callable) -> None:
        super().__init__()
        self.old, self.new = old, new

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.new if func is self.old else func)(*args, **(kwargs or {}))


@dataclass(frozen=True)
class ReplacedSpec(TransformSpec):
    name: str = "replaced"
    old: Callable = field(kw_only=True)
    new: Callable = field(kw_only=True)

    def context(self) -> AbstractContextManager[Any]:
        return _Replacing(self.old, self.new)

    def conflicts(self, other: TransformSpec) -> str | None:
        if isinstance(other, ReplacedSpec) and other.old is self.old:
            return f"two replaced of {self.old.__name__} on one step; keep one"
        return super().conflicts(other)


def replaced(step: Callable | None = None, *, old: Callable, new: Callable) -> Any:
    """Trace the loss with another function in place of one."""
    return with_spec(step, ReplacedSpec(old=old, new=new))


@dataclass(frozen=True)
class LargeShardedSpec(TransformSpec):
    name: str = "large_sharded"

    def microbatches(self) -> MicrobatchSplit:
        return MicrobatchSplit(2)

    def shards_weights(self) -> bool:
        return True

    def weight_layout(self, path: str, shape: tuple[int, ...]) -> WeightSharding | None:
        return WeightSharding(regather="step") if shape[0] > 3 else None


def large_sharded(step: Callable | None = None, *, axis: str) -> Any:
    """Two microbatches; leaves with more than three rows are sharded."""
    return with_spec(step, LargeShardedSpec(axes=(axis,)))


def loss_fn(params: Any, x: torch.Tensor) -> fp.Mean:
    x = fp.stage_boundary(torch.tanh(x @ params["a"]))
    return fp.Mean((x @ params["b"]).square().sum(), x.new_tensor(float(len(x))))


def step(params: Any, x: torch.Tensor) -> Any:
    loss, grads = fp.value_and_grad(loss_fn)(params, x)
    new = optree.tree_map(lambda param, grad: param - 0.1 * grad, params, grads)
    return new, {"loss": loss}


def inputs() -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(rows, 3, generator=generator) for name, rows in (("a", 4), ("b", 3))
    }
    return params, torch.randn(8, 4, generator=generator)


def trained(transformed: Callable, mesh: fp.Mesh) -> tuple[Any, torch.Tensor]:
    params, x = inputs()
    run = fp.simulate(transformed, mesh)
    state, metrics = run(run.init(lambda p: p, params, x), x)
    return run.unplace(state), metrics["loss"]


def test_a_mode_of_ones_own_changes_what_is_traced() -> None:
    pipe = fp.pipelined(step, axis="pipe", microbatches=2)
    _, loss = trained(replaced(pipe, old=torch.tanh, new=torch.sigmoid), fp.Mesh(pipe=2))
    params, x = inputs()
    with _Replacing(torch.tanh, torch.sigmoid):
        _, metrics = step(params, x)
    torch.testing.assert_close(loss, metrics["loss"])
    assert trained(pipe, fp.Mesh(pipe=2))[1] != loss


def test_microbatches_and_a_weight_layout_of_ones_own() -> None:
    both = large_sharded(fp.data_parallel(step, axis="data"), axis="data")
    params, x = inputs()
    lowered = fp.lower(both, fp.Mesh(data=2), lambda p: p, params, x)
    assert [layout.axes for layout in lowered.placement.layouts] == [("data",), ()]
    assert lowered.calls[0].split.microbatches == 2
    state, loss = trained(both, fp.Mesh(data=2))
    new, metrics = step(params, x)
    torch.testing.assert_close((state, loss), (new, metrics["loss"]))


def test_what_it_conflicts_with() -> None:
    twice = replaced(replaced(step, old=torch.tanh, new=torch.sin), old=torch.tanh, new=torch.cos)
    with pytest.raises(StackError, match="two replaced of tanh on one step"):
        fp.simulate(twice, fp.Mesh())
    counted = fp.accumulated(large_sharded(step, axis="data"), microbatches=4)
    with pytest.raises(StackError, match="both split the batch into microbatches"):
        fp.simulate(counted, fp.Mesh(data=2))
    sharded = fp.sharded_weights(large_sharded(step, axis="data"), axis="data")
    with pytest.raises(StackError, match="both shard over axis 'data'"):
        fp.simulate(sharded, fp.Mesh(data=2))


WRONG = [
    (lambda: WeightSharding(regather="never"), "regather='never'; write 'microbatch'"),
    (lambda: WeightSharding(reduce="blah"), "reduce='blah'; write 'each' or 'last'"),
    (lambda: WeightSharding(prefetch=-3), "prefetch is -3; it is a number of units"),
    (lambda: WeightSharding(bucket_bytes=0), "bucket_bytes is 0"),
    (lambda: MicrobatchSplit(0), "microbatches is 0; it has to be a whole number"),
    (lambda: with_spec(step, TransformSpec), "with_spec: the spec is a type"),
]


@pytest.mark.parametrize(("make", "said"), WRONG)
def test_what_a_request_refuses(make: Callable, said: str) -> None:
    with pytest.raises(StackError, match=re.escape(said)):
        make()
