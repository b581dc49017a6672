"""Backends: what runs a unit. "eager" runs its graph op by op, bitwise as plain PyTorch; "inductor"
compiles it.

Equal units share one `Code`, so a model of any depth compiles a handful of them. Torch keeps what
was compiled in its own cache on disk (the FX graph cache of inductor, ``TORCHINDUCTOR_CACHE_DIR``),
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

from funcpipe._src.backends.grad_accumulation import Pack, handing_out
from funcpipe._src.collectives import names_axes
from funcpipe._src.graph.ops import viewed
from funcpipe._src.graph.unit_code import Code
from funcpipe.errors import TraceError

Run = Callable[[list[Any]], Sequence[Any]]
Key = tuple[str, tuple[int, ...]]  # of a graph; the outputs that are gradient GEMMs
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
        self.name, self.progress = name, progress or _silent
        self.accumulate_dtype, self.captured = accumulate_dtype, captured
        self._made: dict[Key, Run] = {}
        self._peaks: dict[Key, int] = {}

    @property
    def fuses(self) -> bool:
        """Whether it may run other kernels than the units' graphs say, and round otherwise."""
        return self.name == "inductor"

    def __call__(self, code: Code, gemms: tuple[int, ...] = ()) -> Run:
        """The function of a unit.

        Args:
            code: of the unit.
            gemms: the numbers of the outputs that it hands out as
                `funcpipe._src.backends.grad_accumulation.GradientGemm`.
        """
        if not self.fuses:
            assert not gemms
            return code.run
        key = code.key, gemms
        if key not in self._made:
            self._made[key] = self._unit(code, gemms)
            if not names_axes(code.module.graph):  # the others need all ranks
                run = self._made[key]
                self._peaks[key] = _peak(run, code)
        return self._made[key]

    def peak(self, code: Code, gemms: tuple[int, ...] = ()) -> int:
        """Bytes that a unit takes for itself at its peak, outputs included: as measured on a GPU,
        else as its graph says."""
        key = code.key, gemms
        return self._peaks.get(key, code.peak)

    def function(
        self,
        name: str,
        fn: Callable[..., torch.Tensor],
        *like: torch.Tensor,
    ) -> Run:
        """A function of tensors, compiled.

        Args:
            name: of what it computes, for such tensors.
            fn: makes one tensor.
            like: tensors such as it will get.
        """
        key = name, ()
        if key not in self._made:
            module = _boxed_graph(fn, like)
            self._made[key] = self._inductor(module, name)
        return self._made[key]

    def _unit(self, code: Code, gemms: tuple[int, ...]) -> Run:
        if not gemms:
            return self._inductor(code.module, code.key)
        module, pack = handing_out(code.module, gemms)
        return _packing(self._inductor(module, code.key), pack)

    def _inductor(self, module: fx.GraphModule, key: str) -> Run:
        if all(map(_is_view, module.graph.nodes)):
            return module.forward  # as what is left of a W unit
        self.progress(f"compiling unit {key} ({len(self._made) + 1})")
        return _inductor(module, key)


def _boxed_graph(
    fn: Callable[..., torch.Tensor],
    like: Sequence[torch.Tensor],
) -> fx.GraphModule:
    """The graph of a function that makes one tensor."""

    def as_tuple(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (fn(*inputs),)

    trace = make_fx(as_tuple, tracing_mode="fake")
    with _disable_current_modes():
        with FakeTensorMode():
            fakes = list(map(_empty_like, like))
        module = trace(*fakes)
    module.graph.set_codegen(fx.graph._BoxedCodeGen())
    module.recompile()
    return module


def _silent(_: str) -> None:
    pass


def _packing(run: Run, pack: Pack) -> Run:
    def packed(inputs: list[Any]) -> Sequence[Any]:
        return pack(run(inputs))

    return packed


def _is_view(node: fx.Node) -> bool:
    """Whether a node computes nothing."""
    return node.op != "call_function" or viewed(node) is not None


def _inputs_of(module: fx.GraphModule) -> list[torch.Tensor]:
    """Fakes of what a graph takes in."""
    fakes = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            fakes.append(node.meta["val"])
    return fakes


def _peak(run: Run, code: Code) -> int:
    """What a compiled unit takes beyond its inputs, on a GPU; elsewhere what its graph says.
    Torch's own record of the peak begins anew."""
    fakes = _inputs_of(code.module)
    on_gpu = [fake for fake in fakes if fake.is_cuda]
    if not on_gpu:
        return code.peak
    with torch.no_grad(), torch.cuda.device(on_gpu[0].device):
        inputs = [_empty_like(fake).zero_() for fake in fakes]
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

    def unboxed(*inputs: torch.Tensor) -> Any:
        return module.forward(list(inputs))

    # Inductor looks into its cache on disk only where there is a ShapeEnv.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    try:
        with _disable_current_modes(), mode:
            inputs = list(map(_empty_like, _inputs_of(module)))
            trace = make_fx(unboxed, select_decomp_table(), tracing_mode="fake")
            flat = trace(*inputs)
        with torch.no_grad(), tracing(TracingContext(mode)):
            return compile_fx_inner(flat, inputs)  # type: ignore[return-value]
    except Exception as error:
        raise TraceError(
            f"torch's inductor cannot compile unit {key}: {error}; use backend='eager'"
        ) from error


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, memory order, dtype and device."""
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device=tensor.device,
    )
