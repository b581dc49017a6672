"""Options of `spmd`, and which of them fit together.

In: what a caller of ``fp.spmd`` wrote. Out: `Options`, or a StackError that says what to write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from funcpipe._src.backends.backend import NAMES
from funcpipe.errors import StackError


@dataclass(frozen=True)
class Options:
    """The options of a runner; `spmd` explains them."""

    batch: str
    backend: str
    accumulate_dtype: torch.dtype | None
    cuda_graph: bool
    donate: bool
    check_every: int | None

    def check(self) -> None:
        """Check that the options fit together.

        Raises:
            StackError: they do not.
        """
        if self.backend not in NAMES:
            names = ", ".join(map(repr, NAMES))
            raise StackError(f"spmd: backend={self.backend!r}; write one of {names}")
        if self.batch not in ("global", "local"):
            raise StackError(f"spmd: batch={self.batch!r}; write 'global' or 'local'")
        if self.accumulate_dtype is not None:
            self._check_accumulation(self.accumulate_dtype)
        if self.cuda_graph and not self.donate:
            raise StackError(
                "spmd: a captured step updates its state in place; leave donate=False or "
                "cuda_graph=True out"
            )
        if self.check_every is not None:
            self._check_every(self.check_every)

    def check_device(self, device: torch.device) -> None:
        """Check that a rank's device can do what is asked.

        Raises:
            StackError: it cannot.
        """
        if self.cuda_graph and device.type != "cuda":
            raise StackError(
                f"spmd: cuda_graph=True needs a GPU, but this rank computes on the {device}"
            )

    def _check_accumulation(self, dtype: torch.dtype) -> None:
        if self.backend == "eager" or not dtype.is_floating_point:
            raise StackError(
                f"spmd: accumulate_dtype={dtype!r}; give a floating-point dtype, with "
                "backend='inductor'"
            )

    def _check_every(self, steps: object) -> None:
        if type(steps) is not int or steps < 1:
            raise StackError(
                f"spmd: check_every={steps!r}; give a number of steps, 1 or more, or leave it out"
            )
