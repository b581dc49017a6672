#!/usr/bin/env bash
# Surprise: a nested tensor made by torch.nested.narrow shows the right rows and sums wrong ones.
# Guess: sum() of a nested tensor is the sum of its rows.
# What happens: sum, mean and max read the whole buffer, padding between the rows included. numel
# is right, unbind is right, and sum(dim=1) refuses with a clear message; the full reductions, by
# which a loss is made, say nothing. A contiguous copy is right.
# A second one: to_padded_tensor with an output_size that is too short cuts rows without a word.
#
# Versions: torch 2.13.0, numpy 2.4.6; Python 3.11, Linux x86-64, CPU.
# Seen:
#   rows of the narrowed tensor: [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]
#   numel: 6 and of the copy 6
#   sum(): 621, of the copy 21
#   mean(): 51.75, of the copy 3.5
#   max(): 100, of the copy 6
#   (view * 2).sum(): 1242.0
#   sum(dim=1): sum(): reducing across the ragged dimension is not supported for non-contiguous nested tensors with holes
#   to_padded_tensor(output_size=(3, 2)): [[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > see.py <<'PY'
import warnings

import torch

warnings.simplefilter("ignore")
padded = torch.tensor(
    [[1.0, 2.0, 100.0, 100.0], [3.0, 100.0, 100.0, 100.0], [4.0, 5.0, 6.0, 100.0]]
)
lengths = torch.tensor([2, 1, 3])
view = torch.nested.narrow(
    padded, 1, torch.zeros(3, dtype=torch.long), lengths, layout=torch.jagged
)
copy = torch.nested.nested_tensor([row[:n] for row, n in zip(padded, lengths)], layout=torch.jagged)

print("rows of the narrowed tensor:", [row.tolist() for row in view.unbind()])
assert [row.tolist() for row in view.unbind()] == [row.tolist() for row in copy.unbind()]
print("numel:", view.numel(), "and of the copy", copy.numel())
seen = {}
for name in ("sum", "mean", "max"):
    seen[name] = (getattr(view, name)().item(), getattr(copy, name)().item())
    print(f"{name}(): {seen[name][0]:g}, of the copy {seen[name][1]:g}")
doubled = (view * 2).sum().item()
print("(view * 2).sum():", doubled)
try:
    view.sum(dim=1)
    by_dim = "a value"
except RuntimeError as error:
    by_dim = str(error)
print("sum(dim=1):", by_dim)
assert seen == {"sum": (621.0, 21.0), "mean": (51.75, 3.5), "max": (100.0, 6.0)}
assert doubled == 1242.0 and "holes" in by_dim

short = torch.nested.to_padded_tensor(copy, 0.0, (3, 2))
print("to_padded_tensor(output_size=(3, 2)):", short.tolist())
assert short.tolist() == [[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]]
PY
env/bin/python see.py
