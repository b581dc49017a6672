#!/usr/bin/env bash
# Surprise: torch's forward and reverse mode disagree about one function at one point.
# Guess: at a tie a convention is chosen once per function, so jvp and vjp agree.
# What happens: for torch.clamp with a tensor as bound, and for fmax, forward mode says 0 and
# reverse mode says 1. clamp with a number says 1 in both, maximum says 0.5 in both.
# atan2(0, 0) is nan in forward mode and 0 in reverse mode.
# Zeros at a bound are usual: relu-like clamps of sparse or freshly initialised values. A test that
# checks jvp against vjp fails there, and neither side is a bug of the user's function.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   torch.maximum(x, t)       at x = t = 0: value 0, forward 0.5, reverse 0.5
#   torch.clamp(x, min=0.0)   at x = t = 0: value 0, forward 1.0, reverse 1.0
#   torch.clamp(x, min=t)     at x = t = 0: value 0, forward 0.0, reverse 1.0
#   torch.clamp(x, max=t)     at x = t = 0: value 0, forward 0.0, reverse 1.0
#   torch.fmax(x, t)          at x = t = 0: value 0, forward 0.0, reverse 1.0
#   torch.fmin(x, t)          at x = t = 0: value 0, forward 1.0, reverse 1.0
#   torch.relu(x)             at x = t = 0: value 0, forward 0.0, reverse 0.0
#   torch.atan2(x, t)         at x = t = 0: value 0, forward nan, reverse 0.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import torch
from torch.func import jvp, vjp

one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
cases = {
    "torch.maximum(x, t)": lambda x: torch.maximum(x, zero),
    "torch.clamp(x, min=0.0)": lambda x: torch.clamp(x, min=0.0),
    "torch.clamp(x, min=t)": lambda x: torch.clamp(x, min=zero),
    "torch.clamp(x, max=t)": lambda x: torch.clamp(x, max=zero),
    "torch.fmax(x, t)": lambda x: torch.fmax(x, zero),
    "torch.fmin(x, t)": lambda x: torch.fmin(x, zero),
    "torch.relu(x)": torch.relu,
    "torch.atan2(x, t)": lambda x: torch.atan2(x, zero),
}
disagree = []
for name, function in cases.items():
    _, forward = jvp(function, (zero,), (one,))
    value, pull = vjp(function, zero)
    (reverse,) = pull(one)
    same = torch.equal(forward, reverse)
    print(
        f"{name:25s} at x = t = 0: value {value.item():.0f}, forward {forward.item()}, reverse {reverse.item()}"
    )
    if not same:
        disagree.append(name)
assert disagree == [
    "torch.clamp(x, min=t)",
    "torch.clamp(x, max=t)",
    "torch.fmax(x, t)",
    "torch.atan2(x, t)",
], disagree
PY
env/bin/python see.py
