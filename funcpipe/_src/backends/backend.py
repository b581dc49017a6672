"""Backends: what runs a unit. "eager" runs its graph op by op, bitwise as plain PyTorch; "inductor"
compiles it.

Equal units share one `Code`, so a model of any depth compiles a handful of them. What was compiled
is kept on disk by torch's own cache (the FX graph cache of inductor, ``TORCHINDUCTOR_CACHE_DIR``),
so that the next process finds it.

A compiled backend also *fuses* (see `fusion.py`): it adds gradients up without making them first,
and compiles two units that run back to back as one.

In: `Code`. Out: a boxed function, a list of tensors in, a sequence out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from funcpipe._src.backends.grad_accumulation import handing_out
from funcpipe._src.collectives import names_axes
from funcpipe._src.graph.ops import viewed
from funcpipe._src.graph.unit_code import Code
from funcpipe.errors import TraceError

Run = Callable[[list[Any]], Sequence[Any]]
NAMES = ("eager", "inductor")


class Backend:
    """Makes runnable units, each distinct graph once.

    Args:
        name: "eager" or "inductor".
        progress: called with a line of text while units compile.
        accumulate_dtype: the dtype in which gradients with fewer bits are added up over
            microbatches by a backend that fuses.
        captured: whether units run in a CUDA graph: then what the host does between them takes no
            time.
    """

    def __init__(
        self,
        name: str = "eager",
        progress: Callable[[str], None] | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        captured: bool = False,
    ) -> None:
        self.name, self.progress = name, progress or (lambda text: None)
        self.accumulate_dtype, self.captured = accumulate_dtype, captured
        self._made: dict[tuple[str, tuple[int, ...]], Run] = {}
        self._peaks: dict[tuple[str, tuple[int, ...]], int] = {}

    @property
    def fuses(self) -> bool:
        """Whether it may run other kernels than the units' graphs say, and round otherwise."""
        return self.name == "inductor"

    def __call__(self, code: Code, products: tuple[int, ...] = ()) -> Run:
        """The function of a unit.

        Args:
            code: of the unit.
            products: the places of outputs that it hands out as
                `funcpipe._src.backends.grad_accumulation.Product`.
        """
        if not self.fuses:
            assert not products
            return code.run
        key = code.key, products
        if key not in self._made:
            self._made[key] = self._unit(code, products)
            if not names_axes(code.module.graph):  # the others need all ranks
                self._peaks[key] = _peak(self._made[key], code)
        return self._made[key]

    def peak(self, code: Code, products: tuple[int, ...] = ()) -> int:
        """Bytes that a unit takes for itself at its peak, outputs included: as it was seen to on a
        GPU, else as its graph says."""
        return self._peaks.get((code.key, products), code.peak)

    def function(self, name: str, fn: Callable[..., torch.Tensor], *like: torch.Tensor) -> Run:
        """A function of tensors, compiled.

        Args:
            name: of what it computes, for such tensors.
            fn: makes one tensor.
            like: tensors such as it will get.
        """
        if (name, ()) not in self._made:
            with _disable_current_modes():
                with FakeTensorMode():
                    fakes = [_like(x) for x in like]
                module = make_fx(lambda *xs: (fn(*xs),), tracing_mode="fake")(*fakes)
            module.graph.set_codegen(fx.graph._BoxedCodeGen())
            module.recompile()
            self._made[name, ()] = self._inductor(module, name)
        return self._made[name, ()]

    def _unit(self, code: Code, products: tuple[int, ...]) -> Run:
        if not products:
            return self._inductor(code.module, code.key)
        module, pack = handing_out(code.module, products)
        run = self._inductor(module, code.key)
        return lambda inputs: pack(run(inputs))

    def _inductor(self, module: fx.GraphModule, key: str) -> Run:
        if not any(x.op == "call_function" and viewed(x) is None for x in module.graph.nodes):
            return module.forward  # nothing but views, as what is left of a W unit
        self.progress(f"compiling unit {key} ({len(self._made) + 1})")
        return _inductor(module, key)


def _peak(run: Run, code: Code) -> int:
    """What a compiled unit takes beyond its inputs, on a GPU; elsewhere what its graph says.
    Torch's own record of the peak begins anew."""
    likes = [n.meta["val"] for n in code.module.graph.nodes if n.op == "placeholder"]
    device = next((x.device for x in likes if x.device.type == "cuda"), None)
    if device is None:
        return code.peak
    with torch.no_grad(), torch.cuda.device(device):
        inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_()
            for x in likes
        ]
        run(list(inputs))  # the first run makes what stays
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(list(inputs))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _inductor(module: fx.GraphModule, key: str) -> Run:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(
        shape_env=ShapeEnv()
    )  # inductor looks into its cache on disk only where there is one
    likes = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    try:
        with _disable_current_modes(), mode:
            inputs = [_like(x) for x in likes]
            flat = make_fx(
                lambda *xs: module.forward(list(xs)), select_decomp_table(), tracing_mode="fake"
            )(*inputs)
        with torch.no_grad(), tracing(TracingContext(mode)):
            return compile_fx_inner(flat, inputs)  # type: ignore[return-value]
    except Exception as error:
        raise TraceError(
            f"torch's inductor cannot compile unit {key}: {error}; use backend='eager'"
        ) from error


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
