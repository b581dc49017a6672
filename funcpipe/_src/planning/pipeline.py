"""The planner: makes the plans of a step.

In: a resolved step, ``init_state``, the shapes of params and a batch. Out: a `Plan`, or any error
of ``funcpipe.errors`` that can be known before a step runs. Every rank makes the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from funcpipe._src.analysis import loss_checks as checks
from funcpipe._src.analysis.call_results import MADE_UP, with_values
from funcpipe._src.analysis.host_values import Follower
from funcpipe._src.analysis.outside_ops import Op
from funcpipe._src.analysis.rehearsal import Rehearsal
from funcpipe._src.analysis.state import PrimitiveCall, StepAnalysis, analyse
from funcpipe._src.analysis.tags import Tags
from funcpipe._src.collectives import bind_rank, names_axes
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.simulated import run_ranks
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.describe_value import describe
from funcpipe._src.core.inference_mode import without_inference
from funcpipe._src.core.loss_types import (
    AUX_LEAF,
    SCALAR_LOSS,
    Mean,
    Microbatches,
    Rows,
    is_summary,
)
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.core.mixed_precision import ROUNDED, computed
from funcpipe._src.functional.sequence_layout import SequenceLayout
from funcpipe._src.graph.fake_tensors import fake
from funcpipe._src.graph.node_labels import Nodes, read_nodes
from funcpipe._src.graph.partition import Units, cut
from funcpipe._src.graph.remat import check_used, rematerialise
from funcpipe._src.graph.trace import Traced, trace
from funcpipe._src.planning.batch_split import BatchSplit, plan_splits, signature
from funcpipe._src.planning.placement import Placement, place_params, rehearse
from funcpipe._src.planning.plan import Plan, PlannedCall, Stages
from funcpipe._src.planning.predict import as_costs, load_of
from funcpipe._src.planning.variants import Variants
from funcpipe._src.program import (
    Piece,
    Sharded,
    Sharding,
    check_alike,
    check_same_order,
    lower,
    owners,
    partial_segments,
    stage_edges,
)
from funcpipe._src.proof.loss_runs import Subject
from funcpipe._src.proof.rows import prove_rows
from funcpipe._src.proof.verify import SplitProof, prove_sequence
from funcpipe._src.schedule.actions import Schedule
from funcpipe._src.schedule.checker import check
from funcpipe._src.schedule.communication import insert_communication
from funcpipe._src.schedule.costs import Costs
from funcpipe._src.schedule.library import one_f_one_b
from funcpipe._src.schedule.search import Auto
from funcpipe._src.schedule.stage_assignment import group
from funcpipe._src.sequence.rewrite import rewriting
from funcpipe._src.spec.transform_spec import ResolvedStep
from funcpipe.errors import BatchError, CutError, ScheduleError, StateError


class CheckedLoss(NamedTuple):
    """What tracing one microbatch gave: its cut, the function that computes its weight from its
    tensors, and how heads that are `Rows` are split by positions."""

    cut: Units
    weight: GraphModule | None
    rows: dict[int, tuple[int, SequenceLayout]]


class Planner:
    """Makes the plans of a step: one for every shape of batch, all with the same stages and
    placement.

    Raises, while planning: every error of ``funcpipe.errors`` that can be known before a step runs.
    """

    def __init__(self, resolved: ResolvedStep, init_state: Callable, params: Any) -> None:
        self.resolved, self.init_state = resolved, init_state
        self.mode = FakeTensorMode()
        self.params = tree.map_tensors(lambda x: fake(x.shape, x, self.mode), params)
        self.cuts: dict[tuple, CheckedLoss] = {}
        self.variants: dict[tuple, Variants] = {}
        self.written: set[str] = set()  # what losses were seen to write
        # By the shapes of microbatches whose rows do not meet: whether their weights are exact.
        self.proven: dict[tuple, bool] = {}
        self.stages: dict[int, Stages] = {}
        self.settled: dict[int, tuple[int, ...]] = {}  # the ranks of a searched schedule's stages
        self.placement: Placement | None = None
        # What a runner is to rehearse as, before the first step; None where it is done.
        self.rehearsal: Rehearsal | None = None
        self.everywhere = False  # whether plans are made of rehearsals as every rank
        self.ops: tuple[Op, ...] = ()  # outside the calls, when a step was looked at last

    @property
    def plans(self) -> list[Plan]:
        """Those that are kept."""
        return [plan for variants in self.variants.values() for plan in variants.plans]

    def plan(self, batch: Any) -> Plan:
        """The plan for batches like this one, and for what the losses read from Python now."""
        variants = self.of(batch)
        variants.known()
        return self.chosen(batch, variants)

    def chosen(self, batch: Any, variants: Variants) -> Plan:
        """The plan that was known when it was asked for last; a new one where there was none."""
        return variants.chosen or self._look(batch, variants)

    def of(self, batch: Any) -> Variants:
        """The plans for batches like this one."""
        key = signature(batch)
        if key not in self.variants:
            self.variants[key] = Variants(self.resolved.step, self.written)
        return self.variants[key]

    def _look(self, batch: Any, variants: Variants) -> Plan:
        of_step, _ = variants.read()
        analysis, rehearsal = self._on_fakes(batch, variants.follower)
        self.ops = analysis.outside
        rehearsal.everywhere = self.everywhere or self.placement is not None
        placement = self._again(analysis, rehearsal, bool(variants.plans))
        plan = variants.of_calls(_read_by(analysis, placement))
        if plan is None:
            analysis = replace(analysis, calls=tuple(map(self._taken, analysis.calls)))
            calls = tuple(self._traced(k, call, analysis) for k, call in enumerate(analysis.calls))
            check_used(self.resolved.remats, [c.cuts[0].saved for c in calls])
            placement = self._place(analysis, rehearsal, calls, placement)
            plan = Plan(self.resolved, placement, calls)
            variants.keep(_read_by(analysis, placement), plan)
        for call in analysis.calls:
            call.reading.done()  # type: ignore[union-attr]
        variants.remember(of_step, plan)
        return plan

    def _traced(self, k: int, call: PrimitiveCall, analysis: StepAnalysis) -> PlannedCall:
        """A call, planned while its loss reads what it read at the call."""
        assert call.reading is not None
        with call.reading.restored(), call.reading.running():
            return self._call(k, self._computed(call), analysis)

    def _seen(self, call: PrimitiveCall, tags: Tags) -> PrimitiveCall:
        """A call as one device would trace it: computed, on the rows that come with a batch."""
        dtypes = tuple(self._whole_dtype(call, tags, k) for k in range(len(call.params)))
        batch = plan_splits(self.resolved, call.batch, call.origins).own_rows(call.batch)
        return replace(self._computed(call), dtypes=dtypes, batch=batch)

    def _taken(self, call: PrimitiveCall) -> PrimitiveCall:
        """A call whose batch has no fakes but those of the planner."""
        own = tree.map(
            lambda x: fake(x.shape, x, self.mode) if isinstance(x, FakeTensor) else x, call.batch
        )
        return replace(call, batch=own)

    def outside(self, batch: Any) -> tuple[Op, ...]:
        """What the step now computes outside its calls."""
        return self._on_fakes(batch)[0].outside

    def _on_fakes(
        self, batch: Any, follower: Callable[[int], Follower] | None = None
    ) -> tuple[StepAnalysis, Rehearsal]:
        """In a mode of its own: a loss function that closes over what the step sees is refused when
        it is traced."""
        r, batch = self.resolved, without_inference(batch)
        ranks = r.mesh.axis_size(r.row_axes) if r.local else 1
        return analyse(
            r.step,
            self.init_state,
            self.params,
            batch,
            FakeTensorMode(),
            self._seen,
            ranks,
            follower,
        )

    def _computed(self, call: PrimitiveCall) -> PrimitiveCall:
        """A call with the loss function that is traced."""
        p = self.resolved.precision
        return call if p is None else replace(call, loss_fn=computed(call.loss_fn, call.has_aux, p))

    def _again(
        self, analysis: StepAnalysis, rehearsal: Rehearsal, changed: bool
    ) -> Placement | None:
        """The placement of earlier plans for a step that does other things outside of its calls;
        None where there is none.

        Args:
            changed: whether Python values have changed, so that what ranks do is to be rehearsed
                again.
        """
        known = self.placement
        if known is None:
            return None
        if (known.analysis.state_spec, known.analysis.state) != (
            analysis.state_spec,
            analysis.state,
        ):
            raise StateError(
                f"init_state makes another state than at run.init: {analysis.state_spec}, not "
                f"{known.analysis.state_spec}. A Python value that it reads has changed: call "
                "run.init again, or keep the value"
            )
        alike = (known.analysis.sums, known.analysis.free) == (analysis.sums, analysis.free)
        if not changed and alike and tree.flatten(rehearsal.first.metrics)[1] == known.metrics_spec:
            return known
        owners, axes = [x.owners for x in known.layouts], [x.axes for x in known.layouts]
        return place_params(known.mesh, known.pipe_axis, analysis, rehearsal, owners, axes)

    def _place(
        self,
        analysis: StepAnalysis,
        rehearsal: Rehearsal,
        calls: Sequence[PlannedCall],
        placement: Placement | None,
    ) -> Placement:
        held: list[set[int]] = [set() for _ in analysis.paths]
        for c in calls:
            for m in set(c.cuts):
                for i, places in zip(
                    c.call.params, owners(m, c.stages, c.schedule.placement), strict=True
                ):
                    held[i] |= places
        if placement is None:
            r = self.resolved
            axes = [
                r.sharded_over(path, shape)
                for path, shape in zip(analysis.paths, analysis.shapes, strict=True)
            ]
            placement = self.placement = place_params(
                r.mesh, r.pipe_axis, analysis, rehearsal, held, axes
            )
            self.rehearsal = rehearsal if rehearsal.predictable else None
        for path, places, layout in zip(analysis.paths, held, placement.layouts, strict=True):
            if not places <= set(layout.owners):
                raise CutError(
                    f"with a batch of this shape, params{path} is used by a stage that does not "
                    "hold it"
                )
        return placement

    def _call(self, k: int, call: PrimitiveCall, analysis: StepAnalysis) -> PlannedCall:
        r = self.resolved
        splits = plan_splits(r, call.batch, call.origins)
        search = r.pipe.schedule if r.pipe and isinstance(r.pipe.schedule, Auto) else None
        schedule = None if search else self._schedule(splits.count)
        split = schedule is None or any(a.kind in "IW" for row in schedule.ranks for a in row)
        parts = list(call.batch.parts) if isinstance(call.batch, Microbatches) else [call.batch]
        members = splits.variants()
        found = {
            m: [
                self._cut(k, call, analysis, splits, i, parts[i], split, splits.slice_of(m))
                for i in splits.ready_of(m)
            ]
            for m in sorted(set(members.values()))
        }
        if r.splits or splits.count > 1 or r.precision:
            weights = {m: found[first][0].weight for m, first in members.items()}
            try:
                exact = all(
                    [
                        self._prove_rows(k, call, analysis, splits, i, part)
                        for i, part in enumerate(parts)
                    ]
                )
            except BatchError:
                self._check_weight(
                    analysis.calls[k], analysis, splits, weights
                )  # it says more of a weight
                raise
            if not exact or r.precision or splits.parts:
                self._check_weight(analysis.calls[k], analysis, splits, weights)
        cuts = found[0][0].cut
        if schedule is None:
            schedule = self._search(k, search, cuts, splits.count, _waits(analysis, cuts))
        elif k not in self.stages:
            self.stages[k] = group(
                _costs(cuts), schedule.stages, r.pipe.stages if r.pipe else "even"
            )
        sharding, casts = self._sharding(call, analysis), self._casts(call, analysis)
        dealt = [f.cut for some in found.values() for f in some] if splits.dealt else []
        planned = {
            m: self._planned(
                k, call, splits, some, splits.ready_of(m), dealt, schedule, sharding, casts
            )
            for m, some in found.items()
        }
        check_same_order([c.programs for c in planned.values()])
        return replace(planned[0], variants={m: planned[first] for m, first in members.items()})

    def _planned(
        self,
        k: int,
        call: PrimitiveCall,
        splits: BatchSplit,
        found: list[CheckedLoss],
        ready: Sequence[int],
        dealt: Sequence[Units],
        schedule: Schedule,
        sharding: Sharding,
        casts: Mapping[int, torch.dtype],
    ) -> PlannedCall:
        """A call for the ranks that have these cuts, of which ``dealt`` are those of other ranks
        too."""
        stages = self.stages[k]
        cuts = tuple(f.cut for f in found) if len(found) > 1 else (found[0].cut,) * splits.count
        check_alike(dealt or cuts)
        edges = stage_edges(dealt or cuts, stages)
        schedule = insert_communication(schedule, edges)
        report = check(schedule, edges, [len(s) for s in stages])
        summed = _summed(cuts[0])
        masters = {i: call.dtypes[i] for i in casts}
        parts = call.batch.parts if isinstance(call.batch, Microbatches) else [call.batch]
        moving = tuple(_tensors(parts[i]) for i in ready)
        moving = moving if len(parts) > 1 else moving * splits.count
        programs = tuple(
            lower(cuts, stages, schedule, p, summed, sharding, masters)
            for p in range(self.resolved.ranks)
        )
        return PlannedCall(
            call, splits, cuts, moving, stages, schedule, report, programs,
            partial_segments(cuts[0]), summed, signature(call.batch), found[0].rows, casts=casts, ready=tuple(ready),
        )  # fmt: skip

    def _search(self, k: int, search: Any, one: Units, microbatches: int, waits: bool) -> Schedule:
        """The schedule that is found for a cut. It settles the stages, and what another batch shape
        finds keeps to them."""
        how: Any = self.resolved.pipe.stages  # type: ignore[union-attr]
        if k in self.stages:
            how = tuple(map(len, self.stages[k]))
        load = load_of(one, as_costs(search.costs, one))
        found = search.fit(self.resolved.ranks, microbatches, load, how, self.settled.get(k), waits)
        self.stages[k], self.settled[k] = found.stages, found.schedule.placement
        return found.schedule

    def rehearse(self, places: Iterable[int]) -> bool:
        """Whether the step does as ranks at some places on the pipe axis what was planned; asked
        once, before the first step.

        Raises:
            StateError: it fails there, or computes something else than on one device.
        """
        rehearsal, self.rehearsal = self.rehearsal, None
        if rehearsal is None:
            return True
        assert self.placement is not None
        return rehearse(rehearsal, self.placement, places)

    def rehearse_everywhere(self) -> None:
        """Make plans of rehearsals as every rank from now on."""
        self.everywhere = True
        self._forget()

    def retime(self, costs: Costs) -> None:
        """Choose schedule and stages again, for measured costs; what was traced is kept."""
        r = self.resolved
        assert r.pipe is not None
        schedule: Any = replace(r.pipe.schedule, costs=costs)  # type: ignore[type-var]
        self.resolved = replace(r, pipe=replace(r.pipe, schedule=schedule))
        self._forget()

    def _forget(self) -> None:
        """Forget plans, stages and placement; what was traced is kept."""
        self.variants.clear()
        self.stages.clear()
        self.settled.clear()
        self.placement = None

    def split_cut(self, plan: Plan, k: int) -> Units:
        """The cut of a planned call's first microbatch with I and W units beside B, whatever its
        schedule runs."""
        c = plan.calls[k]
        part = c.call.batch.parts[0] if isinstance(c.call.batch, Microbatches) else c.call.batch
        return self._cut(k, c.call, plan.placement.analysis, c.splits, 0, part, True, 0).cut

    def _sharding(self, call: PrimitiveCall, analysis: StepAnalysis) -> Sharding:
        """Which leaves of a call are sharded, by the rules of V (axes that split the batch) and
        S."""
        r, out = self.resolved, {}
        for k, i in enumerate(call.params):
            axes = r.sharded_over(analysis.paths[i], analysis.shapes[i])
            if axes:
                parts = r.mesh.axis_size(axes)
                chunk = -(-torch.Size(analysis.shapes[i]).numel() // parts)
                summed = tuple(a for a in axes if a in r.split_axes)
                whole, options = (
                    self._whole_dtype(call, analysis, k),
                    r.shard_options(analysis.paths[i]),
                )
                if r.precision and options.reduce_dtype is None:
                    options = replace(options, reduce_dtype=call.dtypes[k])
                out[k] = Sharded(
                    Piece(k, analysis.shapes[i], chunk),
                    axes,
                    parts,
                    summed,
                    call.dtypes[k],
                    whole,
                    options,
                )
        return out

    def _whole_dtype(
        self, call: PrimitiveCall, analysis: StepAnalysis | Tags, k: int
    ) -> torch.dtype:
        """The dtype in which a loss function sees a parameter: what `sharded_weights` says, or
        `mixed_precision`."""
        path, shape, dtype = (
            analysis.paths[call.params[k]],
            analysis.shapes[call.params[k]],
            call.dtypes[k],
        )
        r = self.resolved
        wanted = r.shard_options(path).param_dtype if r.sharded_over(path, shape) else None
        if wanted is not None and dtype.is_floating_point:
            return wanted
        return r.precision.of_param(path, dtype) if r.precision else dtype

    def _casts(self, call: PrimitiveCall, analysis: StepAnalysis) -> dict[int, torch.dtype]:
        """The leaves that are held whole and that a loss function sees in another dtype, with
        that."""
        whole = {
            k: self._whole_dtype(call, analysis, k)
            for k, i in enumerate(call.params)
            if not self.resolved.sharded_over(analysis.paths[i], analysis.shapes[i])
        }
        return {k: dtype for k, dtype in whole.items() if dtype != call.dtypes[k]}

    def _scale(self) -> torch.Tensor | float:
        """What a backward pass starts from: a number, or a fake of a dynamic loss scale."""
        p = self.resolved.precision
        if p is None or not p.dynamic:
            return 1.0 if p is None else p.constant
        with self.mode:
            return torch.empty((), device=next((x.device for x in tree.leaves(self.params)), None))

    def _schedule(self, microbatches: int) -> Schedule:
        r = self.resolved
        schedule = (r.pipe.schedule if r.pipe else one_f_one_b())(r.ranks, microbatches)
        if not isinstance(schedule, Schedule):
            raise ScheduleError(
                f"the schedule function returned {describe(schedule)}, not an "
                "fp.schedules.Schedule; fp.schedules.from_table(rows) makes one from rows of "
                "actions"
            )
        if len(schedule.ranks) != r.ranks or schedule.microbatches != microbatches:
            raise ScheduleError(
                f"{schedule.name}: is a table for {len(schedule.ranks)} ranks and "
                f"{schedule.microbatches} microbatches, but axis {r.pipe_axis!r} has {r.ranks} "
                f"ranks and the batch {microbatches} microbatches"
            )
        if not any(a.kind in "BW" for row in schedule.ranks for a in row):
            raise ScheduleError(
                f"{schedule.name}: has no backward actions, but value_and_grad needs gradients"
            )
        return schedule

    def _cut(
        self,
        k: int,
        call: PrimitiveCall,
        analysis: StepAnalysis,
        splits: BatchSplit,
        i: int,
        part: Any,
        split: bool,
        member: int,
    ) -> CheckedLoss:
        """The cut of one microbatch, for the ranks that have the shapes of a member."""
        leaves, spec = tree.flatten(part)
        local = [
            fake(splits.shape(i, j, tuple(x.shape), member), x, self.mode)
            if isinstance(x, torch.Tensor)
            else x
            for j, x in enumerate(leaves)
        ]
        sequences = [splits.sequence(i, j) for j in range(len(leaves))]
        values = None if call.reading is None else call.reading.values
        key = (
            k,
            split,
            splits.count > 1,
            signature(tree.unflatten(spec, local)),
            tuple(sequences),
            member,
            values,
        )
        if key not in self.cuts:
            params = self._fakes(call, analysis)
            r = self.resolved
            findings = None
            parts = bool(r.splits) or splits.count > 1
            if any(s and s[1].members > 1 for s in sequences):
                tree_of_params = tree.unflatten(call.params_spec, params)
                findings = prove_sequence(
                    call.loss_fn,
                    call.has_aux,
                    tree_of_params,
                    local,
                    spec,
                    sequences,
                    member,
                    self.mode,
                    r.mesh,
                    r.split_axes,
                )
            traced = trace(
                call.loss_fn, call.has_aux, (params, call.params_spec), (local, spec), self.mode, r.mesh, r.split_axes,
                rewriting(findings, member, parts), self._scale(), parts,
            )  # fmt: skip
            nodes = read_nodes(traced)
            weight = checks.weight_of(nodes, traced.module) if traced.has_weight else None
            if parts:
                self._check_split(traced, nodes)
            rows = {} if findings is None else _row_heads(traced, findings)
            saved = rematerialise(nodes, r.remats)
            self.cuts[key] = CheckedLoss(
                replace(cut(traced, nodes, split), saved=saved), weight, rows
            )
        return self.cuts[key]

    def _fakes(
        self,
        call: PrimitiveCall,
        analysis: StepAnalysis,
        dtypes: Sequence[torch.dtype] | None = None,
    ) -> list[torch.Tensor]:
        """The leaves of params as the loss function sees them."""
        like = tree.leaves(self.params)
        dtypes = dtypes or [self._whole_dtype(call, analysis, k) for k in range(len(call.params))]
        return [
            fake(analysis.shapes[i], like[i], self.mode, d)
            for i, d in zip(call.params, dtypes, strict=True)
        ]

    def _check_split(self, traced: Traced, nodes: Nodes) -> None:
        r = self.resolved
        if not traced.has_weight:
            who = [x.name for x in r.splits] + ([r.micro_name] if r.micro else [])
            raise BatchError(SCALAR_LOSS.format(why=f"{' and '.join(who)} split the batch"))
        checks.check_weight(nodes)
        _check_aux(traced.aux)

    def _prove_rows(
        self,
        k: int,
        call: PrimitiveCall,
        analysis: StepAnalysis,
        splits: BatchSplit,
        i: int,
        part: Any,
    ) -> bool:
        """The rows of the batch do not meet; gives whether weights add up to the last bits, too."""
        r, (leaves, spec) = self.resolved, tree.flatten(part)
        local = [
            fake(splits.row_shape(i, j, tuple(x.shape)), x, self.mode)
            if isinstance(x, torch.Tensor)
            else x
            for j, x in enumerate(leaves)
        ]
        values = None if call.reading is None else call.reading.values
        key = (k, signature(tree.unflatten(spec, local)), splits.rows[i], values)
        if key in self.proven:
            return self.proven[key]
        params = tree.unflatten(call.params_spec, self._fakes(call, analysis))
        whole = Mesh(
            **{
                a: 1 if a in r.split_axes and a not in r.row_axes else n
                for a, n in r.mesh.axes.items()
            }
        )
        subject = Subject(call.loss_fn, call.has_aux, params, spec, self.mode, r.split_axes)
        ready = isinstance(call.batch, Microbatches)
        self.proven[key] = prove_rows(subject, local, splits.rows[i], whole, ready, splits.dealt)
        return self.proven[key]

    def _check_weight(
        self,
        call: PrimitiveCall,
        analysis: StepAnalysis,
        splits: BatchSplit,
        weights: Mapping[int, GraphModule | None],
    ) -> None:
        """The weights of all parts of the batch add up, to what the loss function as written makes
        of the whole. ``weights``: by member number, a function of a microbatch."""
        if isinstance(call.batch, Microbatches) or None in weights.values():
            return  # ready microbatches: there is no whole batch to compare with
        r, moving = self.resolved, _tensors(call.batch)
        batch, made = with_values(
            call.batch,
            {moving[k] for w in weights.values() for k in checks.batch_read(w, len(moving))},
        )
        scale = (
            [None] if r.precision and r.precision.dynamic else []
        )  # an input of the graph, but not of the weight

        def of_rank(rank: int) -> list[torch.Tensor]:
            weight = weights[splits.member(rank)]
            assert weight is not None
            return [
                weight(*(leaves[i] for i in moving), *scale)
                for leaves in splits.microbatches(batch, rank)
            ]

        axes = tuple(a for a in r.split_axes if not (r.local and a in r.row_axes))
        ranks = r.mesh.group(0, axes) if axes else (0,)
        if any(w is not None and names_axes(w.graph) for w in weights.values()):
            if r.local:
                return  # the other ranks' rows are not here
            found = run_ranks(
                Mesh(**{a: r.mesh.axes[a] for a in r.split_axes}),
                lambda comm: _as_rank(comm, of_rank, ranks),
            )
        else:
            found = [of_rank(rank) for rank in ranks]
        parts = [w for weights_of_rank in found for w in weights_of_rank]
        (times,) = {checks.written_for(w, r.mesh) for w in weights.values() if w is not None} or {1}
        # As written, the loss function sees masters.
        fakes = self._fakes(call, analysis, call.dtypes if r.precision else None)
        params = tree.unflatten(call.params_spec, fakes)
        also = f" {ROUNDED.format(dtype=r.precision.compute)}" if r.precision else ""
        also += f" {MADE_UP.format(paths=made)}" if made else ""
        whole = splits.own_rows(batch)
        checks.check_additive(
            call.loss_fn, call.has_aux, params, whole, parts, self.mode, also, times
        )


def _row_heads(traced: Traced, findings: SplitProof) -> dict[int, tuple[int, SequenceLayout]]:
    """For every head that is an aux `Rows` with its positions split, along which dim and how."""
    nodes: list[Any] = []
    tree.map(nodes.append, traced.aux, is_leaf=is_summary)
    first = 1 + traced.has_weight
    rows = [x for x in nodes if isinstance(x, Rows)]
    return {first + int(x.x): s for x, s in zip(rows, findings.rows, strict=True) if s is not None}


def _read_by(analysis: StepAnalysis, placement: Placement | None) -> tuple:
    """What makes plans for one shape of batch differ: what losses read from Python, and what the
    step does beside them."""
    calls = []
    for c in analysis.calls:
        values = c.reading and c.reading.values
        given = c.params, c.dtypes, c.params_spec, signature(c.batch), tuple(tree.leaves(c.origins))
        calls.append((values, c.has_aux, *given))
    if placement is None:
        return tuple(calls), None
    metrics = tuple((metric.number, metric.place) for metric in placement.leaf_metrics)
    return (
        tuple(calls),
        analysis.sums,
        analysis.free,
        placement.apart,
        placement.metrics_spec,
        metrics,
    )


def _as_rank(comm: Communicator, of_rank: Callable[[int], Any], ranks: Sequence[int]) -> Any:
    with bind_rank(comm):
        return of_rank(ranks[comm.rank])


def _tensors(batch: Any) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(tree.leaves(batch)) if isinstance(x, torch.Tensor))


def _costs(c: Units) -> list[int]:
    return [c.units["F", s].code.flops + c.units["B", s].code.flops for s in range(c.segments)]


def _summary_paths(aux: Any) -> list[str]:
    return tree.paths(tree.map(lambda _: 0, aux, is_leaf=is_summary))


def _check_aux(aux: Any) -> None:
    nodes: list[Any] = []
    tree.map(nodes.append, aux, is_leaf=is_summary)
    for path, x in zip(_summary_paths(aux), nodes, strict=True):
        if not is_summary(x):
            raise BatchError(AUX_LEAF.format(path=path))


def _waits(analysis: StepAnalysis, c: Units) -> bool:
    """Whether ranks wait for each other behind the last backward: a step takes a global sum, as
    clipping does, or parts of a leaf's gradient come from several segments."""
    return bool(analysis.sums) or any(len(set(s)) > 1 for s in partial_segments(c))


def _summed(c: Units) -> frozenset[int]:
    """The heads that are summed over microbatches: total, weight, and both halves of a `Mean` in
    aux."""
    first = 1 + c.traced.has_weight
    out = set(range(first))
    nodes: list[Any] = []
    tree.map(nodes.append, c.traced.aux, is_leaf=is_summary)
    for x in nodes:
        if isinstance(x, Mean):
            out |= {first + int(x.total), first + int(x.weight)}
    return frozenset(out)
