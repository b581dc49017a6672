#!/usr/bin/env bash
# Surprise: torch.utils.checkpoint recomputes with another dropout mask when the mask is drawn from a
# torch.Generator of one's own, and backward uses it without a warning.
# Guess: preserve_rng_state, on by default, or the check of recomputed metadata covers it.
# What happens: only the default generators are restored, so the gradient is that of another mask.
# Both variants, use_reentrant True and False.
# Remedy: draw the mask outside and pass it in.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   use_reentrant=True  default generator: 0 of 64 mask entries differ in backward
#   use_reentrant=True  own generator: 40 of 64 mask entries differ in backward
#   use_reentrant=False default generator: 0 of 64 mask entries differ in backward
#   use_reentrant=False own generator: 40 of 64 mask entries differ in backward
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import warnings

import torch
from torch.utils.checkpoint import checkpoint

warnings.simplefilter("error")  # nothing warns


def masks(reentrant, generator):
    def drop(x):
        keep = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        return x * keep

    x = torch.ones(64, requires_grad=True)
    if generator is None:
        torch.manual_seed(0)
    out = checkpoint(drop, x, use_reentrant=reentrant)
    out.sum().backward()
    return out.detach(), x.grad  # both are the mask


changed = {}
for reentrant in (True, False):
    for name in ("default generator", "own generator"):
        generator = None if name == "default generator" else torch.Generator().manual_seed(0)
        forward, backward = masks(reentrant, generator)
        changed[name, reentrant] = int((forward != backward).sum())
        print(
            f"use_reentrant={reentrant!s:5s} {name}: {changed[name, reentrant]} of 64 mask entries differ in backward"
        )
assert all((count > 0) == (name == "own generator") for (name, _), count in changed.items())
PY
env/bin/python see.py
