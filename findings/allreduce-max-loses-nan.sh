#!/usr/bin/env bash
# Surprise: a NaN may vanish in an all-reduce MAX, and whether it does depends on who holds it.
# Guess: MAX and MIN keep NaN as torch.maximum and jnp.maximum do, or drop it always.
# What happens: with gloo, rank 0's NaN survives in one half of the tensor and rank 1's in the
# other. So max and the infinity norm of a DTensor can be finite though the tensor holds NaN, and
# a check for overflow may miss it. On CPU devices, jax.lax.pmax drops NaN too, while the same
# program under vmap keeps it. SUM always keeps it.
# Why: the reduction compares with < or >, which is false for NaN, so the order of the two operands
# decides; gloo lets each rank reduce another part of the tensor.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2; Python 3.11, Linux x86-64, CPU.
# Seen:
#   gloo MAX, NaN by turns on rank 0 and 1: [nan, 1.0, nan, 1.0, 1.0, nan, 1.0, nan]
#   gloo MIN, the same:                    [nan, 1.0, nan, 1.0, 1.0, nan, 1.0, nan]
#   gloo SUM, the same:                    [nan, nan, nan, nan, nan, nan, nan, nan]
#   tensor [1, 2, nan, 3]: max nan | as DTensor 2.0
#   its infinity norm:          nan | as DTensor 2.0
#   jax pmax of 1..4 with NaN on device 0, 1, 2, 3: [4.0, 4.0, 4.0, 3.0]
#   the same program under vmap:                    [nan, nan, nan, nan]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2

cat > see.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

NAN = float("nan")


def rank_main(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    # Even places: rank 0 holds NaN and rank 1 holds 1. Odd places: the other way round.
    mine = [NAN if place % 2 == rank else 1.0 for place in range(8)]
    largest = torch.tensor(mine)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    smallest = torch.tensor(mine)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    total = torch.tensor(mine)
    dist.all_reduce(total, dist.ReduceOp.SUM)

    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.tensor([[1.0], [2.0], [NAN], [3.0]])
    mesh = dist.init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(whole, mesh, (Shard(0),))
    sharded_max = sharded.max().full_tensor().item()
    sharded_norm = torch.linalg.vector_norm(sharded, float("inf")).full_tensor().item()
    if rank == 0:
        print("gloo MAX, NaN by turns on rank 0 and 1:", largest.tolist())
        print("gloo MIN, the same:                   ", smallest.tolist())
        print("gloo SUM, the same:                   ", total.tolist())
        print("tensor [1, 2, nan, 3]: max", whole.max().item(), "| as DTensor", sharded_max)
        norm = torch.linalg.vector_norm(whole, float("inf")).item()
        print("its infinity norm:         ", norm, "| as DTensor", sharded_norm)
    kept = [place for place in range(8) if largest[place].isnan()]
    assert kept == [place for place in range(8) if smallest[place].isnan()]
    assert kept == [0, 2, 5, 7], kept
    assert total.isnan().all()
    assert (sharded_max, sharded_norm) == (2.0, 2.0)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), 2)
PY
env/bin/python see.py "$folder"

cat > see_jax.py <<'PY'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

mesh = jax.make_mesh((4,), ("rank",), axis_types=(AxisType.Auto,))


def on_devices(values):
    def body(x):
        return jax.lax.pmax(x, "rank")

    spec = PartitionSpec("rank")
    return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())(values)[0]


def under_vmap(values):
    return jax.vmap(lambda x: jax.lax.pmax(x, "rank"), axis_name="rank")(values)[0]


devices, vmapped = [], []
for place in range(4):
    values = jnp.arange(1.0, 5.0).at[place].set(jnp.nan)
    devices.append(float(on_devices(values)))
    vmapped.append(float(under_vmap(values)))
print("jax pmax of 1..4 with NaN on device 0, 1, 2, 3:", devices)
print("the same program under vmap:                   ", vmapped)
assert all(value != value for value in vmapped)
assert any(value == value for value in devices)
PY
env/bin/python see_jax.py
