#!/usr/bin/env bash
# Surprise: which sums in bfloat16 are computed in float32 inside, and which stop at 256.
# Guess: all kernels of one library accumulate alike, so 4,096 ones sum to 4096 everywhere.
# What happens: torch's scatter_add counts on and index_add stops at 256, where 256 + 1 rounds to
# 256. The gradient of index_select counts on, and the gradients of w[rows] and of F.embedding,
# which give the same rows, stop: a frequent token's gradient is lost in a bfloat16 table.
# embedding_bag's output is right and its gradient is not. jax's segment_sum and the gradient of
# indexing stop too. numpy sums an ml_dtypes array in bfloat16, and dot in float32.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.5.4; Python 3.11, Linux x86-64, CPU.
# Seen:
#   torch sum                           4096
#   torch cumsum, last                  4096
#   torch scatter_add                   4096
#   torch index_add                      256
#   torch index_put, accumulate          256
#   torch segment_reduce sum             256
#   torch sparse coalesce                256
#   torch gradient of w.gather          4096
#   torch gradient of w.index_select    4096
#   torch gradient of w[rows]            256
#   torch gradient of F.embedding        256
#   torch F.embedding_bag sum           4096
#   torch gradient of it                 256
#   numpy + ml_dtypes sum                256
#   numpy + ml_dtypes dot               4096
#   jax sum                             4096
#   jax cumsum, last                    4096
#   jax segment_sum                      256
#   jax gradient of w[rows]              256
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.5.4

cat > see.py <<'PY'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch.nn import functional as F

N = 4096
bf16 = torch.bfloat16
ones, zeros = torch.ones(N, dtype=bf16), torch.zeros(N, dtype=torch.long)
target = torch.zeros(1, dtype=bf16)


def grad_of(pick):
    weight = torch.zeros(2, 4, dtype=bf16, requires_grad=True)
    pick(weight).sum().backward()
    return weight.grad[0, 0]


np_ones = np.ones(N, ml_dtypes.bfloat16)
j_ones, j_zeros = jnp.ones(N, jnp.bfloat16), jnp.zeros(N, int)
j_target = jnp.zeros(1, jnp.bfloat16)
coo = torch.sparse_coo_tensor(zeros[None], ones, (1,), check_invariants=True)
index = zeros[:, None].expand(N, 4)
rows = {
    "torch sum": ones.sum(),
    "torch cumsum, last": ones.cumsum(0)[-1],
    "torch scatter_add": target.scatter_add(0, zeros, ones)[0],
    "torch index_add": target.index_add(0, zeros, ones)[0],
    "torch index_put, accumulate": target.index_put((zeros,), ones, accumulate=True)[0],
    "torch segment_reduce sum": torch.segment_reduce(ones, "sum", lengths=torch.tensor([N]))[0],
    "torch sparse coalesce": coo.coalesce().values()[0],
    "torch gradient of w.gather": grad_of(lambda w: w.gather(0, index)),
    "torch gradient of w.index_select": grad_of(lambda w: w.index_select(0, zeros)),
    "torch gradient of w[rows]": grad_of(lambda w: w[zeros]),
    "torch gradient of F.embedding": grad_of(lambda w: F.embedding(zeros, w)),
    "torch F.embedding_bag sum": F.embedding_bag(
        zeros[None], torch.ones(2, 4, dtype=bf16), mode="sum"
    )[0, 0],
    "torch gradient of it": grad_of(lambda w: F.embedding_bag(zeros[:, None], w, mode="sum")),
    "numpy + ml_dtypes sum": np_ones.sum(),
    "numpy + ml_dtypes dot": np_ones.dot(np_ones),
    "jax sum": j_ones.sum(),
    "jax cumsum, last": j_ones.cumsum()[-1],
    "jax segment_sum": jax.ops.segment_sum(j_ones, j_zeros, 1)[0],
    "jax gradient of w[rows]": jax.grad(lambda w: w[j_zeros].sum())(jnp.zeros(2, jnp.bfloat16))[0],
}
values = {name: float(value) for name, value in rows.items()}
for name, value in values.items():
    print(f"{name:34s}{value:6.0f}")
assert set(values.values()) == {256.0, 4096.0}
right = {name for name, value in values.items() if value == 4096}
assert right == {
    "torch sum",
    "torch cumsum, last",
    "torch scatter_add",
    "torch gradient of w.gather",
    "torch gradient of w.index_select",
    "torch F.embedding_bag sum",
    "numpy + ml_dtypes dot",
    "jax sum",
    "jax cumsum, last",
}
PY
env/bin/python see.py
