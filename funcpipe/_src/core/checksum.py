"""Checksums: one number for the bits of a tensor, computed where it lies; the host reads the
numbers alone.

In: tensors, or any other leaves of a tree. Out: a number for each. Equal bits have equal numbers;
others have different ones but for chance.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Words at a time. Their products take 256 KiB on a CPU, which its cache holds, and 512 KiB
# elsewhere: a step that just fits into memory still does.
_CHUNK = {"cpu": 1 << 15}
_LARGE = 1 << 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# 2**64 over the golden ratio; odd, so that a product with it loses nothing.
_ODD = -0x61C8864680B583EB


def checksums(leaves: Sequence[Any]) -> list[int]:
    """A number for every leaf: for a tensor of its bits in row-major order, else of its ``repr``,
    without addresses.

    It depends on where a value stands, not on strides. No tensor is moved; one that is not
    contiguous is copied.

    >>> ones, other = torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    >>> first, same, another = checksums([ones, torch.ones(3, 2)[:, 0], other])
    >>> first == same, first == another
    (True, False)
    """
    found = [0] * len(leaves)
    on_device: dict[Any, dict[int, Tensor]] = {}
    for place, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            text = _ADDRESS.sub("", repr(leaf))
            found[place] = text_sum(text)
        elif not leaf.is_meta:
            tensors = on_device.setdefault(leaf.device, {})
            tensors[place] = leaf
    for device, tensors in on_device.items():
        numbers = _sums_on(device, tensors.values())
        for place, number in zip(tensors, numbers, strict=True):
            found[place] = number
    return found


@torch.no_grad()
def _sums_on(device: Any, tensors: Iterable[Tensor]) -> list[int]:
    """The checksums of tensors of one device, which is asked for them once."""
    words_of_all = list(map(_words, tensors))
    longest = max(map(len, words_of_all))
    chunk = _CHUNK.get(device.type, _LARGE)
    size = min(chunk, longest)
    weights = _weights(size, device)
    sums = []
    for words in words_of_all:
        sums.append(_sum(words, weights))
    return torch.stack(sums).tolist()


def text_sum(text: str) -> int:
    """A number for a text: 56 bits, so that a few more fit beside it in 64."""
    encoded = text.encode()
    digest = hashlib.sha256(encoded).digest()
    return int.from_bytes(digest[:7], "big")


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as 32-bit integers, zeros at the end."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1)
    flat = flat.view(torch.uint8)
    missing = -flat.numel() % 4
    if missing:
        flat = pad(flat, (0, missing))
    elif flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def _weights(size: int, device: Any) -> Tensor:
    """64-bit integers that look random. Sums of 32-bit words times these differ for different
    words, but in one of 2**32 cases (multilinear hashing; Lemire and Kaser 2014, "Strongly
    universal string hashing is fast")."""
    weights = torch.arange(1, size + 1, device=device)
    weights *= _ODD
    for shift in (32, 29):
        weights ^= weights >> shift
        weights *= _ODD
    return weights.bitwise_or_(1)


def _sum(words: Tensor, weights: Tensor) -> Tensor:
    if len(words) <= len(weights):
        return _weighted(words, weights)
    total = weights.new_zeros(())
    chunk = len(weights)
    for part in words.split(chunk):
        total = total * _ODD
        total += _weighted(part, weights)
    return total


def _weighted(words: Tensor, weights: Tensor) -> Tensor:
    size = len(words)
    products = words * weights[:size]
    return products.sum()
