"""The runtime: everything from a transformed step to a step that runs.

- `planning/pipeline.py`, `planning/plan.py`: what will run, decided before it does;
  `planning/plan_text.py`, `planning/plan_bytes.py`: a plan as text, its bytes.
- `planning/predict.py`, `profile_units.py`, `record.py`: how long it will take, what units cost,
  how long it took.
- `runner.py`, `simulate.py`, `spmd.py`: the two runners; `rank.py`: one rank's step;
  `interpreter.py`: the loop over a program; `weight_buckets.py`: buckets; `state_buffers.py`:
  states that steps take over; `mismatch_text.py`: what is said of ranks that differ.
- `backends/backend.py`: compiled units; `backends/fusion.py`, `backends/grad_accumulation.py`,
  `backends/grad_mean.py`: what they do better than one op after another.
- `cuda_graph.py`: a whole step in one CUDA graph.
- `launch.py`: the processes of a mesh on this machine.
"""
