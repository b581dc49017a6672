"""The proof of splits: what each rank computes of its share adds up to what one device computes.

A transform splits a sequence by positions, or a batch by rows. The loss function itself does not
change: it runs on a rank's share of the batch. That is right only if nothing but a known call (an
attention, of positions) mixes shares, and if the loss is a sum over them. This room proves it, or
refuses the loss function by op, line, reason and cure, before anything runs. There are two proofs,
of positions (`verify.py`) and of rows (`rows.py`); they share everything else.

Read the files in this order:

1. `verify.py`: the proof of positions, from end to end. `rows.py` and `row_loss.py` are the same
   for rows. Both say which dims are split and how a loss has to add up. `words.py` has the nouns
   and the advice with which errors speak of positions or of rows.
2. `loss_runs.py`: the loss function runs on fakes with the lengths of a rank, and again with those
   of one device. `op_recorder.py` writes its ops down as a `recording.py`, `custom_backward.py`
   those of gradients that the user wrote.
3. `align.py`: both recordings side by side, op by op. `loops.py` makes one turn of a loop over
   rows.
4. `placements.py`: how a tensor of a rank stands to that of one device (DTensor's `Replicate`,
   `Shard`, `Partial`), and the arithmetic of sums and products.
5. `propagate.py`: carries placements from op to op, through memory that tensors share
   (`aliasing.py`).
6. `rules.py`: the one registry of rules, and how `apply` asks them. `op_context.py`: what a rule
   sees. Then any of the rules:

   - of ops: `rules_pointwise.py`, `rules_reduction.py`, `rules_matmul.py`, `rules_losses.py`,
     `rules_view.py`, `rules_index.py`, `rules_batched.py`, `rules_bags.py`, `rules_gradients.py`;
   - of known calls and collectives: `rules_attention.py`, `rules_known_calls.py`,
     `rules_collectives.py`;
   - of what a part does with its rows: `rules_row_numbers.py`, `rules_row_order.py`,
     `rules_row_loops.py`, `rules_row_reductions.py`, `rules_row_collectives.py`, `rules_edges.py`.
     `constants.py` has the values of tensors that are made of numbers alone.

7. `sequence_proof.py`: the result, in which the trace looks known calls up.

How to add a rule for an op:

1. Add a body that uses the op to `tests/proof/test_allowed.py` (or `test_rows_apart.py`), and one
   that misuses it to `tests/proof/test_refused_mixing.py` (or `test_rows_meet.py`). The first
   fails: "nothing is known of this op".
2. Write the rule in the file of its kind, or in a new file that `all_rules.py` imports::

       @rule("cumsum")
       def _running_sum(op: OpContext) -> Placement:
           refuse_mixing(op.operand(), [op.dim()], "takes a running sum")
           op.check_values()
           return kept(op.operand())

   The name is that of the op without its overload. `refuse_mixing` refuses dims that are split,
   `check_values` arguments that depend on the length of a share, `kept` sums. A rule has to hold
   for every value of its operands. A rule that is about rows alone says ``rows=True``.
3. Run ``pytest tests/proof``. It computes every allowed body on ranks and compares it with one
   device.
"""
