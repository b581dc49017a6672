#!/usr/bin/env bash
# Surprise: for small weights the 8-bit format of GGUF is worse than the 4-bit one.
# Guess: Q8_0 is closer than Q5_0, and Q5_0 closer than Q4_0, at any scale.
# What happens: each block stores its scale in float16: the largest weight divided by 127 in Q8_0, by
# 8 in Q4_0. Below about 1e-5 the former leaves float16's normal range and below 3.8e-6 it is 0, so
# the whole block becomes 0, while Q4_0 keeps it. Layer scales of 1e-6 are such weights.
# Why: quantize_blocks of gguf/quants.py, which follows the reference in C.
#
# Versions: gguf 0.19.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   largest weight 1e+00: relative error Q8_0 0.006, Q5_0 0.045, Q4_0 0.090
#   largest weight 1e-04: relative error Q8_0 0.040, Q5_0 0.045, Q4_0 0.090
#   largest weight 1e-05: relative error Q8_0 0.351, Q5_0 0.063, Q4_0 0.092
#   largest weight 2e-06: relative error Q8_0 1.000, Q5_0 0.186, Q4_0 0.138
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q gguf==0.19.0 numpy==2.4.6

cat > see.py <<'PY'
import warnings

import numpy as np
from gguf import GGMLQuantizationType, quants

warnings.simplefilter("ignore")
random = np.random.default_rng(0)
block = random.normal(size=(4, 256)).astype(np.float32)
block /= np.abs(block).max()
errors = {}
for largest in (1.0, 1e-4, 1e-5, 2e-6):
    weights = block * np.float32(largest)
    for name in ("Q8_0", "Q5_0", "Q4_0"):
        kind = GGMLQuantizationType[name]
        back = quants.dequantize(quants.quantize(weights, kind), kind)
        errors[name, largest] = float(np.linalg.norm(back - weights) / np.linalg.norm(weights))
    shown = ", ".join(f"{name} {errors[name, largest]:.3f}" for name in ("Q8_0", "Q5_0", "Q4_0"))
    print(f"largest weight {largest:5.0e}: relative error {shown}")
assert errors["Q8_0", 1.0] < errors["Q5_0", 1.0] < errors["Q4_0", 1.0]
assert errors["Q8_0", 1e-5] > errors["Q4_0", 1e-5]
assert errors["Q8_0", 2e-6] > 0.9 and errors["Q4_0", 2e-6] < 0.15
PY
env/bin/python see.py
