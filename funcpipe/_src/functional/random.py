"""Randomness as data: a key is a tensor, and what is drawn from it depends on the key and the shape
alone.

A *key* is a 0-d int64 tensor. ``fold_in`` makes a new key of a key and a name or number. An
*initialiser* is a function from a key to a tensor. The same key gives the same bits on every mesh,
rank and device.

In a loss, randomness comes in through the batch: a key for every row (`keys`), split with the rows.
A number then depends on the row's key and the place in the row, so that it is the same on one
device and on every mesh, schedule and microbatch.

In: keys. Out: tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.describe_value import describe
from funcpipe._src.functional import dispatch as hook
from funcpipe.errors import TraceError

_LIB = torch.library.Library("funcpipe_random", "FRAGMENT")
Initialiser = Callable[[Tensor], Tensor]


def key(seed: int) -> Tensor:
    """A key from a seed: a 0-d int64 tensor on the CPU.

    >>> key(0)
    tensor(-2152535657050944081)
    """
    bits = torch.tensor(seed, dtype=torch.int64)
    return _mixed(bits)


def fold_in(key: Tensor, data: str | int | Tensor) -> Tensor:
    """A new key that depends on a key and a name, a number, or a 0-d integer tensor.

    >>> of_w = fold_in(key(0), "w")
    >>> bool(of_w == fold_in(key(0), "w")), bool(of_w == fold_in(key(0), "v"))
    (True, False)
    """
    if isinstance(data, str):
        digest = hashlib.sha256(data.encode()).digest()
        data = int.from_bytes(digest[:8], "big", signed=True)
    return _mixed(_mixed(key) ^ data)


def keys(key: Tensor, count: int) -> Tensor:
    """A key for every row of a batch: int64, ``(count,)``.

    >>> batch = {"x": torch.ones(4, 3), "key": keys(fold_in(key(0), "step 7"), 4)}
    >>> batch["key"].shape, len(batch["key"].unique())
    (torch.Size([4]), 4)
    """
    rows = torch.arange(count, device=key.device)
    return fold_in(key, rows)


def dropout(x: Tensor, rate: float, key: Tensor) -> Tensor:
    """Zeros in some places, chosen by a key, and everything else divided by ``1 - rate``.

    Args:
        x: of any floating dtype.
        rate: the probability of a zero, at least 0 and less than 1.
        key: int64, a key for every row: its shape is that of the leading dims of ``x``. Give every
            layer its own with ``fold_in(key, layer)``. One 0-d key for all will do where the batch
            is not split.

    Returns:
        a tensor like ``x``. Which places are zero depends on the row's key and the place in the
        row: on every mesh and schedule as on one device, also where the sequence is split, and
        where a checkpoint recomputes.

    Raises:
        TraceError: ``rate``, ``x`` or ``key`` is none; or a 0-d key, where a transform splits the
        batch.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": bits from a counter, not from
    a state.

    >>> x = torch.ones(2, 8)
    >>> y = dropout(x, 0.5, keys(key(0), 2))
    >>> sorted(y.unique().tolist()), torch.equal(y[1:], dropout(x[1:], 0.5, keys(key(0), 2)[1:]))
    ([0.0, 2.0], True)
    """
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise TraceError(f"dropout: rate={rate!r}; it is a probability, at least 0 and less than 1")
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        raise TraceError(
            f"dropout: the key is {describe(key)}; take it from fp.random.keys, as a leaf of the "
            "batch"
        )
    rows = x.shape[: key.dim()]
    if not x.is_floating_point() or key.shape != rows:
        raise TraceError(
            f"dropout: x is {describe(x)}, the key {describe(key)}; x takes floating-point "
            "numbers, and the key has a number for every row of it: its shape is that of the "
            "leading dims of x"
        )
    if rate == 0:
        return x
    asked = hook.current()
    if asked is None:
        return dropped(x, rate, key, {})
    return asked.dropout(x, rate, key)


def dropped(
    tensor: Tensor,
    rate: float,
    key: Tensor,
    numbers: Mapping[int, Tensor],
) -> Tensor:
    """`dropout`; ``numbers`` says, for a dim, which places of the whole its places are (else: all,
    in order)."""
    bits = key
    for dim in range(key.dim(), tensor.dim()):
        bits = bits.unsqueeze(-1)
        places = numbers.get(dim)
        if places is None:
            places = torch.arange(tensor.shape[dim], device=tensor.device)
        bits = _mixed(bits ^ places)
    fractions = _shifted(bits, 11)  # of 53 bits
    threshold = int(rate * (1 << 53))
    kept = fractions >= threshold
    return tensor.masked_fill(~kept, 0) / (1 - rate)


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64 arithmetic."""
    bits = bits + -7046029254386353131
    bits = bits ^ _shifted(bits, 30)
    bits = bits * -4658895280553007687
    bits = bits ^ _shifted(bits, 27)
    bits = bits * -7723592293110705685
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Shifted to the right, zeros from the left."""
    mask = (1 << 64 - count) - 1
    return bits >> count & mask


def normal(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal values of a shape, on the CPU.

    >>> torch.equal(normal(key(1), (2, 3)), normal(key(1), (2, 3)))
    True
    """
    return torch.ops.funcpipe_random.normal(key, list(shape), dtype)


def uniform(
    key: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values uniform in [0, 1), on the CPU.

    >>> bool((uniform(key(1), (100,)) < 1).all())
    True
    """
    return torch.ops.funcpipe_random.uniform(key, list(shape), dtype)


def _draw(how: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(int(key))
        return how(shape, dtype=dtype, generator=generator)

    return draw


def _fake(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


_DRAWS = {"normal": torch.randn, "uniform": torch.rand}
for _name, _how in _DRAWS.items():
    _LIB.define(f"{_name}(Tensor key, int[] shape, ScalarType dtype) -> Tensor")
    _LIB.impl(_name, _draw(_how), "CompositeExplicitAutograd")
    torch.library.register_fake(f"funcpipe_random::{_name}", _fake, lib=_LIB)


# ---- initialisers


def scaled_normal(
    shape: Sequence[int],
    std: float = 0.02,
    dtype: torch.dtype = torch.float32,
) -> Initialiser:
    """An initialiser: normal values of a standard deviation."""

    def make(key: Tensor) -> Tensor:
        return normal(key, shape, dtype) * std

    return make


def constant(
    shape: Sequence[int],
    value: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Initialiser:
    """An initialiser: one value everywhere."""

    def make(key: Tensor) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype)

    return make


def init(key: Tensor, initialisers: Any) -> Any:
    """A tree of params from a tree of initialisers; every leaf draws from the key folded with its
    own path.

    >>> params = init(key(0), {"w": scaled_normal((2, 3)), "b": constant((3,))})
    >>> params["w"].shape, params["b"]
    (torch.Size([2, 3]), tensor([0., 0., 0.]))
    """
    leaves, spec = tree.flatten(initialisers)
    found = []
    for path, make in zip(tree.paths(initialisers), leaves, strict=True):
        found.append(make(fold_in(key, path)))
    return tree.unflatten(spec, found)
