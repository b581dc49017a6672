"""The runner of `spmd`: the rank of a mesh that this process is.

Ranks agree before they run: on the shapes of params and batch, on the plan, on whether their states
may be used (`agreement.py`). Where one fails, all others learn of it.

In: a step with its transforms, a mesh, and the environment that torchrun (or fp.launch) sets. Out:
a runner, whose state is this rank's own.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from funcpipe._src.backends.backend import Backend
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.core.buffer_donation import invalidated, refuse_invalidated
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.planning import plan_bytes as sizes
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.planner import Planner
from funcpipe._src.planning.variants import StaleValues, Variants
from funcpipe._src.runtime.agreement import AgreedError, Agreement
from funcpipe._src.runtime.captured_steps import CapturedSteps, Version
from funcpipe._src.runtime.cuda_graph import MIXING, CapturedStep, feeder, new_pool
from funcpipe._src.runtime.mismatch_text import about_to_run, too_large
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.replica_watch import STATE, Watch
from funcpipe._src.runtime.runner import Runner
from funcpipe._src.runtime.spmd_options import Options
from funcpipe._src.runtime.state_buffers import DonatedStep, Given, StateBuffers
from funcpipe.errors import (
    DeviceMemoryError,
    FuncpipeError,
    MismatchError,
    StateError,
)

Result = tuple[Any, Any]  # state and metrics


class Spmd(Runner):
    """The rank that this process is; see `spmd`."""

    def __init__(
        self,
        step: Callable,
        mesh: Mesh,
        options: Options,
        device: torch.device | str | None,
        timeout: float | None,
    ) -> None:
        super().__init__(step, mesh)
        options.check()
        local = options.batch == "local"
        self._resolved = replace(self._resolved, local=local)
        self._donates = options.donate
        self._cuda_graph = options.cuda_graph
        if options.cuda_graph:
            os.environ.setdefault(MIXING, "0")
        limit = {} if timeout is None else {"timeout": timeout}
        self._comm = ProcessGroupCommunicator(mesh, device=device, **limit)
        _runners.add(self)
        options.check_device(self._comm.device)
        self._backend = Backend(
            options.backend,
            self._report,
            options.accumulate_dtype or torch.float32,
            options.cuda_graph,
        )
        self._bound: dict[int, Rank] = {}
        self._donated: dict[int, DonatedStep] = {}
        self._buffers = StateBuffers()
        self._graphs = CapturedSteps(self._comm, self._new_pool())
        self._feed = feeder(self._comm.device)
        # NCCL waits for graphs that hold its operations, so they go before the process groups do,
        # also at exit.
        self._release = weakref.finalize(self, self._graphs.release)
        self._replicas = Watch(self._comm, self._resolved, options.check_every)
        self._agreement = Agreement(self._comm, self._replicas, local)

    def _new_pool(self) -> Any:
        return new_pool() if self._cuda_graph else None

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self._comm.rank

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._comm.device

    def init(
        self,
        init_state: Callable[[Any], Any],
        params: Any,
        batch: Any,
        *,
        key: torch.Tensor | int = 0,
    ) -> Any:
        """Make the plan, compare it with the other ranks', and make this rank's state; see
        `Simulation.init`."""
        return self._guarded(self._init, init_state, params, batch, key)

    def _init(
        self,
        init_state: Callable[[Any], Any],
        params: Any,
        batch: Any,
        key: torch.Tensor | int,
    ) -> Any:
        given = self._read(params, key)
        batch = self._feed(batch)
        trees = {"params": given.shapes, "batch": batch}
        what = about_to_run(self._resolved, self.mesh, self._backend, self._cuda_graph)
        self._agreement.agree(trees, what)
        self._replicas.given(given.shapes, given.checksums(), batch)
        init_state = self._scaled(init_state)
        self._planner = Planner(self._resolved, init_state, given.shapes)
        self._forget_steps()
        self._agreed_rank(batch)  # makes ready what measuring needs
        self._replicas.step(self._made.ops)
        self._plan_first(batch)
        variants = self._made.of(batch)
        news = variants.is_news(everything=False)
        self._rank_of(batch, variants, news)
        with torch.no_grad():
            state = init_state(self._placement.params(given.leaf, self.rank))
        state = self._buffers.give(state)
        self._replicas.made(state, self._placement)
        return state

    def _rehearse(self) -> bool:
        return self._agreement.rehearse(self._made)

    def _forget_steps(self) -> None:
        """Forget the steps of an earlier ``init``, and its state."""
        self._bound.clear()
        self._donated.clear()
        self._buffers = StateBuffers()
        self._graphs.release()
        self._graphs.pool = self._new_pool()

    def __call__(self, state: Any, batch: Any) -> Result:
        """One step of this rank; every rank calls it with the same global batch."""
        return self._guarded(self._step, state, batch)

    def prefetch(self, batch: Any) -> Any:
        """The batch on this rank's device, moved there on a stream of its own while the step that
        was called last runs.

        A step that is called with a batch on the CPU moves it so by itself. Prefetching pays where
        the host reads metrics of one step before it calls the next: ``state, metrics = run(state,
        batch)``, then ``batch = run.prefetch(next(loader))``, then read. Tensors that do not lie in
        pinned memory are moved all the same, but the host waits.
        """
        return self._guarded(self._feed, batch)

    @property
    def graph_memory(self) -> int:
        """Bytes of GPU memory that the captured steps of this rank hold for values of their own:
        activations, gradients."""
        return self._graphs.nbytes

    def plan(self, state: Any, batch: Any) -> Plan:
        """What will run for batches like this one: see `Plan`."""
        return super().plan(state, self._feed(batch))

    def _step(self, state: Any, batch: Any) -> Result:
        refuse_inference_mode("a step")
        batch = self._feed(batch)
        variants = self._made.of(batch)
        variants.known()
        given, news = self._agreement.agree(
            {"batch": batch},
            "step",
            read=lambda: self._buffers.read(state),
            meanwhile=self._buffers.make_next,
            news=variants.is_news(everything=self._cuda_graph),
        )
        self._replicas.before_step(given.state, batch, self._made)
        try:
            return self._try(given, batch, variants, news)
        except StaleValues as problem:
            self._comm.flush()
            leaves = (*given.leaves, *self._buffers.leaves)
            if any(map(invalidated, leaves)):
                raise StateError(problem.midway) from None
        variants.forget()
        try:
            return self._try(given, batch, variants, news=True)
        except StaleValues as problem:
            raise StateError(problem.again) from None

    def _try(
        self,
        given: Given,
        batch: Any,
        variants: Variants,
        news: bool,
    ) -> Result:
        """One step, under the plan that was chosen; with ``news``, ranks compare it first."""
        rank = self._rank_of(batch, variants, news)
        self._watch([rank])
        try:
            with torch.no_grad():
                return self._run(rank, given, batch, variants.version)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(too_large(rank, given.state, error)) from error

    def _run(self, rank: Rank, given: Given, batch: Any, version: Version) -> Result:
        if self._cuda_graph and not self._recording:  # a graph has no instructions to time
            return self._run_captured(rank, given, batch, version)
        self._graphs.wait()
        if self._donates and not self._cuda_graph:
            key = id(rank)
            if key not in self._donated:
                self._donated[key] = DonatedStep(rank, self._buffers)
            return self._donated[key](given, batch)
        result = rank.step(given.state, batch)
        self._comm.flush()
        return result

    def _run_captured(self, rank: Rank, given: Given, batch: Any, version: Version) -> Result:
        """Replay a step; the first time it runs as it is, the second time it is captured."""
        step = self._graphs.step_of(rank, version, self._buffers)
        if step.ready:
            self._capture(step, given)
        elif step.graph is None:
            self._graphs.wait()
        try:
            return step(given, batch)
        except StaleValues:  # it has not run, so it cannot be captured
            self._graphs.drop((id(rank), version))
            raise

    def _capture(self, step: CapturedStep, given: Given) -> None:
        self._graphs.capture(step, given)
        found = self._agreement.by_pipeline_rank(step.rank, self.graph_memory)
        for pipeline_rank, nbytes in found.items():
            for plan in self._made.plans:  # whose graphs share one pool
                plan.graphs[pipeline_rank] = max(nbytes)

    # ---- what other rooms ask of a runner

    def _collect(self, mine: dict[int, Any]) -> dict[int, Any]:
        self._guarded(self._agreement.agree, {}, "share a recording")
        found: dict[int, Any] = {}
        for other in self._guarded(self._comm.exchange, mine):
            found |= other
        return found

    def _everywhere(
        self,
        fn: Callable[[Communicator, Backend], Any],
        together: bool,
    ) -> list[Any]:
        self._guarded(self._agreement.agree, {}, "measure or look for numbers")
        self._graphs.wait()

        def exchanged() -> list[Any]:
            return self._comm.exchange(fn(self._comm, self._backend))

        return self._guarded(exchanged)

    def _report(self, text: str) -> None:
        if self.rank == 0 and sys.stderr.isatty():
            print(f"\r{text} ", end="", file=sys.stderr, flush=True)

    # ---- the rank under a plan

    def _agreed_rank(self, batch: Any) -> Rank:
        """This rank, under the plan for what is read from Python now, which ranks have compared."""
        variants = self._made.of(batch)
        variants.known()
        return self._rank_of(batch, variants, news=True)

    def _rank_of(self, batch: Any, variants: Variants, news: bool) -> Rank:
        """This rank, under the plan that was chosen; with ``news``, ranks compare it first."""
        plan = self._made.chosen(batch, variants)
        if news:
            self._agreement.compare_plans(plan)
            self._agreement.number_values(variants, exchange=self._cuda_graph)
        if id(plan) not in self._bound:
            self._drop_old()
            rank = Rank(plan, self._comm, self._backend)
            rank.prepare()
            if self._backend.fuses:
                usage = self._agreement.by_pipeline_rank(rank, rank.usage)
                for pipeline_rank, found in usage.items():
                    plan.found[pipeline_rank] = sizes.most(found)
            self._bound[id(plan)] = rank
        return self._bound[id(plan)]

    def _drop_old(self) -> None:
        """Let go of the ranks whose plans are no longer kept."""
        kept = set(map(id, self._made.plans))
        dropped = [key for key in self._bound if key not in kept]
        for key in dropped:
            rank = self._bound.pop(key)
            self._donated.pop(id(rank), None)
            self._graphs.drop_rank(rank)

    # ---- failures

    def _guarded(self, fn: Callable, *args: Any) -> Any:
        """Call a function; if it fails, the other ranks learn of it."""
        try:
            return fn(*args)
        except (MismatchError, StaleValues):
            raise  # every rank has seen it: no rank waits, and the next call may do better
        except AgreedError as agreed:
            raise agreed.error from None
        except BaseException as error:
            cause = None if isinstance(error, FuncpipeError) else error
            raise self._fail(error) from cause

    def _fail(self, error: BaseException) -> BaseException:
        """Tell the other ranks of an error.

        NCCL gives up a communicator only when no graph holds it, and a graph ends only when the
        communicator that it waits on is given up: so both at once.
        """
        if not self._graphs.steps:
            return self._comm.fail(error)
        with ThreadPoolExecutor(1) as aside:
            failing = aside.submit(self._comm.fail, error)
            self._graphs.release()
            return failing.result()

    # ---- states

    def place(self, full: Any) -> Any:
        """What this rank holds of a single-device state."""
        refuse_invalidated("state", full)
        self._replicas.due |= STATE
        own = self._placement.place(full, self.rank)
        return self._buffers.give(own)

    def unplace(self, state: Any) -> Any:
        """The single-device state again, on every rank."""
        return self._guarded(self._unplace, state)

    def _unplace(self, state: Any) -> Any:
        self._agreement.agree({}, "unplace", read=lambda: self._buffers.read(state))
        held: dict[int, Any] = {}
        leaves = self._placement.state_leaves(state, "unplace")
        for number, leaf in enumerate(leaves):
            if leaf is not None and self.rank in self._placement.holders(number):
                held[number] = _moved(leaf, "cpu")
        found = self._comm.exchange(held)
        return self._placement.unplace(
            lambda rank, number: _moved(found[rank][number], self.device)
        )

    def _check_state(self, state: Any, what: str = "use a state") -> None:
        read = functools.partial(self._buffers.read, state)
        self._guarded(self._agreement.agree, {}, what, read)

    def _about_to_load(self) -> None:
        self._guarded(self._agreement.agree, {}, "load a checkpoint")
        self._replicas.due |= STATE

    def leave(self) -> None:
        """Let the ranks go that wait for this one, which takes no more steps."""
        self._comm.leave()

    def close(self) -> None:
        """Give back the process groups."""
        self._release()
        self._comm.close()


_runners: weakref.WeakSet[Spmd] = weakref.WeakSet()


def leave() -> None:
    """`Spmd.leave` of all runners of this process. Checkpoints that are being saved go on."""
    for run in list(_runners):
        run.leave()


def _moved(leaf: Any, device: torch.device | str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.to(device)
