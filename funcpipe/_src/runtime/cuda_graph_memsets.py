"""Memsets in CUDA graphs: small memsets of a captured graph become kernels.

cuBLAS and cuDNN clear a counter of 4 bytes ahead of some of their kernels, which a CUDA graph holds
as a memset node. A memset of up to 4 KiB costs the host 2 us at every launch (CUDA 13, H200: 0.6 ms
for 270 of them, beside 0.05 for 4,500 kernels); from about a thousand on, the launch waits for the
GPU. The driver runs a larger memset as a kernel, which costs nothing that shows; nor does a kernel
that clears the same bytes. So kernels take the place of small memsets.

In: a graph that was captured and is not instantiated. Out: the same graph, which computes the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

_SMALL = 1 << 13  # bytes: 4 KiB were seen to be slow, and 16 KiB not


def as_kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Put kernels in the place of the small memsets of a graph that was made with
    ``keep_graph=True``.

    Returns:
        how many there were; none where ``cuda.bindings`` 13, which torch for CUDA 13 brings along,
        is missing.
    """
    driver = _driver()
    if driver is None:
        return 0
    captured = driver.CUgraph(init_value=graph.raw_cuda_graph())
    memsets: list[tuple[Any, torch.Tensor]] = []
    for node in _listed(driver.cuGraphGetNodes, captured):
        cleared = _cleared(driver, node)
        if cleared is not None:
            memsets.append((node, cleared))
    if memsets:
        fills = _captured_fills([cleared for _, cleared in memsets])
        graph_of_fills = driver.CUgraph(init_value=fills.raw_cuda_graph())
        kernels = _chain(driver, graph_of_fills)
        for (node, _), kernel in zip(memsets, kernels, strict=True):
            _replace(driver, captured, node, kernel)
        fills.reset()
    return len(memsets)


def _captured_fills(tensors: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of kernels that set tensors to zero, one after another."""
    fills = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        fills.capture_begin(capture_error_mode="thread_local")
        for tensor in tensors:
            tensor.fill_(0)
        fills.capture_end()
    return fills


def _driver() -> Any:
    try:
        bindings = importlib.import_module("cuda.bindings")
        major, _, _ = bindings.__version__.partition(".")
        if int(major) < 13:
            return None
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


def _cleared(driver: Any, node: Any) -> torch.Tensor | None:
    """The bytes that a node sets to zero, if it is a small memset that does."""
    if _asked(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
        return None
    memset = _asked(driver.cuGraphMemsetNodeGetParams(node))
    nbytes = memset.elementSize * memset.width
    if memset.value or memset.height != 1 or nbytes > _SMALL:
        return None
    return torch.as_tensor(_Bytes(int(memset.dst), nbytes), device="cuda")


class _Bytes:
    """Memory of the GPU, as torch takes it in."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (start, False),
            "version": 3,
        }


def _chain(driver: Any, graph: Any) -> Iterator[Any]:
    """The nodes of a graph in which they follow one another."""
    nodes = _listed(driver.cuGraphGetRootNodes, graph)
    while nodes:
        yield nodes[0]
        nodes = _listed(driver.cuGraphNodeGetDependentNodes, nodes[0])


def _replace(driver: Any, graph: Any, node: Any, fill: Any) -> None:
    """Put a kernel like another graph's ``fill`` in the place of a node."""
    ahead = _listed(driver.cuGraphNodeGetDependencies, node)
    behind = _listed(driver.cuGraphNodeGetDependentNodes, node)
    params = _asked(driver.cuGraphKernelNodeGetParams(fill))
    new = _asked(driver.cuGraphAddKernelNode(graph, ahead, len(ahead), params))
    if behind:
        _asked(driver.cuGraphAddDependencies(graph, [new] * len(behind), behind, None, len(behind)))
    _asked(driver.cuGraphDestroyNode(node))


def _listed(ask: Any, where: Any) -> list[Any]:
    """What a function lists that says how much there is when it is asked for nothing."""
    count = _asked(ask(where))[-1]
    return list(_asked(ask(where, count))[0][:count]) if count else []


def _asked(answer: tuple) -> Any:
    """What a call of the driver returns.

    Raises:
        RuntimeError: it failed.
    """
    error, *out = answer
    if int(error):
        raise RuntimeError(
            f"CUDA driver: {error.name}, while small memsets of a captured step became kernels"
        )
    return out[0] if len(out) == 1 else out
