"""Optimizers as pairs of functions, and what goes with them."""

from funcpipe._src.optim import (
    AdamWState,
    Average,
    AverageState,
    Factors,
    Optimizer,
    Schedule,
    SGDState,
    Statistics,
    adamw,
    ema,
    freeze,
    from_optax,
    per_leaf,
    sgd,
    statistics,
    warmup_cosine,
)

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
