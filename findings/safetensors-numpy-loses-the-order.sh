#!/usr/bin/env bash
# Surprise: safetensors.numpy saves a Fortran-ordered array, and what is loaded is another matrix.
# Guess: arrays are copied to C order, as np.save does or keeps track of, or refused, as
# safetensors.torch refuses a tensor that is not contiguous.
# What happens: the buffer is written as it lies, under the array's shape. Shape, dtype and sum are
# right, the elements stand in other places. The documentation asks for contiguous arrays; nothing
# checks it, and an array in Fortran order is contiguous by numpy's flags.
# Remedy: np.ascontiguousarray before saving.
#
# Versions: torch 2.13.0, numpy 2.4.6, safetensors 0.8.0; Python 3.11, Linux x86-64, CPU.
# Seen:
#   C order          saved [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], loaded [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
#   Fortran order    saved [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], loaded [[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]
#   transposed view  saved [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], loaded [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
#   safetensors.torch, transposed: You are trying to save a non contiguous tensor
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 safetensors==0.8.0

cat > see.py <<'PY'
import numpy as np
import torch
from safetensors import numpy as st_numpy
from safetensors import torch as st_torch

rows = np.arange(6.0).reshape(2, 3)
arrays = {"C order": rows, "Fortran order": np.asfortranarray(rows), "transposed view": rows.T}
same = {}
for name, array in arrays.items():
    st_numpy.save_file({"x": array}, "a.safetensors")
    back = st_numpy.load_file("a.safetensors")["x"]
    same[name] = np.array_equal(back, array)
    print(f"{name:16s} saved {array.tolist()}, loaded {back.tolist()}")
assert same == {"C order": True, "Fortran order": False, "transposed view": False}
st_numpy.save_file({"x": np.ascontiguousarray(rows.T)}, "a.safetensors")
assert np.array_equal(st_numpy.load_file("a.safetensors")["x"], rows.T)
try:
    st_torch.save_file({"x": torch.from_numpy(rows).t()}, "a.safetensors")
    refusal = None
except ValueError as error:
    refusal = str(error)
print("safetensors.torch, transposed:", refusal.split(":")[0])
assert "non contiguous" in refusal
PY
env/bin/python see.py
