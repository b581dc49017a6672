"""The runtime: everything from a transformed step to a step that runs.

- `planner.py`, `plan.py`: what will run, decided before it does; `reading.py`, `sizes.py`: a plan as text, its bytes.
- `predict.py`, `profile.py`, `record.py`: how long it will take, what units cost, how long it took.
- `runner.py`, `simulate.py`, `spmd.py`: the two runners; `rank.py`: one rank's step; `execute.py`: the loop over a program;
  `shards.py`: buckets; `home.py`: states that steps take over; `texts.py`: what is said of ranks that differ.
- `backend.py`: compiled units; `fuse.py`, `products.py`, `divide.py`: what they do better than one op after another.
- `capture.py`: a whole step in one CUDA graph.
- `launch.py`: the processes of a mesh on this machine.
"""
