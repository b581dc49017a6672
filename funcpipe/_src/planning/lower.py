"""`fp.lower`: every stage of the compiler for a step and a batch, without running anything.

In: what a runner's ``init`` gets. Out: `Lowered`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from funcpipe._src.core import pytree
from funcpipe._src.core.batch_leaves import read_batch
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.core.mixed_precision import scaled_init
from funcpipe._src.planning.lazy_init import read_params
from funcpipe._src.planning.lowered import Lowered
from funcpipe._src.planning.planner import Planner
from funcpipe._src.spec.resolve import resolve


def lower(
    step: Callable, mesh: Mesh, init_state: Callable[[Any], Any], params: Any, batch: Any
) -> Lowered:
    """Compile a transformed step for a mesh, and hand out what each stage made. No process, device
    or communicator is needed, and no step runs.

    Args:
        step: a step with transforms on it.
        mesh: with every axis that they name.
        init_state: a pure function from params to the state.
        params: the full params, of which only shapes and dtypes are read; or a pure function
            ``params_fn(key)`` that makes them.
        batch: a global batch like those to come, with its data.

    Returns:
        the records of all stages. ``lowered.resolved``, ``.analysis`` and ``.placement`` are of the
        step; each of ``lowered.calls``, one for every ``value_and_grad``, has ``.split``,
        ``.proof``, ``.joint``, ``.checked``, ``.units``, ``.schedule`` and ``.programs`` (one for
        every pipeline rank). ``lowered.graph``, ``.units``, ``.schedule`` and ``.program`` are
        those of the first call and pipeline rank. Each record prints itself. Where a schedule is
        to be chosen for measured times, it is chosen for FLOPs.

    Raises:
        FuncpipeError: the same as ``run.init`` raises for this step and batch.

    The stages are those of JAX's ``jit(f).lower(...)``; see docs/architecture.md.

    >>> import funcpipe as fp
    >>> def loss_fn(w, x):
    ...     x = fp.stage_boundary(x @ w[0])
    ...     return fp.Mean((x @ w[1]).square().sum(), torch.tensor(float(len(x))))
    >>> def step(w, x):
    ...     return w, {"loss": fp.value_and_grad(loss_fn)(w, x)[0]}
    >>> piped = fp.pipelined(step, axis="pipe", microbatches=2)
    >>> w, x = [torch.ones(3, 3), torch.ones(3, 3)], torch.ones(4, 3)
    >>> lowered = fp.lower(piped, fp.Mesh(pipe=2), lambda w: w, w, x)
    >>> print(lowered.schedule)
    one_f_one_b: 8 actions, 4 messages
      stage 0 on pipeline rank 0: segments 0
      stage 1 on pipeline rank 1: segments 1
      pipeline rank 0: 0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1
      pipeline rank 1: 1RECV_F0<0 1F0 1B0 1SEND_B0>0 1RECV_F1<0 1F1 1B1 1SEND_B1>0
    """
    refuse_inference_mode("fp.lower")
    resolved = resolve(step, mesh)
    shapes, _ = read_params(params, 0)
    precision = resolved.precision
    if precision is not None and precision.dynamic:
        init_state = scaled_init(init_state, _device_of(shapes))
    planner = Planner(resolved, init_state, shapes)
    plan = planner.plan(read_batch(batch))
    return plan.lowered


def _device_of(params: Any) -> torch.device:
    """Where the params are; the CPU where there are none."""
    for leaf in pytree.leaves(params):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return torch.device("cpu")
