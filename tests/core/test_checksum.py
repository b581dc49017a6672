"""Checksums: equal for equal bits, whatever the layout; another one for any change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcpipe._src.core import checksum
from funcpipe._src.core.checksum import checksums

DTYPES = [
    torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_depends_on_bits_and_not_on_layout(dtype):
    whole = torch.arange(18).reshape(6, 3).remainder(2).to(dtype)
    view, copy = whole[1:], whole[1:].clone()  # does not begin where 32 bits do
    turned = copy.t().contiguous().t()
    changed = copy.clone()
    changed[4, 2] = 0
    a, b, c, d = checksums([view, copy, turned, changed])
    assert a == b == c != d


@given(st.data())
def test_any_change_of_one_element_and_any_swap_is_seen(data):
    n = data.draw(st.integers(2, 50))
    values = st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5])
    x = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64)
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    y, z = x.clone(), x.clone()
    y[i], y[j] = x[j], x[i]
    z[i] = x[i] + data.draw(st.sampled_from([1.0, -3.0, 2.0**-40]))
    numbers = checksums([x, y, z])
    assert (numbers[0] == numbers[1]) == torch.equal(x, y)
    assert numbers[0] != numbers[2]


def test_swaps_far_apart_are_seen():
    """Zeros and ones have equal low bits; positions a power of two apart have nearly equal weights
    in simpler sums."""
    seen = []
    for k in range(12):
        x = torch.zeros(4096, dtype=torch.float64)
        x[2**k] = 1
        seen.append(x)
    assert len(set(checksums(seen))) == len(seen)


def test_a_tensor_in_several_pieces(monkeypatch):
    monkeypatch.setattr(checksum, "_CHUNK", {"cpu": 8})
    x = torch.arange(50.0)
    swapped = torch.cat([x[8:16], x[:8], x[16:]])  # whole pieces
    a, b, c = checksums([x, x.clone(), swapped])
    assert a == b != c


def test_what_is_no_tensor_and_what_is_empty():
    assert checksums([]) == []
    one, true, text, empty, meta = checksums(
        [1, True, "1", torch.zeros(0), torch.empty(3, device="meta")]
    )
    assert len({one, true, text}) == 3 and empty == meta == 0
    assert all(0 <= n < 2**56 for n in (one, true, text))


def test_a_conjugate_that_is_not_computed_yet():
    x = torch.tensor([1 + 2j, 3 - 1j])
    a, b, c = checksums([x.conj(), x.conj().resolve_conj(), x])
    assert a == b != c
