#!/usr/bin/env bash
# Surprise: scaled_dot_product_attention with a large finite mask has the right output and wrong
# gradients. Masks of finfo.min or -1e9 are common; a padding row that sees no key is enough.
# Guess: the row's softmax is uniform, so forward and backward both use weights that sum to 1.
# What happens: the flash kernel, the default on CPUs, uses weights that sum to 8 for a row of 8
# keys in backward. The math kernel is right. At -1e6 the weights are 3 % off in float32.
# Why: backward rebuilds the weights as exp(score - logsumexp) from the stored logsumexp. Beside
# 1e9 the log of the number of keys is lost to rounding, so each weight is exp(0) = 1.
# The same formula makes torch's gradient of logsumexp of four equal large numbers 1 each and not
# 1/4. jax has that one right, but its logaddexp has the fault, where torch is right.
# Remedy: masks of -inf or bool: then the row gives zeros, and zero gradients.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2; Python 3.11, Linux x86-64, CPU.
# Seen:
#   float32  bias  -3.4e+38: outputs alike; weights in backward: math 1.0000, flash 8.0000
#   float32  bias    -1e+09: outputs alike; weights in backward: math 1.0000, flash 8.0000
#   float32  bias    -1e+06: outputs alike; weights in backward: math 1.0000, flash 1.0299
#   float32  bias    -1e+04: outputs alike; weights in backward: math 1.0000, flash 1.0004
#   bfloat16 bias    -1e+09: outputs alike; weights in backward: math 1.0000, flash 8.0000
#   float64  bias  -3.4e+38: outputs alike; weights in backward: math 1.0000, flash 8.0000
#   default kernel: ScaledDotProductFlashAttentionForCpuBackward0
#   gradient of logsumexp of four 1e8: torch [1.0, 1.0, 1.0, 1.0] jax [0.25, 0.25, 0.25, 0.25]
#   gradient of logaddexp of two 1e8:  torch [0.5, 0.5] jax [1.0, 1.0]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2

cat > see.py <<'PY'
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 8, 16) for _ in range(3))


def weight_per_row(bias, dtype, backend):
    """Each row of softmax sums to one, so the gradient of sum(out) by v sums to the rows."""
    mask = torch.zeros(8, 8)
    mask[0] = bias  # one row of eight: a padding row, all its keys masked
    leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*leaves, attn_mask=mask.to(dtype))
    out[:, :, 0].sum().backward()
    return out.detach()[0, 0, 0], leaves[2].grad.double().sum().item() / 16


for dtype, bias in (
    (torch.float32, torch.finfo(torch.float32).min),
    (torch.float32, -1e9),
    (torch.float32, -1e6),
    (torch.float32, -1e4),
    (torch.bfloat16, -1e9),
    (torch.float64, torch.finfo(torch.float32).min),
):
    out_math, math = weight_per_row(bias, dtype, SDPBackend.MATH)
    out_flash, flash = weight_per_row(bias, dtype, SDPBackend.FLASH_ATTENTION)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(out_math, out_flash, atol=tolerance)
    name = str(dtype).removeprefix("torch.")
    print(
        f"{name:8s} bias {bias:9.2g}: outputs alike; weights in backward: math {math:.4f}, flash {flash:.4f}"
    )
    if bias < -1e8:
        assert abs(math - 1) < 2e-2 and abs(flash - 8) < 2e-2 or dtype == torch.float64
    if dtype == torch.float64:
        assert abs(flash - 8) < 1e-6

# The default choice on CPUs is the flash kernel.
leaves = [x.clone().requires_grad_() for x in (q, k, v)]
out = F.scaled_dot_product_attention(*leaves, attn_mask=torch.zeros(8, 8))
print("default kernel:", type(out.grad_fn).__name__)
assert "Flash" in type(out.grad_fn).__name__

import jax
import jax.numpy as jnp

x = torch.full((4,), 1e8, requires_grad=True)
x.logsumexp(0).backward()
y = torch.full((2,), 1e8, requires_grad=True)
torch.logaddexp(y[0], y[1]).backward()
jax_lse = jax.grad(jax.nn.logsumexp)(jnp.full(4, 1e8))
jax_pair = jax.grad(lambda t: jnp.logaddexp(t[0], t[1]))(jnp.full(2, 1e8))
print("gradient of logsumexp of four 1e8: torch", x.grad.tolist(), "jax", jax_lse.tolist())
print("gradient of logaddexp of two 1e8:  torch", y.grad.tolist(), "jax", jax_pair.tolist())
assert x.grad.sum() == 4 and jax_lse.sum() == 1
assert y.grad.sum() == 1 and jax_pair.sum() == 2
PY
env/bin/python see.py
