#!/usr/bin/env bash
# Surprise: torch.distributed.checkpoint is strict about shapes and lax about everything else.
# Guess: a checkpoint that does not fit the target raises, and `except Exception` catches it.
# What happens: a 0-d tensor does not load into shape (1,). But float loads into int, complex into
# float, 1e30 into float16, 300 into int8, all by cast. A saved list of three tensors fills a
# list of one and drops two, while a list of plain numbers grows the target to three. And the
# error that is raised, CheckpointException, is a BaseException: `except Exception` lets it pass.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   0-d tensor into shape (1,): CheckpointException
#   1.7 into int32: tensor([1], dtype=torch.int32)
#   300 into int8: tensor([44], dtype=torch.int8)
#   1.7 + 2j into float32: tensor([1.7000])
#   1e30 into float16: tensor([inf], dtype=torch.float16)
#   list of 3 tensors into a list of 1: [tensor([1.])]
#   list of 3 numbers into a list of 1: [1, 2, 3]
#   list of 1 tensor into a list of 3: CheckpointException
#   CheckpointException is an Exception: False
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import logging
import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def load(saved, target):
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
        try:
            dcp.load(target, checkpoint_id=folder, no_dist=True)
        except BaseException as error:  # not Exception: see below
            return type(error).__name__
    return target["x"]


def tensor(value, dtype=None):
    return torch.tensor(value, dtype=dtype)


seen = {
    "0-d tensor into shape (1,)": load({"x": tensor(3.0)}, {"x": torch.zeros(1)}),
    "1.7 into int32": load({"x": tensor([1.7])}, {"x": torch.zeros(1, dtype=torch.int32)}),
    "300 into int8": load({"x": tensor([300])}, {"x": torch.zeros(1, dtype=torch.int8)}),
    "1.7 + 2j into float32": load({"x": tensor([1.7 + 2j])}, {"x": torch.zeros(1)}),
    "1e30 into float16": load({"x": tensor([1e30])}, {"x": torch.zeros(1, dtype=torch.float16)}),
    "list of 3 tensors into a list of 1": load(
        {"x": [tensor([1.0]), tensor([2.0]), tensor([3.0])]}, {"x": [torch.zeros(1)]}
    ),
    "list of 3 numbers into a list of 1": load({"x": [1, 2, 3]}, {"x": [0]}),
    "list of 1 tensor into a list of 3": load(
        {"x": [tensor([1.0])]}, {"x": [torch.zeros(1) for _ in range(3)]}
    ),
}
for name, value in seen.items():
    print(f"{name}: {value}")
assert seen["0-d tensor into shape (1,)"] == "CheckpointException"
assert seen["1.7 into int32"].tolist() == [1] and seen["300 into int8"].tolist() == [44]
assert abs(seen["1.7 + 2j into float32"].item() - 1.7) < 1e-6
assert seen["1e30 into float16"].isinf().all()
assert [x.item() for x in seen["list of 3 tensors into a list of 1"]] == [1.0]
assert seen["list of 3 numbers into a list of 1"] == [1, 2, 3]
assert seen["list of 1 tensor into a list of 3"] == "CheckpointException"
print("CheckpointException is an Exception:", issubclass(CheckpointException, Exception))
assert not issubclass(CheckpointException, Exception)
PY
env/bin/python see.py
