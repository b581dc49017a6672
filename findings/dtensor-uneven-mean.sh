#!/usr/bin/env bash
# Surprise: a mean loss of a DTensor is wrong when the shards have different lengths.
# Guess: a DTensor op gives the value of the whole tensor, or raises.
# What happens: 3 rows on 2 ranks: F.mse_loss and smooth_l1_loss give wrong values and wrong
# gradients, binary_cross_entropy_with_logits a wrong value with the right gradient. x.mean(),
# x.square().mean() and l1_loss are right.
# Why: these losses become local means with placement Partial("avg"), the mean of the ranks' means.
# For aten.mean itself torch/distributed/tensor/_ops/_math_ops.py knows that this holds for even
# shards only.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   x.mean(): one device 4.3333, two ranks 4.3333
#       gradient [0.333, 0.333, 0.333] and [0.333, 0.333, 0.333]
#   x.square().mean(): one device 35.0000, two ranks 35.0000
#       gradient [0.667, 1.333, 6.667] and [0.667, 1.333, 6.667]
#   F.mse_loss(x, 0): one device 35.0000, two ranks 51.2500
#       gradient [0.667, 1.333, 6.667] and [1.0, 2.0, 20.0]
#   F.smooth_l1_loss(x, 0): one device 3.8333, two ranks 5.2500
#       gradient [0.333, 0.333, 0.333] and [0.5, 0.5, 1.0]
#   F.binary_cross_entropy_with_logits(x, 0): one device 4.4801, two ranks 5.8601
#       gradient [0.244, 0.294, 0.333] and [0.244, 0.294, 0.333]
#   F.l1_loss(x, 0): one device 4.3333, two ranks 4.3333
#       gradient [0.333, 0.333, 0.333] and [0.333, 0.333, 0.333]
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
from torch.nn import functional as F

x = torch.tensor([[1.0], [2.0], [10.0]])
functions = {
    "x.mean()": lambda t: t.mean(),
    "x.square().mean()": lambda t: t.square().mean(),
    "F.mse_loss(x, 0)": lambda t: F.mse_loss(t, torch.zeros_like(t)),
    "F.smooth_l1_loss(x, 0)": lambda t: F.smooth_l1_loss(t, torch.zeros_like(t)),
    "F.binary_cross_entropy_with_logits(x, 0)": lambda t: F.binary_cross_entropy_with_logits(
        t, torch.zeros_like(t)
    ),
    "F.l1_loss(x, 0)": lambda t: F.l1_loss(t, torch.zeros_like(t)),
}


def rounded(tensor):
    return [round(number, 3) for number in tensor.flatten().tolist()]


def rank_main(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    wrong = []
    for name, function in functions.items():
        leaf = distribute_tensor(x, mesh, (Shard(0),)).requires_grad_()
        plain = x.clone().requires_grad_()
        value, wanted = function(leaf), function(plain)
        value.backward()
        wanted.backward()
        full, grad = value.full_tensor(), leaf.grad.full_tensor()
        if rank == 0:
            print(f"{name}: one device {wanted.item():.4f}, two ranks {full.item():.4f}")
            print("    gradient", rounded(plain.grad), "and", rounded(grad))
        wrong.append((not torch.allclose(full, wanted), not torch.allclose(grad, plain.grad)))
    fine = (False, False)
    assert wrong == [fine, fine, (True, True), (True, True), (True, False), fine], wrong
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (sys.argv[1],), 2)
PY
env/bin/python see.py "$folder"
