"""Params that are not there yet: a rank makes the leaves that it holds, and no others.

In: a pure function from a key to params. Out: `LazyParams`: their shapes, and each leaf on request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.buffer_donation import refuse_invalidated
from funcpipe._src.core.checksum import checksums, text_sum
from funcpipe._src.core.containers import check_containers
from funcpipe._src.functional import random
from funcpipe._src.graph.ops import extract, is_seeded
from funcpipe._src.graph.unit_code import without_device_numbers
from funcpipe.errors import StateError


def read_params(params: Any, key: torch.Tensor | int) -> tuple[Any, LazyParams | None]:
    """A tree with the shapes of params, and what makes them where they are given as a function.

    Raises:
        StateError: params are a module, or were donated.
    """
    if isinstance(params, torch.nn.Module):
        check_containers("params", params)  # it is callable, but makes no params
    if not callable(params):
        refuse_invalidated("params", params)
        return params, None
    if isinstance(key, int):
        key = random.key(key)
    lazy = LazyParams(params, key)
    return lazy.fakes, lazy


class LazyParams:
    """What ``params_fn(key)`` would return.

    Args:
        params_fn: pure; random values come from its key, by `fp.random`.
        key: see `fp.random.key`.

    Attributes:
        fakes: the tree, with shapes and dtypes but no data.
    """

    def __init__(self, params_fn: Callable[[torch.Tensor], Any], key: torch.Tensor) -> None:
        self.key = key
        self.mode = FakeTensorMode()
        specs: list[Any] = []

        def flat(key: torch.Tensor) -> list[torch.Tensor]:
            leaves, spec = tree.flatten(params_fn(key))
            specs[:] = [spec]
            return leaves

        with self.mode:
            fake_key = torch.empty((), dtype=torch.int64)
            self.module = make_fx(flat, tracing_mode="fake")(fake_key)
        for node in self.module.graph.nodes:
            if is_seeded(node):
                raise StateError(
                    f"params_fn draws from the global random generator ({node.target}), so ranks "
                    "could not agree on what they hold: draw from its key with fp.random.normal "
                    "or fp.random.uniform"
                )
        (output,) = self.module.graph.find_nodes(op="output")
        self.outputs: Any = output.args[0]
        values = [node.meta["val"] for node in self.outputs]
        self.fakes = tree.unflatten(specs[0], values)

    def digests(self) -> list[int]:
        """For every leaf a number: equal where the same ops make it of the same key and
        constants."""
        known: dict[Any, int] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                text = f"key {checksums([self.key])}"
            elif node.op == "get_attr":
                text = f"constant {checksums([getattr(self.module, node.target)])}"
            else:
                text = f"{node.target}{map_arg((node.args, node.kwargs), known.__getitem__)}"
            known[node] = text_sum(without_device_numbers(text))
        return [known[node] for node in self.outputs]

    def leaf(self, number: int) -> torch.Tensor:
        """A leaf, computed from what it depends on alone."""
        graph = self.module.graph
        inputs = list(graph.find_nodes(op="placeholder"))
        make = extract(self.module, self.outputs[number], inputs)
        return make(self.key)
