#!/usr/bin/env bash
# Surprise: safetensors.torch.save gives other bytes at each call for the same input.
# Guess: equal tensors and equal metadata give equal files: tensors are sorted by name.
# What happens: with several entries of metadata their order in the header is random, even within
# one process. Digests of files, and stores that are addressed by content, see a new file each time.
# Without metadata, or with one entry, the bytes are stable.
#
# Versions: torch 2.13.0, numpy 2.4.6, safetensors 0.8.0; Python 3.11, Linux x86-64, CPU.
# Seen:
#   50 saves of the same tensors in one process, different files:
#   no metadata: 1 | one entry: 1 | six entries: many
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat > see.py <<'PY'
import hashlib

import torch
from safetensors.torch import load, save

tensors = {"weight": torch.arange(4.0), "bias": torch.zeros(2)}
metadata = {
    "step": "7",
    "format": "pt",
    "model": "tiny",
    "rank": "0",
    "seed": "1",
    "dtype": "float32",
}
with_metadata = {hashlib.sha256(save(tensors, metadata)).hexdigest() for _ in range(50)}
without = {hashlib.sha256(save(tensors)).hexdigest() for _ in range(50)}
one_entry = {hashlib.sha256(save(tensors, {"format": "pt"})).hexdigest() for _ in range(50)}
print("50 saves of the same tensors in one process, different files:")
print(
    "no metadata:",
    len(without),
    "| one entry:",
    len(one_entry),
    "| six entries:",
    "many" if len(with_metadata) > 20 else len(with_metadata),
)
assert len(without) == len(one_entry) == 1 and len(with_metadata) > 20
assert torch.equal(load(save(tensors, metadata))["weight"], tensors["weight"])
PY
env/bin/python see.py
