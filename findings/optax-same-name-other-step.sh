#!/usr/bin/env bash
# Surprise: optimizers of one name and with equal settings take other steps in optax and in torch.
# Guess: in float64 all agree to rounding once learning rate and decay rates are set alike.
# What happens: sgd, adam, adamw, adamax, radam and adadelta agree. Relative to the distance moved:
# - amsgrad differs from step 2: optax takes the maximum after bias correction, torch before;
# - nadam differs by 40 % at step 1, also without momentum decay: torch then still halves beta1;
# - rprop: optax does not move at the first step, torch moves by the learning rate;
# - muon differs by 18 %.
# Gaps are the largest difference, divided by the largest distance from the start.
#
# Versions: torch 2.13.0, numpy 2.4.6, jax 0.10.2, jaxlib 0.10.2, optax 0.2.8; Python 3.11, Linux x86-64, CPU.
# Seen:
#   sgd, Nesterov              steps 1, 2, 6 apart by: equal, equal, equal
#   adam                       steps 1, 2, 6 apart by: equal, equal, equal
#   adamw                      steps 1, 2, 6 apart by: equal, equal, equal
#   adamax                     steps 1, 2, 6 apart by: equal, equal, equal
#   radam                      steps 1, 2, 6 apart by: equal, equal, equal
#   adadelta                   steps 1, 2, 6 apart by: equal, equal, equal
#   amsgrad                    steps 1, 2, 6 apart by: equal, 0.11, 0.25
#   nadam                      steps 1, 2, 6 apart by: 0.39, 0.39, 0.54
#   nadam, no momentum decay   steps 1, 2, 6 apart by: 0.39, 0.39, 0.54
#   rprop                      steps 1, 2, 6 apart by: 1.00, 0.55, 0.26
#   muon                       steps 1, 2, 6 apart by: 0.18, 0.19, 0.20
#   optax rprop moves at its first step: False
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8

cat > see.py <<'PY'
import jax

jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import optax
import torch

random = np.random.default_rng(0)
start = random.normal(size=(6, 4))
gradients = [random.normal(size=(6, 4)) for _ in range(6)]


def torch_steps(make):
    param = torch.nn.Parameter(torch.tensor(start.copy()))
    optimizer = make([param])
    seen = []
    for gradient in gradients:
        param.grad = torch.tensor(gradient)
        optimizer.step()
        seen.append(param.detach().numpy().copy())
    return seen


def optax_steps(transform):
    param = jnp.asarray(start)
    state = transform.init(param)
    seen = []
    for gradient in gradients:
        update, state = transform.update(jnp.asarray(gradient), state, param)
        param = optax.apply_updates(param, update)
        seen.append(np.asarray(param))
    return seen


optim, lr = torch.optim, 0.1
pairs = {
    "sgd, Nesterov": (
        lambda p: optim.SGD(p, lr, momentum=0.9, nesterov=True),
        optax.sgd(lr, 0.9, nesterov=True),
    ),
    "adam": (lambda p: optim.Adam(p, lr), optax.adam(lr)),
    "adamw": (lambda p: optim.AdamW(p, lr, weight_decay=0.1), optax.adamw(lr, weight_decay=0.1)),
    "adamax": (lambda p: optim.Adamax(p, lr), optax.adamax(lr)),
    "radam": (lambda p: optim.RAdam(p, lr), optax.radam(lr)),
    "adadelta": (lambda p: optim.Adadelta(p, lr, rho=0.9), optax.adadelta(lr, rho=0.9)),
    "amsgrad": (lambda p: optim.Adam(p, lr, amsgrad=True), optax.amsgrad(lr)),
    "nadam": (lambda p: optim.NAdam(p, lr), optax.nadam(lr)),
    "nadam, no momentum decay": (lambda p: optim.NAdam(p, lr, momentum_decay=0.0), optax.nadam(lr)),
    "rprop": (lambda p: optim.Rprop(p, lr), optax.rprop(lr)),
    "muon": (lambda p: optim.Muon(p, lr, weight_decay=0.0), optax.contrib.muon(lr)),
}
differ = []
for name, (make, transform) in pairs.items():
    mine, theirs = torch_steps(make), optax_steps(transform)
    apart = [np.abs(a - b).max() / np.abs(a - start).max() for a, b in zip(mine, theirs)]
    shown = ", ".join(
        "equal" if gap < 1e-6 else f"{gap:.2f}" for gap in (apart[0], apart[1], apart[5])
    )
    print(f"{name:26s} steps 1, 2, 6 apart by: {shown}")
    if max(apart) >= 1e-6:
        differ.append(name)
assert differ == ["amsgrad", "nadam", "nadam, no momentum decay", "rprop", "muon"], differ
first = optax_steps(optax.rprop(lr))[0]
print("optax rprop moves at its first step:", bool(np.abs(first - start).max() > 0))
assert np.array_equal(first, start)
PY
env/bin/python see.py
