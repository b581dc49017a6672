"""A backend that fuses as a compiled one does, and runs graphs op by op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import fx

from funcpipe._src.backends.backend import Backend
from funcpipe._src.graph.unit_code import Code
from funcpipe._src.runtime import simulate
from funcpipe._src.runtime.rank import Rank


class Fusing(Backend):
    """A backend that fuses, and runs graphs op by op."""

    def __init__(self, sums: torch.dtype = torch.bfloat16) -> None:
        super().__init__("inductor", accumulate_dtype=sums)
        self.asked: list[tuple[Code, tuple[int, ...]]] = []

    def __call__(self, code: Code, gemms: tuple[int, ...] = ()) -> Any:
        self.asked.append((code, gemms))
        return super().__call__(code, gemms)

    def _inductor(self, module: fx.GraphModule, key: str) -> Any:
        return module.forward


@contextmanager
def fusing(sums: torch.dtype = torch.bfloat16) -> Iterator[Fusing]:
    """Every simulated rank has a backend that fuses."""
    backend = Fusing(sums)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "Rank", partial(Rank, backend=backend))
        yield backend
