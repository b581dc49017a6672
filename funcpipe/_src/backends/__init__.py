"""Backends: what runs the units of a program, and what binds a program to a rank.

- `bind.py`: a program with slots, ranks and functions filled in.
- `backend.py`: units op by op, or compiled.
- `fusion.py`, `joined_units.py`, `grad_accumulation.py`, `accumulate.py`: what a compiled backend
  does better than one unit after another.
- `grad_mean.py`: sums of gradients over the weight of the batch.
- `weight_buckets.py`: the collectives of sharded weights.
"""
