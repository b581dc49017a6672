#!/usr/bin/env bash
# Surprise: after dist.reduce to rank 0 the tensors of the other ranks hold partial sums.
# Guess: they are inputs and stay as they were: "only rank dst receives the result".
# What happens: with gloo parts of them are overwritten, from rank to rank and from place to place
# differently. A gradient that is reduced to one rank is spoiled on the others.
# Why: the reduction runs in place as a ring of reduce-scatter steps.
# Remedy: reduce a copy.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   2 ranks, reduce to rank 0: rank 0 had 1, holds [11, 11, 11, 11, 11, 11]
#   2 ranks, reduce to rank 0: rank 1 had 10, holds [10, 10, 10, 10, 11, 11]
#   3 ranks, reduce to rank 0: rank 0 had 1, holds [111, 111, 111, 111, 111, 111]
#   3 ranks, reduce to rank 0: rank 1 had 10, holds [110, 110, 111, 111, 10, 10]
#   3 ranks, reduce to rank 0: rank 2 had 100, holds [100, 100, 101, 101, 111, 111]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_main(rank, folder, size):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size
    )
    mine = torch.full((6,), 10.0**rank)
    dist.reduce(mine, dst=0)
    rows = [torch.zeros(6) for _ in range(size)]
    dist.all_gather(rows, mine)
    if rank == 0:
        for other, row in enumerate(rows):
            print(
                f"{size} ranks, reduce to rank 0: rank {other} had {10**other}, holds {row.int().tolist()}"
            )
    assert (rows[0] == sum(10.0**other for other in range(size))).all()
    for other in range(1, size):
        assert (rows[other] != 10.0**other).any(), "untouched"
    dist.destroy_process_group()


if __name__ == "__main__":
    for size in (2, 3):
        mp.spawn(rank_main, (sys.argv[1], size), size)
PY
env/bin/python see.py "$folder"
