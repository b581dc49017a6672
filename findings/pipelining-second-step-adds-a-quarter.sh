#!/usr/bin/env bash
# Surprise: gradient accumulation over two steps of torch.distributed.pipelining does not add up.
# Guess: schedule.step() twice without zero_grad gives twice the gradient, as backward() twice does.
# What happens: with 4 microbatches the second equal step gives 1.25 times, the third 1.3125 times.
# Why: at the end of a step all of param.grad is divided by the number of microbatches, also what
# earlier steps had already divided (scale_grads in torch/distributed/pipelining/stage.py).
# Remedy: scale_grads=False and a loss divided by hand, or one step per zero_grad.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   plain backward, three times:        gradient x [1.0, 2.0, 3.0]
#   ScheduleGPipe, 4 microbatches:      gradient x [1.0, 1.25, 1.3125]
#   Schedule1F1B, 4 microbatches:       gradient x [1.0, 1.25, 1.3125]
#   ScheduleGPipe, scale_grads=False:   gradient x [1.0, 2.0, 3.0]
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
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
torch.manual_seed(0)
x, target = torch.randn(8, 2), torch.randn(8, 1)


def loss(out, wanted):
    return (out - wanted).square().mean()


def growth(schedule_class, **options):
    model = torch.nn.Linear(2, 1)
    stage = PipelineStage(model, 0, 1, torch.device("cpu"))
    schedule = schedule_class(stage, 4, loss_fn=loss, **options)
    seen = []
    for _ in range(3):  # the same batch, and no zero_grad between
        schedule.step(x, target=target)
        seen.append(model.weight.grad.clone())
    return [round((grad / seen[0]).mean().item(), 4) for grad in seen]


model = torch.nn.Linear(2, 1)
plain = []
for _ in range(3):
    loss(model(x), target).backward()
    plain.append(model.weight.grad.clone())
expected = [round((grad / plain[0]).mean().item(), 4) for grad in plain]
print("plain backward, three times:        gradient x", expected)
gpipe, f1b1 = growth(ScheduleGPipe), growth(Schedule1F1B)
print("ScheduleGPipe, 4 microbatches:      gradient x", gpipe)
print("Schedule1F1B, 4 microbatches:       gradient x", f1b1)
unscaled = growth(ScheduleGPipe, scale_grads=False)
print("ScheduleGPipe, scale_grads=False:   gradient x", unscaled)
assert expected == unscaled == [1.0, 2.0, 3.0]
assert gpipe == f1b1 == [1.0, 1.25, 1.3125]
dist.destroy_process_group()
PY
env/bin/python see.py "$folder"
