"""Mail: what travels over NCCL, as far as it can be seen without a GPU; the rest is in
tests/gpu."""

from __future__ import annotations

import torch

from funcpipe._src.comm.p2p import unmarked


def test_what_travels_is_the_same_memory_and_keeps_it() -> None:
    x = torch.arange(4, dtype=torch.uint8)
    y, where = unmarked(x), x.data_ptr()
    y[0] = 9
    assert x.tolist() == [9, 1, 2, 3] and y.data_ptr() == where
    assert y.untyped_storage()._cdata != x.untyped_storage()._cdata
    del x
    others = [torch.full((4,), 7, dtype=torch.uint8) for _ in range(100)]
    assert y.tolist() == [9, 1, 2, 3] and all(z.data_ptr() != where for z in others)
