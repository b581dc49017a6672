"""Spmd: makes the runner of the rank that this process is, from what a caller wrote.

In: a step with its transforms, a mesh, and options. Out: a `Spmd`, or a StackError that says which
options do not fit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.spmd_options import Options
from funcpipe._src.runtime.spmd_runner import Spmd


def spmd(
    step: Callable,
    mesh: Mesh,
    *,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    batch: str = "global",
    backend: str = "eager",
    accumulate_dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    donate: bool = True,
    check_every: int | None = None,
) -> Spmd:
    """Run a transformed step on the rank that this process is: NCCL on GPUs, gloo on CPUs.

    Args:
        step: a step with transforms on it; the same in every process.
        mesh: as many ranks as there are processes (`launch` or torchrun started them).
        device: where this rank computes; its own GPU if there is one, else the CPU.
        timeout: seconds after which a rank that does not answer is given up.
        batch: "global": every rank passes the whole batch; "local": for loaders that hold a rank's
            own rows only. Ranks that differ on no axis that splits rows (those of one pipeline, or
            of one sequence) then pass the same rows, with all positions.
        backend: what runs a unit: "eager", bitwise as plain PyTorch; or "inductor", which compiles
            each distinct unit.
        accumulate_dtype: with "inductor", the dtype in which gradients with fewer bits are added
            up over microbatches: by default ``torch.float32``; ``torch.bfloat16`` adds those of
            bfloat16 params up as plain PyTorch does, in half the memory.
        cuda_graph: capture the whole step, optimizer and messages included, into one CUDA graph.
            The first step with a batch of some shapes runs as it is; the second one is captured.
            ``NCCL_GRAPH_MIXING_SUPPORT`` is set to 0 in the environment unless it is set: graphs of
            your own in this process must then not run beside other operations of their
            communicators.
        donate: whether a step may write the new state where the old one lies, so that there is
            memory for one only. What a step returned is then gone when it has been given to the
            next step: to use it again is an error. Clone what you want to keep. In a captured step
            always.
        check_every: compare replicas before every n-th step: copies of state leaves and the batch
            by checksums, computed where they lie, and the Python values that the step uses outside
            ``value_and_grad``, for which it runs once on fakes (about 0.1 s for fifty leaves, on
            the host). Without it ranks compare params, batch and those values in ``init``, the
            batch of the first step, and a state that was placed or loaded.

    Returns:
        a runner; ``state`` is this rank's part of it.

    Raises:
        MeshError, StackError: the transforms do not fit the mesh or each other.
        RankError, on every rank: another one failed; says which, and with what.
        MismatchError, on every rank, later: ranks differ; names leaves and ranks.
    """
    options = Options(batch, backend, accumulate_dtype, cuda_graph, donate, check_every)
    return Spmd(step, mesh, options, device, timeout)
