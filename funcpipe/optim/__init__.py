"""Functional optimizers: ``(init, update)`` pairs over torch's fused and foreach kernels, and what goes with them.

``init(params) -> opt_state`` and ``update(grads, opt_state, params) -> (params, opt_state)`` are pure: they
modify no argument. Where optax's ``update`` returns a tree of *updates* still to be added, this one returns
the new parameters, because torch's fused kernels write parameters and moments in one pass.

The rules of everything in this room, which transforms rely on:

- Leaves are touched elementwise only, so a rank may hold any slice of any leaf; `statistics` is a global sum.
- ``None`` is an absent leaf, in all trees alike; a rank may hold no leaf at all.
- Integer, bool and non-tensor leaves are frozen: they come out as they went in, whatever their gradient.
- Nothing waits for the device, so that a step on a GPU can be captured into a CUDA graph. A learning rate
  that changes is therefore a tensor, computed from the ``step`` tensor in the state.
"""

from funcpipe.optim.average import Average, AverageState, ema
from funcpipe.optim.choices import freeze, per_leaf
from funcpipe.optim.fused import AdamWState, SGDState, adamw, sgd
from funcpipe.optim.leaves import Factors, Optimizer, Schedule
from funcpipe.optim.measure import Statistics, statistics
from funcpipe.optim.pairs import from_optax
from funcpipe.optim.rates import warmup_cosine

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
