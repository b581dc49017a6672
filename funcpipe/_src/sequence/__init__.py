"""Sequence parallelism: a rank works on its positions; attention alone sees the whole sequence.

A step's own code is not changed. Attention, positions, dropout and the vocabulary-parallel loss ask
the hook of `functional/dispatch.py`. In plain PyTorch none is bound, and each computes what it
says. While a rank's loss is traced, the hook of this room makes the rank's ops of them.

How one sequence is split is a `functional/sequence_layout.py`: over the axes of rings, and within a
ring rank over the axes of head exchanges. That a rank so computes its positions of what one device
computes is proved before, op by op (`proof/verify.py`); the proof says how each operand is split.

Read in this order:

- `rewrite`: the hook.
- `ulysses`: attention over a split sequence (DeepSpeed-Ulysses), with `head_exchange`, its two
  all-to-alls, and `split_bias`.
- `ring`: keys and values travel around a ring; `ring_tiles` says what a rank computes at each step,
  and `blockwise` computes it.

In: an intercepted call, and how its operands are split over ranks.
Out: ops of one rank, with collectives by axis name.
"""
