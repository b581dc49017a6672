"""The runtime: everything from a transformed step to a step that runs.

- `planner.py`, `plan.py`: what will run, decided before it does; `reading.py`, `sizes.py`: a plan as text, its bytes.
- `predict.py`, `profile.py`, `record.py`: how long it will take, what units cost, how long it took.
- `runner.py`: `simulate` and `spmd`; `rank.py`: one rank's step; `execute.py`: the loop over a program; `shards.py`: buckets.
- `backend.py`, `capture.py`: compiled units; a whole step in one CUDA graph.
- `launch.py`: the processes of a mesh on this machine.
"""
