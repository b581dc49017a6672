"""Ranks on real GPUs: none waits for another to end its step, and one that fails stops the
others."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from support.gpu import (
    TIGHT,
    error,
    example,
    init_state,
    on_one_or_two,
    runner,
    two_gpus,
)

import funcpipe as fp
from funcpipe._src.core import pytree as tree

pytestmark = pytest.mark.gpu


# ---- ranks in different steps


def squares(params: dict, batch: dict) -> fp.Mean:
    x = F.embedding(batch["tokens"], params["embed"])
    for w in params["blocks"]:
        x = fp.stage_boundary(x + torch.tanh(F.linear(x, w)))
    return fp.Mean((x.square() * batch["weight"][..., None]).sum(), batch["weight"].sum())


def descent(params: dict, batch: dict, slow: str = "") -> tuple[dict, dict]:
    """Nothing in it makes ranks wait for each other. One of them may be slow: it does nothing for a
    second or two."""
    loss, grads = fp.value_and_grad(squares)(params, batch)
    if slow and os.environ["RANK"] == slow:
        torch.cuda._sleep(2_000_000_000)
    return tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": loss}


def ahead(slow: str) -> tuple[float, bool]:
    """How far off the params are after some steps, and whether this rank was done when the other
    one was."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    fast = functools.partial(descent, slow=slow)
    piped = fp.pipelined(fast, axis="pipe", microbatches=4, schedule=fp.schedules.zb_v())
    run = fp.spmd(piped, fp.Mesh(pipe=2), cuda_graph=True)
    params, batch = example()
    state = run.init(lambda p: p, params, batch)
    for _ in range(2):  # as it is, and captured
        state, _ = run(state, batch)
        torch.cuda.synchronize()
        run._comm.exchange(None)
    state, _ = run(state, batch)
    done = torch.cuda.Event()
    done.record()
    if os.environ["RANK"] != slow:
        done.synchronize()
    run._comm.exchange(None)
    was_done = done.query()
    got, want = run.unplace(state), params
    for _ in range(3):
        want, _ = descent(want, batch)
    found = error(got, want)
    run.close()
    return found, was_done


@two_gpus
@pytest.mark.parametrize("slow", [0, 1])
def test_no_rank_waits_for_another_to_end_its_step(slow: int) -> None:
    found = fp.launch(ahead, 2, str(slow), timeout=300)
    assert max(far for far, _ in found) <= TIGHT
    assert [was_done for _, was_done in found] == [rank != slow for rank in (0, 1)]


# ---- failures


def killed(options: dict) -> None:
    """Rank 1 dies within a step."""
    run = runner(timeout=60, **options)
    params, batch = example()
    state, metrics = run(run.init(init_state, params, batch), batch)
    if run.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        state, metrics = run(state, batch)
        float(metrics["loss"])


@two_gpus
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["eager", "graph"])
def test_a_rank_that_is_killed_within_a_step(options: dict) -> None:
    start = time.monotonic()
    with pytest.raises(fp.errors.RankError, match="rank 1"):
        fp.launch(killed, 2, options, timeout=120)
    assert time.monotonic() - start < 90  # found out, not timed out


def too_large(options: dict) -> None:
    """The last rank has less memory than the step takes."""
    run = runner(timeout=60, **options)
    params, batch = example(rows=1 << 17)
    state = run.init(init_state, params, batch)
    if run.rank == run.mesh.size - 1:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + (16 << 20)
        torch.cuda.set_per_process_memory_fraction(
            held / torch.cuda.get_device_properties(0).total_memory
        )
    run(state, batch)


@on_one_or_two
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}], ids=["eager", "graph"])
def test_too_little_memory_says_what_the_plan_needs(options: dict, ranks: int) -> None:
    with pytest.raises(
        fp.errors.RankError, match=rf"rank {ranks - 1} .*out of memory.*activations.*microbatches"
    ):
        fp.launch(too_large, ranks, options, timeout=120)
