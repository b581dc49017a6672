"""Functional optimizers: ``(init, update)`` pairs over torch's fused and foreach kernels.

``init(params) -> opt_state`` and ``update(grads, opt_state, params) -> (params, opt_state)`` are
pure: they modify no argument. Where optax's ``update`` returns a tree of *updates* still to be
added, this one returns the new parameters, because torch's fused kernels write parameters and
moments in one pass.

Transforms rely on these rules:

- An update touches leaves elementwise only, so a rank may hold any shard of any leaf. `statistics`
  needs more than that, and takes global sums.
- ``None`` is an absent leaf, in all trees alike; a rank may hold no leaf at all.
- Integer, bool and non-tensor leaves are frozen: they come out as they went in, whatever their
  gradient.
- Nothing waits for the device, so that a step on a GPU can be captured into a CUDA graph. A
  learning rate that changes is therefore a tensor, computed from the ``step`` tensor in the state.

Read `leaves` first: what is trained, and which leaves one kernel call takes. Then `fused` (AdamW
and SGD), `lr_schedules`, `per_leaf` (factors and frozen leaves), `adapters`, `ema`, `statistics`.

To add an optimizer:

1. Write ``optim/NAME.py`` with a function that returns an `Optimizer`; `fused.sgd` is the shortest
   model. ``update`` takes ``factors``, if `per_leaf` is to work on it.
2. Keep to elementwise ops. What else it needs of a leaf comes from `statistics` or `fp.global_sum`.
3. Add its name here and in ``funcpipe/optim.py``.
4. Add a row to ``OPTIMIZERS`` in ``tests/optim/test_optim.py``; the common tests check these rules.
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
