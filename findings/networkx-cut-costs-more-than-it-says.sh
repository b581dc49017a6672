#!/usr/bin/env bash
# Surprise: the value and the partition that nx.minimum_cut returns do not belong together.
# Guess: the edges of the partition sum to the value, up to rounding.
# What happens: with capacities in tenths the value is 1.8 and the partition costs 1.9. With the same
# capacities times ten, as integers, both are 18.
# Why: the partition is found by edges whose flow equals their capacity (maxflow.py). A sum of floats
# that should saturate an edge can end a last bit below it.
# Remedy: integer capacities.
#
# Versions: networkx 3.6.1; Python 3.11, Linux x86-64, CPU.
# Seen:
#   capacities 0.1 to 1.3: value 1.8000, edges of the partition sum to 1.9000, near side [0]
#   capacities 1 to 13:    value 18, edges of the partition sum to 18, near side [0, 1]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install -q networkx==3.6.1

cat > see.py <<'PY'
import networkx as nx

edges = [
    (0, 1, 3), (0, 2, 3), (0, 4, 13), (1, 0, 3), (1, 2, 1), (1, 4, 1), (2, 0, 1),
    (2, 1, 13), (2, 3, 11), (3, 1, 1), (3, 2, 1), (3, 4, 11), (4, 0, 3), (4, 3, 11),
]  # fmt: skip


def cut(parts):
    graph = nx.DiGraph()
    for tail, head, tenths in edges:
        graph.add_edge(tail, head, capacity=tenths / parts if parts > 1 else tenths)
    value, (near, far) = nx.minimum_cut(graph, 0, 4)
    price = sum(c for tail, head, c in graph.edges(data="capacity") if tail in near and head in far)
    return value, price, sorted(near)


float_value, float_price, float_near = cut(10)
value, price, near = cut(1)
print(
    f"capacities 0.1 to 1.3: value {float_value:.4f}, edges of the partition sum to {float_price:.4f}, near side {float_near}"
)
print(
    f"capacities 1 to 13:    value {value}, edges of the partition sum to {price}, near side {near}"
)
assert value == price == 18
assert abs(float_value - 1.8) < 1e-9 and abs(float_price - 1.9) < 1e-9
PY
env/bin/python see.py
