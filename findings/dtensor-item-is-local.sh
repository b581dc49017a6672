#!/usr/bin/env bash
# Surprise: .item(), float() and bool() of a reduced DTensor give the rank's own part.
# Guess: they give the global value, as printing a full tensor would, or raise.
# What happens: a sum over a sharded dim is pending (Partial) until something needs it, and .item()
# does not count as that. A logged loss is wrong, and `if (x > 5).any():` takes another branch on
# each rank. Adding 1 first makes .item() right, multiplying by 1 does not.
# In the same state, fill_(2.0) sets each rank's part, so the tensor becomes 4 on two ranks.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   x.sum().item()                       rank 0: 3.0, rank 1: 13.0
#   float(x.max())                       rank 0: 2.0, rank 1: 10.0
#   bool((x > 5).any())                  rank 0: False, rank 1: True
#   (x.sum() * 1).item()                 rank 0: 3.0, rank 1: 13.0
#   (x.sum() + 1).item()                 rank 0: 17.0, rank 1: 17.0
#   x.sum().full_tensor().item()         rank 0: 16.0, rank 1: 16.0
#   x.sum(0).fill_(2.0).full_tensor()    rank 0: 4.0, rank 1: 4.0
#   torch.full_like(x.sum(), 2.0)        rank 0: 2.0, rank 1: 2.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import logging
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor


def rank_main(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, 10.0]), mesh, (Shard(0),))
    seen = {
        "x.sum().item()": x.sum().item(),
        "float(x.max())": float(x.max()),
        "bool((x > 5).any())": bool((x > 5).any()),
        "(x.sum() * 1).item()": (x.sum() * 1).item(),
        "(x.sum() + 1).item()": (x.sum() + 1).item(),
        "x.sum().full_tensor().item()": x.sum().full_tensor().item(),
        "x.sum(0).fill_(2.0).full_tensor()": x.sum(0).fill_(2.0).full_tensor().item(),
        "torch.full_like(x.sum(), 2.0)": torch.full_like(x.sum(), 2.0).full_tensor().item(),
    }
    both = [None, None]
    dist.all_gather_object(both, seen)
    if rank == 0:
        for name in seen:
            print(f"{name:36s} rank 0: {both[0][name]}, rank 1: {both[1][name]}")
    assert [both[0]["x.sum().item()"], both[1]["x.sum().item()"]] == [3.0, 13.0]
    assert [both[0]["float(x.max())"], both[1]["float(x.max())"]] == [2.0, 10.0]
    assert [both[0]["bool((x > 5).any())"], both[1]["bool((x > 5).any())"]] == [False, True]
    assert both[0]["(x.sum() + 1).item()"] == both[1]["(x.sum() + 1).item()"] == 17.0
    assert both[0]["x.sum(0).fill_(2.0).full_tensor()"] == 4.0
    assert both[0]["torch.full_like(x.sum(), 2.0)"] == 2.0
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), 2)
PY
env/bin/python see.py "$folder"
