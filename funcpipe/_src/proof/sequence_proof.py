"""The result of a proof: how the operands of every known call are split over ranks.

The trace finds a call again by its *signature*: the shapes of its tensors on a rank, and what else
it was given.

In: findings, as the proof comes to known calls. Out: the finding for a call of the trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.proof.align import AlignedTensor, Differs, OpCall
from funcpipe._src.proof.rules import Finding, Sliced
from funcpipe.errors import SequenceError


@dataclass(frozen=True)
class SequenceProof:
    """How the operands of known calls, and the `Rows` of aux, are split over ranks.

    Args:
        calls: a finding for every signature of a known call.
        rows: for every `Rows` in aux, in order, the dim of positions and their layout.
    """

    calls: Mapping[tuple, Finding] = field(default_factory=dict)
    rows: tuple[Sliced, ...] = ()

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: Spec,
    ) -> Held:
        """How the operands of an attention are split."""
        operands = {
            "q": query,
            "k": key,
            "v": value,
            "bias": spec.bias,
            "cu_seqlens": spec.cu_seqlens,
            "causal": spec.causal,
        }
        found = self._look_up("attention", operands)
        assert isinstance(found, Held)
        return found

    def positions(self, tensor: Tensor, dim: int) -> SequenceLayout | None:
        """The layout of the positions along a dim; None: every rank has all of them."""
        return self._layout("positions", {"x": tensor, "dim": dim})

    def cross_entropy(
        self,
        tokens: Tensor,
        head: Tensor | None,
        labels: Tensor,
        options: Any,
    ) -> SequenceLayout | None:
        """The layout of the tokens; None: every rank has all of them."""
        operands = {"x": tokens, "head": head, "labels": labels, "options": options}
        return self._layout("cross_entropy", operands)

    def _layout(self, name: str, operands: dict[str, Any]) -> SequenceLayout | None:
        found = self._look_up(name, operands)
        assert found is None or isinstance(found, SequenceLayout)
        return found

    def dropout(self, tensor: Tensor, rate: float, key: Tensor) -> Sliced:
        """The dim of positions, if it is not among the dims of the key, and their layout."""
        found = self._look_up("dropout", {"x": tensor, "key": key, "rate": rate})
        assert found is None or isinstance(found, tuple)
        return found

    def _look_up(self, name: str, operands: dict[str, Any]) -> Finding:
        signature = _signature(name, operands)
        if signature not in self.calls:
            raise SequenceError(
                f"fp.{name} with operands of shapes {signature[1:]} was not called when the proof "
                "ran the loss function: what a loss function does must not change from one call "
                "to the next"
            )
        return self.calls[signature]


class Findings:
    """Collects findings by signature."""

    def __init__(self) -> None:
        self.calls: dict[tuple, Finding] = {}

    def note(self, name: str, call: OpCall, finding: Finding) -> None:
        """Note what a proof found of a known call.

        Raises:
            SequenceError: it found something else of a call with the same signature.
        """
        signature = _signature(name, call.args)
        known = self.calls.setdefault(signature, finding)
        if known != finding:
            raise SequenceError(
                f"{call.where}: another call of fp.{name} has operands of the same shapes, but "
                f"they are split otherwise ({finding} here, {known} there), and funcpipe could not "
                "tell the two apart. Give one of them another shape, for instance another number "
                "of dims or rows"
            )


def _signature(name: str, operands: Mapping[str, Any]) -> tuple:
    return (name, *(_mark(operands[key]) for key in operands if key != "scale"))


def _mark(value: Any) -> Any:
    if isinstance(value, Differs | AlignedTensor):
        return value.local
    return tuple(value.shape) if isinstance(value, Tensor) else value
