"""Backends: what runs a unit. "eager" runs its graph op by op, bitwise as plain PyTorch; "inductor" compiles it.

Equal units share one `Code`, so a model of any depth compiles a handful of them.

In: `Code`. Out: a boxed function, a list of tensors in, a sequence out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from funcpipe.errors import TraceError
from funcpipe.graph.code import Code

Run = Callable[[list[Any]], Sequence[Any]]
NAMES = ("eager", "inductor")


class Backend:
    """Makes runnable units, each distinct graph once.

    Args:
        name: "eager" or "inductor".
        progress: called with a line of text while units compile.
    """

    def __init__(self, name: str = "eager", progress: Callable[[str], None] | None = None) -> None:
        self.name, self.progress = name, progress or (lambda text: None)
        self._made: dict[str, Run] = {}

    def __call__(self, code: Code) -> Run:
        """The function of a unit."""
        if self.name == "eager":
            return code.run
        if code.key not in self._made:
            self.progress(f"compiling unit {code.key} ({len(self._made) + 1})")
            self._made[code.key] = _inductor(code)
        return self._made[code.key]


def _inductor(code: Code) -> Run:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    inputs = [n.meta["val"] for n in code.module.graph.nodes if n.op == "placeholder"]
    try:
        table = select_decomp_table()
        module = make_fx(lambda *xs: code.run(list(xs)), decomposition_table=table, tracing_mode="fake")(*inputs)
        fakes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        with torch.no_grad():
            return compile_fx_inner(module, fakes)  # type: ignore[return-value]
    except Exception as error:
        raise TraceError(f"torch's inductor cannot compile unit {code.key}: {error}; use backend='eager'") from error
