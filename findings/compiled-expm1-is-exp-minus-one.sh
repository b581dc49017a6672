#!/usr/bin/env bash
# Surprise: torch.compile on CPUs computes expm1 as exp(x) - 1, which expm1 is there to avoid.
# Guess: compiled float32 functions are within a few last bits of eager ones.
# What happens: expm1 of -1e-8 is 0 and of -1e-4 is off by 2e-4 relative, thousands of last bits.
# So are elu, selu, celu and atanh. log1p and tanh are right.
# Why: CppVecOverrides.expm1 and .atanh in torch/_inductor/codegen/cpp.py decompose the vectorised
# function "for a better performance".
# Needs a C++ compiler.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   expm1  of -1e-8: eager -1e-08, compiled 0; relative error at -1e-4: 1e-08, 2e-04
#   elu    of -1e-8: eager -1e-08, compiled 0; relative error at -1e-4: 1e-08, 2e-04
#   selu   of -1e-8: eager -1.76e-08, compiled 0; relative error at -1e-4: 3e-08, 2e-04
#   celu   of -1e-8: eager -1e-08, compiled 0; relative error at -1e-4: 1e-08, 2e-04
#   atanh  of -1e-8: eager -1e-08, compiled 0; relative error at -1e-4: 7e-08, 3e-04
#   log1p  of -1e-8: eager -1e-08, compiled -1e-08; relative error at -1e-4: 2e-08, 2e-08
#   tanh   of -1e-8: eager -1e-08, compiled -1e-08; relative error at -1e-4: 3e-09, 3e-09
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 setuptools==84.2.1

cat > see.py <<'PY'
import torch
from torch.nn import functional as F

small = torch.full((16,), -1e-8)
medium = torch.full((16,), -1e-4)
functions = {
    "expm1": torch.expm1,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "atanh": torch.atanh,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
}
lost = []
for name, function in functions.items():
    compiled = torch.compile(function)
    exact = function(medium.double())
    errors = []
    for result in (function(medium), compiled(medium)):
        errors.append(((result.double() - exact) / exact).abs().max().item())
    tiny = compiled(small)[0].item()
    eager = function(small)[0].item()
    print(
        f"{name:6s} of -1e-8: eager {eager:.3g}, compiled {tiny:.3g}; relative error at -1e-4: {errors[0]:.0e}, {errors[1]:.0e}"
    )
    if tiny == 0:
        lost.append(name)
assert lost == ["expm1", "elu", "selu", "celu", "atanh"], lost
PY
env/bin/python see.py
