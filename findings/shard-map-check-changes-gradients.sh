#!/usr/bin/env bash
# Surprise: switching off a check changes the result.
# Guess: check_vma=False skips a validation, and accepted programs compute the same.
# What happens: the gradient of psum(x**2) taken inside is 2x with the check and 8x without on four
# devices. The gradient by a replicated weight is summed over devices with the check, and is the local
# part without. The gradient taken from outside is the same.
# Why: the check's types (does a value vary over the axis?) also steer transposition: with them
# psum's transpose is a broadcast and a replicated value's use is transposed to a psum; without
# them psum transposes to psum.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   check_vma=True: gradient of psum(x^2) taken inside [2.0, 4.0, 6.0, 8.0]
#       of sum(w * x) by the replicated w, on each device [10.0, 10.0, 10.0, 10.0]
#       of psum(x^2) taken outside [2.0, 4.0, 6.0, 8.0]
#   check_vma=False: gradient of psum(x^2) taken inside [8.0, 16.0, 24.0, 32.0]
#       of sum(w * x) by the replicated w, on each device [1.0, 2.0, 3.0, 4.0]
#       of psum(x^2) taken outside [2.0, 4.0, 6.0, 8.0]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6

cat > see.py <<'PY'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((4,), ("rank",), axis_types=(AxisType.Auto,))
x = jnp.arange(1.0, 5.0)  # one number on each device


def inside_psum(part):
    return jax.grad(lambda y: jax.lax.psum(y**2, "rank").sum())(part)


def weight_gradient(weight, part):
    return jax.grad(lambda w: (w * part).sum())(weight)[None]


def outside(part):
    return jax.lax.psum(part**2, "rank")


seen = {}
for check in (True, False):

    def run(body, specs, out, *args, check=check):
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check)(*args)

    psum = run(inside_psum, P("rank"), P("rank"), x).tolist()
    weight = run(weight_gradient, (P(), P("rank")), P("rank"), jnp.float32(1.0), x).tolist()
    whole = jax.grad(lambda t: run(outside, P("rank"), P(), t).sum())(x).tolist()
    seen[check] = (psum, weight, whole)
    print(f"check_vma={check}: gradient of psum(x^2) taken inside {psum}")
    print(f"    of sum(w * x) by the replicated w, on each device {weight}")
    print(f"    of psum(x^2) taken outside {whole}")
assert seen[True] == ([2.0, 4.0, 6.0, 8.0], [10.0] * 4, [2.0, 4.0, 6.0, 8.0])
assert seen[False] == ([8.0, 16.0, 24.0, 32.0], [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0])
PY
env/bin/python see.py
