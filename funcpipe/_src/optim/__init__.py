"""Functional optimizers: ``(init, update)`` pairs over torch's fused and foreach kernels, and what
goes with them.

``init(params) -> opt_state`` and ``update(grads, opt_state, params) -> (params, opt_state)`` are
pure: they modify no argument. Where optax's ``update`` returns a tree of *updates* still to be
added, this one returns the new parameters, because torch's fused kernels write parameters and
moments in one pass.

The rules of everything in this room, which transforms rely on:

- Leaves are touched elementwise only, so a rank may hold any slice of any leaf; `statistics` is a
  global sum.
- ``None`` is an absent leaf, in all trees alike; a rank may hold no leaf at all.
- Integer, bool and non-tensor leaves are frozen: they come out as they went in, whatever their
  gradient.
- Nothing waits for the device, so that a step on a GPU can be captured into a CUDA graph. A
  learning rate that changes is therefore a tensor, computed from the ``step`` tensor in the state.
"""

from funcpipe._src.optim.adapters import from_optax
from funcpipe._src.optim.ema import Average, AverageState, ema
from funcpipe._src.optim.fused import AdamWState, SGDState, adamw, sgd
from funcpipe._src.optim.leaves import Factors, Optimizer, Schedule
from funcpipe._src.optim.lr_schedules import warmup_cosine
from funcpipe._src.optim.per_leaf import freeze, per_leaf
from funcpipe._src.optim.statistics import Statistics, statistics

__all__ = [
    "AdamWState",
    "Average",
    "AverageState",
    "Factors",
    "Optimizer",
    "SGDState",
    "Schedule",
    "Statistics",
    "adamw",
    "ema",
    "freeze",
    "from_optax",
    "per_leaf",
    "sgd",
    "statistics",
    "warmup_cosine",
]
