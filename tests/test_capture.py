"""What a CUDA graph cannot hold, said before or after it was tried; what a step says that runs out of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcpipe as fp
from funcpipe.errors import TraceError
from funcpipe.runtime.capture import HostOps, cannot_capture, check_on_gpu, feeder
from funcpipe.runtime.rank import Rank
from funcpipe.runtime.texts import too_large


def step(p: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    loss, grad = fp.value_and_grad(lambda p, x: fp.Mean((x @ p).sum(), torch.tensor(float(len(x)))))(p, x)
    return p - grad, {"loss": loss}


# ---- what a graph cannot read, and what is moved to it


def test_leaves_elsewhere_are_refused() -> None:
    with pytest.raises(TraceError, match=r"batch\['n'\] is a int: a CUDA graph would repeat its value for ever"):
        check_on_gpu("batch", {"n": 3})
    with pytest.raises(TraceError, match=r"state\['x'\] is on the cpu.*move it there"):
        check_on_gpu("state", {"x": torch.ones(2)})


@pytest.mark.parametrize(
    "body, found",
    [
        (
            lambda x: float(x.sum()) > 0,
            r"aten\._local_scalar_dense\.default at test_capture.py:\d+ `.*` waits for a value",
        ),
        (lambda x: x[x > 0], r"aten\.index\.Tensor at test_capture.py:\d+ `.*` waits for a value"),
        (lambda x: x.to("meta"), r"aten\._to_copy\.default at test_capture.py:\d+ `.*` copies between cpu and meta"),
        (lambda x: torch.where(x > 0, x, 0.0) * torch.tensor(2.0), None),
    ],
)
def test_what_cannot_be_captured_is_named(body: Callable, found: str | None) -> None:
    with HostOps() as host:
        body(torch.arange(3.0))
    text = cannot_capture(host.found, RuntimeError("CUDA error: operation not permitted\nmore"))
    assert (
        text.startswith("the step cannot be captured into a CUDA graph: ")
        and "return what the host wants to see as a metric" in text
    )
    if found is None:
        assert host.found is None and "Something in it waits for the host" in text
    else:
        assert re.search(found, text) and "(CUDA error: operation not permitted)" in text and "cuda_graph=False" in text


def test_nothing_moves_to_a_cpu() -> None:
    data = {"x": torch.ones(2)}
    assert feeder(torch.device("cpu"))(data) is data


# ---- errors


def test_too_little_memory_says_what_the_plan_needs() -> None:
    run = fp.simulate(fp.accumulated(step, microbatches=2), fp.Mesh())
    x = torch.ones(4, 3)
    state = run.init(lambda p: p, torch.ones(3, 2), x)
    rank = Rank(run.plan(state, x), run._ranks.communicators[0])
    text = too_large(rank, state, torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"))
    assert text.startswith("rank 0 is out of memory on cpu: beside its state of 24 B the plan predicts ")
    assert text.endswith("or checkpoint the blocks. CUDA out of memory. Tried")
