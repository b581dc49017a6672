"""Sequence parallelism: every rank works on its slice of the sequence, and attention alone sees the
whole of it.

Terms. A *part* (`functional/sequence_layout.py`) says how one sequence is split over ranks: over
the axes of *rings*, and within each piece of a ring over the axes of *head exchanges*. A rank's
place among all of these is its *member* number. A tensor is *split* along a dim if a rank holds its
positions of it, *whole* if every rank holds the same, *partial* if the sum over ranks is meant.

The step's own code is not changed. Attention, positions and the vocabulary-parallel loss are
*calls* that funcpipe knows: in plain PyTorch they compute what they say; while a loss is planned a
*hook* is bound (`functional/dispatch.py`), and they ask it.

- `proof/verify.py`: the proof that a rank computes its positions of what one device computes. The
  loss function is run twice on fake tensors (`proof/op_recorder.py`, `proof/custom_backward.py`),
  as one rank sees it and on the whole sequence; both are compared op by op (`proof/align.py`), and
  `proof/propagate.py` carries `proof/placements.py` from op to op by rules:
  `proof/rules_pointwise.py`, `proof/rules_reduction.py`, `proof/rules_view.py`,
  `proof/rules_intrinsic.py`, each of which sees one op as a `proof/op_context.py`. What mixes
  positions outside of a known call is refused by name and line. *Findings* say how the operands of
  every known call lie on ranks.
- `rewrite.py`: the hook of the trace: known calls become what a rank does for them, by the
  findings.
- `functional/attention.py`: attention on whole sequences, `fp.attention`, and how calls of torch's
  own attention are caught.
- `ulysses.py`: slices of the sequence for heads and back, two exchanges around an attention
  (DeepSpeed-Ulysses).
- `ring.py`, `blockwise.py`: keys and values travel around a ring (ring attention, zigzag); one
  block of it.
- `functional/positions.py`: which positions a rank has. `functional/losses.py`: cross-entropy in
  chunks, and with the vocabulary over ranks.

In: a loss function, fakes, the parts of the batch's leaves. Out: findings; ops of a rank, with
collectives by axis name.
"""
