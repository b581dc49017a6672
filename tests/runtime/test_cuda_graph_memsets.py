"""A node of a CUDA graph changes places with a kernel. On GPUs: `tests/gpu/test_gpu_capture.py`."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import pytest

from funcpipe._src.runtime.cuda_graph_memsets import _chain, _replace, as_kernels


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


class Driver:
    """Graphs as sets of edges, asked as the CUDA driver is: how many first, then for so many."""

    def __init__(self, edges: set[tuple[str, str]]) -> None:
        self.edges = edges

    def _some(self, found: set[str], count: int | None, *more: Any) -> tuple:
        names = sorted(found)
        return (Result.CUDA_SUCCESS, names[: count or 0], *more, len(names))

    def cuGraphGetRootNodes(self, graph: Any, count: int | None = None) -> tuple:
        return self._some({a for a, _ in self.edges} - {b for _, b in self.edges}, count)

    def cuGraphNodeGetDependencies(self, node: str, count: int | None = None) -> tuple:
        return self._some({a for a, b in self.edges if b == node}, count, "edge data")

    def cuGraphNodeGetDependentNodes(self, node: str, count: int | None = None) -> tuple:
        return self._some({b for a, b in self.edges if a == node}, count, "edge data")

    def cuGraphKernelNodeGetParams(self, node: str) -> tuple:
        return (
            (Result.CUDA_SUCCESS, f"like {node}")
            if node.startswith("fill")
            else (Result.CUDA_ERROR_INVALID_VALUE,)
        )

    def cuGraphAddKernelNode(self, graph: Any, ahead: list[str], count: int, params: str) -> tuple:
        assert len(ahead) == count
        self.edges |= {(a, params) for a in ahead}
        return Result.CUDA_SUCCESS, params

    def cuGraphAddDependencies(
        self, graph: Any, a: list[str], b: list[str], data: None, count: int
    ) -> tuple:
        assert len(a) == len(b) == count
        self.edges |= set(zip(a, b, strict=True))
        return (Result.CUDA_SUCCESS,)

    def cuGraphDestroyNode(self, node: str) -> tuple:
        self.edges = {edge for edge in self.edges if node not in edge}
        return (Result.CUDA_SUCCESS,)


def test_what_stood_before_and_behind_a_node_does_so_for_its_kernel() -> None:
    driver = Driver({("a", "m"), ("b", "m"), ("m", "c"), ("m", "d"), ("a", "d")})
    _replace(driver, "graph", "m", "fill")
    assert driver.edges == {(x, "like fill") for x in "ab"} | {("like fill", x) for x in "cd"} | {
        ("a", "d")
    }


def test_a_node_at_the_end() -> None:
    driver = Driver({("a", "m")})
    _replace(driver, "graph", "m", "fill")
    assert driver.edges == {("a", "like fill")}


def test_a_chain_from_its_first_node_on() -> None:
    assert list(_chain(Driver({("a", "b"), ("b", "c")}), "graph")) == ["a", "b", "c"]


def test_what_the_driver_refuses_is_said() -> None:
    driver = Driver({("a", "m")})
    with pytest.raises(
        RuntimeError,
        match="CUDA_ERROR_INVALID_VALUE, while small memsets of a captured step became",
    ):
        _replace(driver, "graph", "m", "no kernel")
    assert driver.edges == {("a", "m")}


def test_without_the_library_a_graph_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("funcpipe._src.runtime.cuda_graph_memsets._driver", lambda: None)
    graph: Any = object()
    assert as_kernels(graph) == 0
