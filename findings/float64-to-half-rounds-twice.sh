#!/usr/bin/env bash
# Surprise: a cast from float64 to a half type does not give the nearest number.
# Guess: a cast rounds once, to nearest even, whatever library does it.
# What happens: torch, jax and ml_dtypes cast by way of float32. A number a hair above the middle
# of two neighbours loses the hair first, and the tie then goes to the even neighbour below.
# numpy alone, for float16, rounds once. So float64 references of half precision kernels made with
# numpy and with torch may differ in the last bit.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.5.4; Python 3.11, Linux x86-64, CPU.
# Seen:
#   float16   numpy                        1.0009765625  nearest
#   float16   torch                        1.0           not the nearest
#   float16   torch, from a Python float   1.0           not the nearest
#   float16   jax                          1.0           not the nearest
#   bfloat16  numpy + ml_dtypes            1.0           not the nearest
#   bfloat16  torch                        1.0           not the nearest
#   bfloat16  jax                          1.0           not the nearest
#   a little over half of float16's smallest: numpy 5.960464477539063e-08 torch 0.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.5.4

cat > see.py <<'PY'
import jax

jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

# A hair above the middle between 1 and the next number: the nearest one is the upper.
half_value = 1 + 2**-11 + 2**-40
brain_value = 1 + 2**-8 + 2**-40
half_up, brain_up = 1 + 2**-10, 1 + 2**-7

rows = {
    ("float16", "numpy"): float(np.float64(half_value).astype(np.float16)),
    ("float16", "torch"): torch.tensor(half_value, dtype=torch.float64).half().item(),
    ("float16", "torch, from a Python float"): torch.tensor(half_value, dtype=torch.float16).item(),
    ("float16", "jax"): float(jnp.float64(half_value).astype(jnp.float16)),
    ("bfloat16", "numpy + ml_dtypes"): float(np.float64(brain_value).astype(ml_dtypes.bfloat16)),
    ("bfloat16", "torch"): torch.tensor(brain_value, dtype=torch.float64).bfloat16().item(),
    ("bfloat16", "jax"): float(jnp.float64(brain_value).astype(jnp.bfloat16)),
}
right = {}
for (dtype, who), value in rows.items():
    nearest = half_up if dtype == "float16" else brain_up
    right[dtype, who] = value == nearest
    print(
        f"{dtype:9s} {who:28s} {value:<13} {'nearest' if value == nearest else 'not the nearest'}"
    )
assert [key for key, fine in right.items() if fine] == [("float16", "numpy")]

smallest = 2.0**-24  # of float16; 0.5 * smallest and a little more rounds up to it
tiny = smallest / 2 + 2.0**-60
print(
    "a little over half of float16's smallest: numpy",
    float(np.float16(tiny)),
    "torch",
    torch.tensor(tiny, dtype=torch.float64).half().item(),
)
assert np.float16(tiny) == smallest and torch.tensor(tiny, dtype=torch.float64).half() == 0
PY
env/bin/python see.py
