"""Small memsets of a captured graph become kernels.

cuBLAS and cuDNN clear a counter of 4 bytes ahead of some of their kernels, which a CUDA graph holds
as a memset node. One of up to 4 KiB costs the host 2 us at every launch (CUDA 13, H200: 0.6 ms for
270 of them, beside 0.05 for 4,500 kernels); from about a thousand on, the launch waits for the GPU.
A larger one, which the driver runs as a kernel, costs nothing that shows; nor does a kernel that
clears the same bytes. So that is what takes their place.

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
    whole = driver.CUgraph(init_value=graph.raw_cuda_graph())
    found = [
        (node, x)
        for node in _listed(driver.cuGraphGetNodes, whole)
        if (x := _cleared(driver, node)) is not None
    ]
    if found:
        fills = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            fills.capture_begin(capture_error_mode="thread_local")
            for _, x in found:
                x.fill_(0)
            fills.capture_end()
        chain = _chain(driver, driver.CUgraph(init_value=fills.raw_cuda_graph()))
        for (node, _), fill in zip(found, chain, strict=True):
            _replace(driver, whole, node, fill)
        fills.reset()
    return len(found)


def _driver() -> Any:
    try:
        bindings = importlib.import_module("cuda.bindings")
        return (
            importlib.import_module("cuda.bindings.driver")
            if int(bindings.__version__.split(".")[0]) >= 13
            else None
        )
    except ImportError:
        return None


def _cleared(driver: Any, node: Any) -> torch.Tensor | None:
    """The bytes that a node sets to zero, if it is a small memset that does."""
    if _asked(driver.cuGraphNodeGetType(node)) != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET:
        return None
    p = _asked(driver.cuGraphMemsetNodeGetParams(node))
    nbytes = p.elementSize * p.width
    if p.value or p.height != 1 or nbytes > _SMALL:
        return None
    return torch.as_tensor(_Bytes(int(p.dst), nbytes), device="cuda")


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
