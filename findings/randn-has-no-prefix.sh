#!/usr/bin/env bash
# Surprise: on CPUs torch.randn(n) is not the beginning of torch.randn(m) of the same seed.
# Guess: it is, as with torch.rand, or nothing agrees at all.
# What happens: below 16 numbers nothing agrees, at multiples of 16 everything, else all but the
# last 16, which are drawn again. So padding a vocabulary changes rows that were there before.
# float32 and float64 agree below 16 and are unrelated from 16 on. A transposed tensor gets another
# fill than a contiguous one of the same shape.
# Why: contiguous tensors of 16 or more use a vectorised Box-Muller over blocks of 16
# (normal_fill in aten's DistributionTemplates.h).
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   first 15 of randn(1024) that equal randn(15): 0; of rand: 15
#   first 16 of randn(1024) that equal randn(16): 16; of rand: 16
#   first 17 of randn(1024) that equal randn(17): 1; of rand: 17
#   first 24 of randn(1024) that equal randn(24): 8; of rand: 24
#   first 32 of randn(1024) that equal randn(32): 32; of rand: 32
#   first 40 of randn(1024) that equal randn(40): 24; of rand: 40
#   first 1000 of randn(1024) that equal randn(1000): 984; of rand: 1000
#   randn(15) drawn in float32 and in float64: equal
#   randn(16) drawn in float32 and in float64: unrelated
#   normal_ on a (4, 6) tensor and on a transposed (6, 4): equal False
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import torch


def draw(n, dtype=torch.float32, function=torch.randn):
    torch.manual_seed(0)
    return function(n, dtype=dtype)


long = draw(1024)
for n in (15, 16, 17, 24, 32, 40, 1000):
    same = int((draw(n) == long[:n]).sum())
    uniform = int((draw(n, function=torch.rand) == draw(1024, function=torch.rand)[:n]).sum())
    print(f"first {n} of randn(1024) that equal randn({n}): {same}; of rand: {uniform}")
    assert uniform == n
    assert same == (0 if n < 16 else n if n % 16 == 0 else n - 16)
for n in (15, 16):
    apart = (draw(n) - draw(n, torch.float64).float()).abs().max().item()
    print(f"randn({n}) drawn in float32 and in float64: {'equal' if apart == 0 else 'unrelated'}")
    assert (apart == 0) == (n == 15)
torch.manual_seed(0)
rows = torch.empty(4, 6).normal_()
torch.manual_seed(0)
columns = torch.empty(6, 4).t().normal_()
print("normal_ on a (4, 6) tensor and on a transposed (6, 4): equal", torch.equal(rows, columns))
assert not torch.equal(rows, columns)
PY
env/bin/python see.py
