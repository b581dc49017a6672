"""Runtime: from a transformed step to a step that runs.

Read in this order:

- `runner.py`: what both runners have in common. `simulate.py`: every rank of a mesh in this
  process. `spmd.py`, `spmd_options.py`, `spmd_runner.py`: the rank that this process is.
- `rank.py`: one rank's step under a plan. `interpreter.py`: the loop over a program.
  `weight_buckets.py`: gathers and reductions of sharded weights. `metrics.py`: metrics that some
  ranks lack.
- `state_buffers.py`: states that a step writes in place. `captured_steps.py`, `cuda_graph.py`,
  `cuda_graph_memsets.py`: a whole step in one CUDA graph.
- `agreement.py`, `replicas.py`, `replica_watch.py`, `mismatch_text.py`: what ranks compare before
  they run, and what errors say.
- `profile_units.py`, `profile_pieces.py`, `profile_timing.py`: what units cost here. `record.py`:
  when the instructions of a step ran. `nonfinite.py`, `nonfinite_watch.py`, `nonfinite_ops.py`:
  where a NaN comes from.
- `launch.py`: the processes of a mesh on this machine.
"""
