#!/usr/bin/env bash
# Surprise: a valid training step that runs in eager mode fails when it is traced.
# Guess: aot_eager and make_fx on fakes reproduce eager; fakes have the strides of real tensors.
# What happens: the backward kernels of softplus, elu and hardswish lay their result out as the
# gradient, their fakes as the input. Autograd on fakes then writes a `view` that the real result
# does not allow, after a transpose between a matmul and the activation. gelu, silu, tanh are right.
# The inductor backend has kernels of its own and is not affected.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   softplus   make_fx on fakes: view size is not compatible with input tensor's size and stride | aot_eager: view size is not compatible with input tensor's size and stride
#   elu        make_fx on fakes: view size is not compatible with input tensor's size and stride | aot_eager: view size is not compatible with input tensor's size and stride
#   hardswish  make_fx on fakes: view size is not compatible with input tensor's size and stride | aot_eager: view size is not compatible with input tensor's size and stride
#   gelu       make_fx on fakes: right | aot_eager: right
#   silu       make_fx on fakes: right | aot_eager: right
#   tanh       make_fx on fakes: right | aot_eager: right
#   strides of softplus_backward: real (18, 3, 1) fake (18, 1, 6)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import warnings

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

warnings.simplefilter("ignore")
torch.manual_seed(0)
weight, x, scale = torch.randn(5, 6, requires_grad=True), torch.randn(2, 3, 5), torch.randn(2, 6, 3)


def attempt(activation, run):
    def loss(w):
        hidden = activation(torch.matmul(x, w).transpose(1, 2))
        return (hidden * scale).sum()

    def gradient(w):
        return torch.autograd.grad(loss(w), w)[0]

    wanted = gradient(weight)
    try:
        got = run(loss, gradient)
    except RuntimeError as error:
        return str(error).split(" (")[0]
    return "right" if torch.allclose(got, wanted, atol=1e-5) else "wrong"


def traced(loss, gradient):
    def with_inputs(w):
        return gradient(w)

    graph = make_fx(with_inputs, tracing_mode="fake", _allow_non_fake_inputs=True)(weight)
    return graph(weight)


def aot_eager(loss, gradient):
    torch._dynamo.reset()
    return torch.autograd.grad(torch.compile(loss, backend="aot_eager")(weight), weight)[0]


activations = {
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
failed = []
for name, activation in activations.items():
    results = [attempt(activation, run) for run in (traced, aot_eager)]
    print(f"{name:10s} make_fx on fakes: {results[0]} | aot_eager: {results[1]}")
    if all("view size" in result for result in results):
        failed.append(name)
g, h = torch.randn(2, 6, 3), torch.randn(2, 3, 6).transpose(1, 2)
with FakeTensorMode() as mode:
    fake = torch.ops.aten.softplus_backward(
        mode.from_tensor(g), mode.from_tensor(h), 1, 20
    ).stride()
real = torch.ops.aten.softplus_backward(g, h, 1, 20).stride()
print("strides of softplus_backward: real", real, "fake", fake)
assert real != fake
assert failed == ["softplus", "elu", "hardswish"], failed
PY
env/bin/python see.py
