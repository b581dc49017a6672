"""The parameters and buffers of a module, each once.

In: a module.
Out: its submodules by path, and its tensors by name.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Slot(NamedTuple):
    """A parameter or buffer of a module, under the first of its names."""

    name: str
    tensor: Tensor


class Slots(NamedTuple):
    """What a module has.

    Args:
        modules: every submodule with its path, the module itself included.
        params: every parameter, each once.
        buffers: every buffer, each once.
    """

    modules: list[tuple[str, nn.Module]]
    params: list[Slot]
    buffers: list[Slot]

    @property
    def tensors(self) -> list[Slot]:
        """Parameters, then buffers."""
        return [*self.params, *self.buffers]


def find_slots(module: nn.Module) -> Slots:
    """What a module has now.

    >>> [slot.name for slot in find_slots(nn.BatchNorm1d(2)).tensors]
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    modules = list(module.named_modules())
    params = _tensors_of(modules, "_parameters")
    buffers = _tensors_of(modules, "_buffers")
    return Slots(modules, params, buffers)


def _tensors_of(modules: list[tuple[str, nn.Module]], attribute: str) -> list[Slot]:
    found: dict[int, Slot] = {}
    for path, module in modules:
        tensors = module.__dict__[attribute]
        for key, tensor in tensors.items():
            if tensor is not None and id(tensor) not in found:
                name = join_path(path, key)
                found[id(tensor)] = Slot(name, tensor)
    return list(found.values())


def join_path(path: str, key: str) -> str:
    """The name of an attribute of a submodule.

    >>> join_path("layers.0", "weight"), join_path("", "weight")
    ('layers.0.weight', 'weight')
    """
    return f"{path}.{key}" if path else key
