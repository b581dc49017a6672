"""Graph: a loss function becomes one joint graph, and the graph becomes units.

Read in this order:

- `trace.py`: runs the loss and its gradient on fakes, and records one graph with markers. Beside
  it: `fake_tensors.py` and `traceable.py` (how a function runs on fakes), `restore.py` (leaves no
  fakes behind), `functionalize.py` (no op in place), `grouped_mm.py` (fakes of one op),
  `trace_errors.py` (what is refused).
- `ops.py`: what a node's op says of it. `node_labels.py`: to which unit every node belongs.
- `remat.py`, `remat_min_cut.py`: which forward values a backward half computes again.
- `partition.py`: units, and the values between them. `unit_code.py`: what runs inside one.
"""
