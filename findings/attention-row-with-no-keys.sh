#!/usr/bin/env bash
# Surprise: what attention gives for a row whose keys are all masked depends on the entry point.
# Guess: NaN everywhere, or zeros everywhere.
# What happens: torch's sdpa and flex_attention give zeros for bool and -inf masks, and the mean of v
# for finfo.min. nn.MultiheadAttention gives NaN or zeros by need_weights, an argument that should
# only ask for a second output. jax gives the mean of v for a bool mask and NaN for a bias of -inf.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2; Python 3.11, Linux x86-64, CPU.
# Seen:
#   torch sdpa, bool mask                   zero       [0.0, 0.0]
#   torch sdpa, -inf mask                   zero       [0.0, 0.0]
#   torch sdpa, finfo.min mask              mean of v  [2.0, 20.0]
#   torch softmax(-inf mask) @ v            nan        [nan, nan]
#   torch flex_attention                    zero       [0.0, 0.0]
#   MultiheadAttention, need_weights=True   nan        [nan, nan]
#   MultiheadAttention, need_weights=False  zero       [0.0, 0.0]
#   jax dot_product_attention, bool mask    mean of v  [2.0, 20.0]
#   jax dot_product_attention, -inf bias    nan        [nan, nan]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2

cat > see.py <<'PY'
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

warnings.simplefilter("ignore")
q = torch.zeros(1, 1, 2, 2)
v = torch.tensor([[1.0, 10.0], [3.0, 30.0]]).reshape(1, 1, 2, 2)
keep = torch.tensor([[True, True], [False, False]])  # row 1 sees nothing
minus_inf = torch.zeros(2, 2).masked_fill(~keep, -float("inf"))
smallest = torch.zeros(2, 2).masked_fill(~keep, torch.finfo(torch.float32).min)


def multihead(need_weights):
    layer = torch.nn.MultiheadAttention(2, 1, bias=False, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(2).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(2))
        return layer(q[0], q[0], v[0], attn_mask=~keep, need_weights=need_weights)[0]


def in_jax(**mask):
    to_jax = lambda x: jnp.asarray(x.transpose(1, 2).numpy())
    return jax.nn.dot_product_attention(to_jax(q), to_jax(q), to_jax(v), **mask)


score = lambda s, batch, head, i, j: torch.where(keep[i, j], s, -float("inf"))
rows = {
    "torch sdpa, bool mask": F.scaled_dot_product_attention(q, q, v, attn_mask=keep),
    "torch sdpa, -inf mask": F.scaled_dot_product_attention(q, q, v, attn_mask=minus_inf),
    "torch sdpa, finfo.min mask": F.scaled_dot_product_attention(q, q, v, attn_mask=smallest),
    "torch softmax(-inf mask) @ v": minus_inf.softmax(-1) @ v[0, 0],
    "torch flex_attention": flex_attention(q, q, v, score_mod=score),
    "MultiheadAttention, need_weights=True": multihead(True),
    "MultiheadAttention, need_weights=False": multihead(False),
    "jax dot_product_attention, bool mask": in_jax(mask=jnp.asarray(keep.numpy())[None, None]),
    "jax dot_product_attention, -inf bias": in_jax(bias=jnp.asarray(minus_inf.numpy())[None, None]),
}
kinds = {}
for name, out in rows.items():
    row = np.asarray(out, dtype=np.float64).reshape(2, 2)[1]
    kinds[name] = "nan" if np.isnan(row).all() else "zero" if (row == 0).all() else "mean of v"
    print(f"{name:40s}{kinds[name]:10s} {row.tolist()}")
assert list(kinds.values()) == [
    "zero",
    "zero",
    "mean of v",
    "nan",
    "zero",
    "nan",
    "zero",
    "mean of v",
    "nan",
]
PY
env/bin/python see.py
