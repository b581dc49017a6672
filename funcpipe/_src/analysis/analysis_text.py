"""Analysis text: what is known of a step outside ``value_and_grad``, to read.

In: `StepAnalysis`. Out: its text, the same in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funcpipe._src.analysis.state import StepAnalysis


def analysis_text(analysis: StepAnalysis) -> str:
    """A line of counts, then a line for every param and for every leaf of the state."""
    counts = (
        f"params: {len(analysis.paths)}, leaves of the state: {len(analysis.state)}, "
        f"overwritable: {len(analysis.overwritable)}, value_and_grad: {len(analysis.calls)}, "
        f"global sums: {len(analysis.reductions)}"
    )
    lines = [counts]
    params = zip(analysis.paths, analysis.shapes, analysis.dtypes, strict=True)
    for path, shape, dtype in params:
        lines.append(f"  params{path}: {dtype} {shape}")
    state = zip(analysis.state_paths, analysis.state, strict=True)
    for number, (path, param) in enumerate(state):
        what = "replicated" if param is None else f"of params{analysis.paths[param]}"
        may = ", overwritable" if number in analysis.overwritable else ""
        lines.append(f"  state{path}: {what}{may}")
    return "\n".join(lines)
