"""Checksums: one number for the bits of a tensor, computed where it lies; the host reads the
numbers alone.

In: tensors, or any other leaves of a tree. Out: a number for each. Equal bits have equal numbers;
others have different ones but for chance.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch

# Words at a time. Their products take 256 KiB on a CPU, which its cache holds, and 512 KiB
# elsewhere: a step that just fits into memory still does.
_CHUNK = {"cpu": 1 << 15}
_LARGE = 1 << 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ODD = (
    -0x61C8864680B583EB
)  # 2**64 over the golden ratio; odd, so that a product with it loses nothing


def checksums(leaves: Sequence[Any]) -> list[int]:
    """A number for every leaf: for a tensor of its bits in row-major order, else of its ``repr``,
    without addresses.

    It depends on where a value stands, not on strides. No tensor is moved; one that is not
    contiguous is copied.

    >>> one, same, other = checksums([torch.ones(3), torch.ones(3, 2)[:, 0], torch.tensor([1.0, 1.0, 2.0])])
    >>> one == same, one == other
    (True, False)
    """
    out = [
        0 if isinstance(x, torch.Tensor) else text_sum(_ADDRESS.sub("", repr(x))) for x in leaves
    ]
    where: dict[torch.device, list[int]] = {}
    for i, x in enumerate(leaves):
        if isinstance(x, torch.Tensor) and x.device.type != "meta":
            where.setdefault(x.device, []).append(i)
    with torch.no_grad():
        for device, some in where.items():
            words = [_words(leaves[i]) for i in some]
            chunk = _CHUNK.get(device.type, _LARGE)
            weights = _weights(min(chunk, max(map(len, words))), device)
            numbers = torch.stack([_sum(x, weights) for x in words]).tolist()
            for i, n in zip(some, numbers, strict=True):
                out[i] = n
    return out


def text_sum(text: str) -> int:
    """A number for a text: 56 bits, so that a few more fit beside it in 64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _words(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as 32-bit integers, zeros at the end."""
    flat = x.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 4:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 4))
    elif flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(torch.int32)


def _weights(size: int, device: torch.device) -> torch.Tensor:
    """64-bit integers that look random. Sums of 32-bit words times these differ for different
    words, but in one of 2**32 cases (multilinear hashing; Lemire and Kaser 2014, "Strongly
    universal string hashing is fast")."""
    x = torch.arange(1, size + 1, device=device) * _ODD
    for shift in (32, 29):
        x ^= x >> shift
        x *= _ODD
    return x.bitwise_or_(1)


def _sum(words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    if len(words) <= len(weights):
        return (words * weights[: len(words)]).sum()
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for part in words.split(len(weights)):
        total = total * _ODD + (part * weights[: len(part)]).sum()
    return total
