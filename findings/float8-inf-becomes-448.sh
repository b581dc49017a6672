#!/usr/bin/env bash
# Surprise: in torch a cast to float8_e4m3fn saturates, infinity included; NaN alone stays NaN.
# Guess: the format has no infinity, so what is too large becomes NaN, as in ml_dtypes and jax.
# What happens: 500, 65536 and inf all become 448 in torch. A check for overflow after the cast sees
# nothing. The sister format float8_e5m2 keeps inf and overflows to inf in all three libraries.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.5.4; Python 3.11, Linux x86-64, CPU.
# Seen:
#   float8_e4m3fn       448: torch    448  ml_dtypes    448  jax    448
#   float8_e4m3fn       465: torch    448  ml_dtypes    nan  jax    nan
#   float8_e4m3fn       500: torch    448  ml_dtypes    nan  jax    nan
#   float8_e4m3fn     65536: torch    448  ml_dtypes    nan  jax    nan
#   float8_e4m3fn       inf: torch    448  ml_dtypes    nan  jax    nan
#   float8_e4m3fn      -inf: torch   -448  ml_dtypes    nan  jax    nan
#   float8_e4m3fn       nan: torch    nan  ml_dtypes    nan  jax    nan
#   float8_e5m2         448: torch    448  ml_dtypes    448  jax    448
#   float8_e5m2         465: torch    448  ml_dtypes    448  jax    448
#   float8_e5m2         500: torch    512  ml_dtypes    512  jax    512
#   float8_e5m2       65536: torch    inf  ml_dtypes    inf  jax    inf
#   float8_e5m2         inf: torch    inf  ml_dtypes    inf  jax    inf
#   float8_e5m2        -inf: torch   -inf  ml_dtypes   -inf  jax   -inf
#   float8_e5m2         nan: torch    nan  ml_dtypes    nan  jax    nan
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.5.4

cat > see.py <<'PY'
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

INF = float("inf")
seen = {}
for name in ("float8_e4m3fn", "float8_e5m2"):
    for value in (448.0, 465.0, 500.0, 65536.0, INF, -INF, float("nan")):
        by_torch = torch.tensor(value).to(getattr(torch, name)).float().item()
        by_numpy = float(np.float32(value).astype(getattr(ml_dtypes, name)))
        by_jax = float(jnp.float32(value).astype(getattr(jnp, name)))
        seen[name, value] = (by_torch, by_numpy, by_jax)
        print(
            f"{name:14s} {value:8.0f}: torch {by_torch:6.0f}  ml_dtypes {by_numpy:6.0f}  jax {by_jax:6.0f}"
        )

torch_values = [seen["float8_e4m3fn", value][0] for value in (465.0, 500.0, 65536.0, INF)]
assert torch_values == [448.0] * 4
for value in (500.0, 65536.0, INF):
    assert np.isnan(seen["float8_e4m3fn", value][1:]).all()
assert all(by == INF for value in (65536.0, INF) for by in seen["float8_e5m2", value])
PY
env/bin/python see.py
