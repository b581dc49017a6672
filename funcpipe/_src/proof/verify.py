"""The proof that a loss function, run on each rank's slice of the sequence, computes what one
device computes.

The loss function is run twice on fake tensors, with the lengths of a rank and with those of one
device, and both runs are compared op by op (`op_recorder.py`, `align.py`). A dim whose size differs
is one of positions; so it does not matter which sizes happen to be equal. From what comes in, the
state of every tensor follows by rules (`placements.py`, `rules_pointwise.py`, `propagate.py`); an
op that mixes positions, or that no rule knows, makes a tensor of which nothing is known, and the
loss must not come from one.

The proof holds for the lengths at hand: it is made for every kind of rank (`SequenceLayout.variant`).

In: a loss function; fakes of params and of one microbatch, as a rank has it. Out: `Findings`, or a
SequenceError that names the op, the line of the user's code, the reason and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funcpipe._src.core import pytree as tree
from funcpipe._src.core.loss_types import SCALAR_LOSS, Mean, Rows, is_summary
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe._src.core.source_lines import line_of
from funcpipe._src.functional.dispatch import Held, Spec
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.trace_errors import explain
from funcpipe._src.proof import rules_intrinsic as known
from funcpipe._src.proof.align import Differs, OpCall, Pair, Walk
from funcpipe._src.proof.loss_runs import Run, Subject
from funcpipe._src.proof.placements import (
    Average,
    Number,
    Partial,
    Refused,
    Replicate,
    Shard,
    State,
    World,
    as_partial,
    plain,
)
from funcpipe._src.proof.propagate import Proof
from funcpipe._src.proof.rules_intrinsic import Sliced
from funcpipe.errors import BatchError, FuncpipeError, SequenceError


@dataclass(frozen=True)
class Findings:
    """How the operands of known calls lie on ranks, found by their shapes; and the `Rows` of aux.

    Args:
        calls: a finding for every signature of a known call.
        rows: for every `Rows` in aux, in order, how it is split by positions.
    """

    calls: Mapping[tuple, known.Finding] = field(default_factory=dict)
    rows: tuple[Sliced, ...] = ()

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Spec) -> Held:
        """How the operands of an attention lie on ranks."""
        operands = {
            "q": q,
            "k": k,
            "v": v,
            "bias": spec.bias,
            "cu_seqlens": spec.cu_seqlens,
            "causal": spec.causal,
        }
        found = self._look_up("attention", operands)
        assert isinstance(found, Held)
        return found

    def positions(self, x: torch.Tensor, dim: int) -> SequenceLayout | None:
        """The part whose positions lie along a dim; None: every rank has all of them."""
        return self._part("positions", {"x": x, "dim": dim})

    def cross_entropy(
        self, x: torch.Tensor, head: torch.Tensor | None, labels: torch.Tensor, options: Any
    ) -> SequenceLayout | None:
        """The part that splits tokens; None: every rank has all of them."""
        return self._part(
            "cross_entropy", {"x": x, "head": head, "labels": labels, "options": options}
        )

    def _part(self, name: str, operands: dict[str, Any]) -> SequenceLayout | None:
        found = self._look_up(name, operands)
        assert found is None or isinstance(found, SequenceLayout)
        return found

    def dropout(self, x: torch.Tensor, rate: float, key: torch.Tensor) -> Sliced:
        """Along which dim, beyond those of the key, places of ``x`` are positions, and which."""
        found = self._look_up("dropout", {"x": x, "key": key, "rate": rate})
        assert found is None or isinstance(found, tuple)
        return found

    def _look_up(self, name: str, operands: dict[str, Any]) -> known.Finding:
        key = _signature(name, operands)
        if key not in self.calls:
            raise SequenceError(
                f"fp.{name} with operands of shapes {key[1:]} was not called when the loss "
                "function was examined: what a loss function does must not change from one call "
                "to the next"
            )
        return self.calls[key]


@dataclass(frozen=True)
class Task:
    """What is to be proven; the arguments of `examine`."""

    loss_fn: Callable
    has_aux: bool
    params: Any
    local: Sequence[Any]
    spec: Any
    sequences: Sequence[Sliced]
    member: int
    mode: FakeTensorMode
    mesh: Mesh
    axes: Axes


def examine(
    loss_fn: Callable,
    has_aux: bool,
    params: Any,
    local: Sequence[Any],
    spec: Any,
    sequences: Sequence[Sliced],
    member: int,
    mode: FakeTensorMode,
    mesh: Mesh,
    axes: Axes,
) -> Findings:
    """Prove that a loss function may run on slices of the sequence.

    Args:
        params: the full tree, of fakes of ``mode``.
        local, spec: the leaves of one microbatch as a rank has them, fakes or no tensors, and their
            structure.
        sequences: for every leaf along which dim it is split by positions, and how.
        member: of the rank; stands for all with the same `SequenceLayout.variant`.
        mesh, axes: which axes of which mesh a collective in the loss may name.

    Returns:
        how the operands of known calls lie on ranks.

    Raises:
        SequenceError: it cannot be proven, or no attention sees the sequence, as when the model
            calls one that funcpipe does not know.
        FuncpipeError: the loss function is wrong on one device, too.
    """
    findings = prove(
        Task(loss_fn, has_aux, params, local, spec, sequences, member, mode, mesh, axes)
    )
    if not any(isinstance(x, Held) and x.q is not None for x in findings.calls.values()):
        raise SequenceError(
            "the sequence is split, but no attention over it was seen: positions would never be "
            "mixed. Call torch.nn.functional.scaled_dot_product_attention or fp.attention (Hugging "
            "Face: attn_implementation='sdpa'), and look whether dims= names the dim of positions"
        )
    return findings


def prove(task: Task) -> Findings:
    """`examine`, for a loss function that need not call attention."""
    try:
        return _proven(task)
    except SequenceError as error:
        few = min((s[1].length(task.member) for s in task.sequences if s is not None), default=2)
        if few > 1:
            raise
        raise SequenceError(
            f"{error}. This rank has {few} positions of a sequence; with fewer than two, torch "
            "itself takes other ways. The loss function might be proven for fewer ranks, or for "
            "longer sequences"
        ) from error


def _proven(task: Task) -> Findings:
    lengths = {s[1]: _lengths(s[1], task.member) for s in task.sequences if s is not None}
    live = task.mesh.ordered(a for p in lengths for a in p.axes if task.mesh.axes[a] > 1)
    alone = Mesh(**{a: 1 if a in live else n for a, n in task.mesh.axes.items()})
    each = list(zip(task.local, task.sequences, strict=True))
    whole = [x if s is None else resized(x, s[0], lengths[s[1]][1], task.mode) for x, s in each]
    subject = Subject(task.loss_fn, task.has_aux, task.params, task.spec, task.mode, task.axes)
    on_rank, on_one = Run(subject, task.local, task.mesh), Run(subject, whole, alone)
    _raise(
        on_rank.error, on_one.error, task.loss_fn, all(b == p.size for p, (_, b) in lengths.items())
    )
    world, found = World(lengths, live), _Found()
    proof = Proof(Walk(on_rank.tape, on_one.tape, frozenset(live)), world, found)
    split = [
        Replicate() if s is None else Shard(*s) for x, s in each if isinstance(x, torch.Tensor)
    ]
    proof.run([*([Replicate()] * (on_rank.count - len(split))), *split])
    return Findings(found.calls, _Judge(on_rank, proof, world).rows())


def _lengths(part: SequenceLayout, member: int) -> tuple[int, int]:
    """How many positions a rank has, and one device: of a rank that has all of them, one device is
    given others."""
    own = part.length(member)
    return own, part.size if own != part.size else 2 * own + 1


def resized(x: torch.Tensor, dim: int, size: int, mode: FakeTensorMode) -> torch.Tensor:
    return fake((*x.shape[:dim], size, *x.shape[dim + 1 :]), x, mode)


def _raise(
    on_rank: Exception | None, on_one: Exception | None, loss_fn: Callable, real: bool
) -> None:
    """Raise what the runs raised; ``real``: one device has the lengths of the other run."""
    for error in (on_rank, on_one):
        if isinstance(error, SequenceError):
            raise error
    explained = None if on_rank is None else explain(on_rank, loss_fn)
    if explained is not None and (
        isinstance(explained, FuncpipeError) or (on_one is not None and real)
    ):
        raise explained from on_rank
    if on_one is not None and real and not isinstance(on_one, FuncpipeError):
        raise explain(on_one, loss_fn) from on_one
    error = on_rank or on_one
    if error is not None:
        where = (
            "on a rank, with its slice of the sequence"
            if on_rank
            else "on one device, with the whole sequence"
        )
        raise SequenceError(
            f"the loss function fails {where}{line_of(error) or ''}: {type(error).__name__}: "
            f"{error}. It has to work for every length: no table, mask or position is made for one "
            "length alone, unless it is split with the batch"
        ) from error


# ---- known calls


class _Found:
    """Collects findings by signature."""

    def __init__(self) -> None:
        self.calls: dict[tuple, known.Finding] = {}

    def __call__(self, name: str, call: OpCall, finding: known.Finding) -> None:
        key = _signature(name, call.args)
        if self.calls.setdefault(key, finding) != finding:
            raise SequenceError(
                f"{call.where}: another call of fp.{name} has operands of the same shapes, but "
                f"they lie on ranks otherwise ({finding} here, {self.calls[key]} there), and the "
                "two could not be told apart. Give one of them another shape, for instance "
                "another number of dims or rows"
            )


def _signature(name: str, operands: Mapping[str, Any]) -> tuple:
    """By what a known call is found again: the shapes of its tensors, and what else it was
    given."""
    return (name, *(_mark(operands[k]) for k in operands if k != "scale"))


def _mark(x: Any) -> Any:
    if isinstance(x, Differs):
        return x.a
    return x.a if isinstance(x, Pair) else tuple(x.shape) if isinstance(x, torch.Tensor) else x


# ---- what the loss function returned


class _Judge:
    """Judges what the loss function returned on a rank."""

    def __init__(self, one: Run, proof: Proof, world: World) -> None:
        self.one, self.proof, self.world = one, proof, world

    def rows(self) -> tuple[Sliced, ...]:
        """How the `Rows` of aux are split; refuses a loss that does not add up over ranks."""
        total, weight, aux = self.one.loss
        if weight is None:
            raise BatchError(SCALAR_LOSS.format(why="the sequence is split"))
        self._check_mean("Mean", Mean(total, weight))
        nodes: list[Any] = []
        names = tree.paths(tree.map(lambda x: nodes.append(x) or 0, aux, is_leaf=is_summary))  # type: ignore[func-returns-value]
        out: list[Sliced] = []
        for path, x in zip(names, nodes, strict=True):
            if isinstance(x, Mean):
                self._check_mean(f"aux{path}", x)
            elif isinstance(x, Rows):
                out.append(self._rows(f"aux{path}", x))
        return tuple(out)

    def _state(self, what: str, x: torch.Tensor) -> State:
        state = self.proof.states.get(
            self.one.tape.ref(x).number, Refused("It is a tensor that came from elsewhere")
        )
        if isinstance(state, Refused):
            raise SequenceError(f"{what} is not what one device computes. {state.text}")
        return state

    def _check_mean(self, what: str, x: Mean) -> None:
        self._check_sum(f"{what}.total", x.total)
        self._check_sum(f"{what}.weight", x.weight)

    def _check_sum(self, what: str, x: torch.Tensor) -> None:
        state = as_partial(self.world, self._state(what, x))
        if isinstance(state, Partial) and state.axes == self.world.live:
            return
        if isinstance(state, Average):
            raise SequenceError(
                f"{what} is a mean over a rank's positions: means of slices do not add up to the "
                "mean of the whole sequence. Return the sum (reduction='sum') as Mean.total, and "
                "the number of tokens as Mean.weight"
            )
        if isinstance(state, Number) and not state.constant:
            raise SequenceError(
                f"{what} is {state}, made from the length of a rank's slice: over ranks that does "
                "not add up. Return the number of tokens, such as "
                "torch.tensor(float(labels.numel()))"
            )
        raise SequenceError(
            f"{what} is {state}, so that the sum over ranks would hold it once for each of them: "
            "it has to come from the split sequence, as the number of tokens in it does. What "
            "does not (a penalty on params) is multiplied by that number"
        )

    def _rows(self, what: str, x: Rows) -> Sliced:
        state, dim = self._state(what, x.x), x.dim % x.x.dim()
        if isinstance(state, Shard) and (state.outer, state.inner) == (1, 1) and state.dim != dim:
            return state.dim, state.part
        if plain(state) and not self.proof.moves(self.one.tape.ref(x.x).number):
            return None
        raise SequenceError(
            f"{what}, fp.Rows along dim {dim}, is {state}: rows come whole, or have positions in a "
            "dim of their own, such as (rows, positions)"
        )
