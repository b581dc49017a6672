"""All files of rules: importing them registers their rules in `rules.py`.

In: nothing. Out: the modules.
"""

from __future__ import annotations

from funcpipe._src.proof import (
    rules_attention,
    rules_bags,
    rules_batched,
    rules_collectives,
    rules_edges,
    rules_gradients,
    rules_index,
    rules_known_calls,
    rules_losses,
    rules_matmul,
    rules_pointwise,
    rules_reduction,
    rules_row_collectives,
    rules_row_loops,
    rules_row_numbers,
    rules_row_order,
    rules_row_reductions,
    rules_view,
)

OF_OPS = (
    rules_pointwise,
    rules_reduction,
    rules_matmul,
    rules_losses,
    rules_view,
    rules_index,
    rules_batched,
    rules_gradients,
    rules_bags,
)
OF_CALLS = (rules_attention, rules_known_calls, rules_collectives)
OF_ROWS = (
    rules_row_numbers,
    rules_row_order,
    rules_row_loops,
    rules_row_reductions,
    rules_row_collectives,
    rules_edges,
)
