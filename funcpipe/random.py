"""Randomness as data: a key is a tensor, and what is drawn from it depends on the key and the shape alone.

Terms. A *key* is a 0-d int64 tensor. ``fold_in`` makes a new key of a key and a name or number; an *initialiser* is a
function from a key to a tensor. The same key gives the same bits on every mesh, rank and device.

In: keys. Out: tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from funcpipe import tree

_LIB = torch.library.Library("funcpipe_random", "FRAGMENT")
Initialiser = Callable[[torch.Tensor], torch.Tensor]


def key(seed: int) -> torch.Tensor:
    """A key from a seed: a 0-d int64 tensor on the CPU.

    >>> key(0)
    tensor(-2152535657050944081)
    """
    return _mixed(torch.tensor(seed, dtype=torch.int64))


def fold_in(key: torch.Tensor, data: str | int | torch.Tensor) -> torch.Tensor:
    """A new key that depends on a key and a name, a number, or a 0-d integer tensor.

    >>> bool(fold_in(key(0), "w") == fold_in(key(0), "w")), bool(fold_in(key(0), "w") == fold_in(key(0), "v"))
    (True, False)
    """
    if isinstance(data, str):
        data = int.from_bytes(hashlib.sha256(data.encode()).digest()[:8], "big", signed=True)
    return _mixed(_mixed(key) ^ data)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64 arithmetic."""
    x = x + -7046029254386353131
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return x ^ (x >> 31 & (1 << 33) - 1)


def normal(key: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values of a shape, on the CPU.

    >>> torch.equal(normal(key(1), (2, 3)), normal(key(1), (2, 3)))
    True
    """
    return torch.ops.funcpipe_random.normal(key, list(shape), dtype)


def uniform(key: torch.Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values uniform in [0, 1), on the CPU.

    >>> bool((uniform(key(1), (100,)) < 1).all())
    True
    """
    return torch.ops.funcpipe_random.uniform(key, list(shape), dtype)


def _draw(how: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def draw(key: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return how(shape, dtype=dtype, generator=torch.Generator().manual_seed(int(key)))

    return draw


for _name, _how in (("normal", torch.randn), ("uniform", torch.rand)):
    _LIB.define(f"{_name}(Tensor key, int[] shape, ScalarType dtype) -> Tensor")
    _LIB.impl(_name, _draw(_how), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"funcpipe_random::{_name}", lambda key, shape, dtype: torch.empty(shape, dtype=dtype), lib=_LIB
    )


# ---- initialisers


def scaled_normal(shape: Sequence[int], std: float = 0.02, dtype: torch.dtype = torch.float32) -> Initialiser:
    """An initialiser: normal values of a standard deviation."""
    return lambda key: normal(key, shape, dtype) * std


def constant(shape: Sequence[int], value: float = 0.0, dtype: torch.dtype = torch.float32) -> Initialiser:
    """An initialiser: one value everywhere."""
    return lambda key: torch.full(tuple(shape), value, dtype=dtype)


def init(key: torch.Tensor, initialisers: Any) -> Any:
    """A tree of params from a tree of initialisers; every leaf draws from the key folded with its own path.

    >>> params = init(key(0), {"w": scaled_normal((2, 3)), "b": constant((3,))})
    >>> params["w"].shape, params["b"]
    (torch.Size([2, 3]), tensor([0., 0., 0.]))
    """
    leaves, spec = tree.flatten(initialisers)
    made = [make(fold_in(key, path)) for path, make in zip(tree.paths(initialisers), leaves, strict=True)]
    return tree.unflatten(spec, made)
