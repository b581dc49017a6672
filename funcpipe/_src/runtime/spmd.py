"""Spmd: the rank of a mesh that this process is.

Ranks agree before they run: on the shapes of params and batch, on the plan, on whether their states
may be used. Where one fails, all others are told.

In: a step with its transforms, a mesh, and the environment that torchrun (or fp.launch) sets. Out:
a runner; its state is this rank's own.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from funcpipe._src.backends.backend import NAMES, Backend
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.core.buffer_donation import invalidated, refuse_invalidated
from funcpipe._src.core.checksum import text_sum
from funcpipe._src.core.inference_mode import refuse_inference_mode
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.planning import plan_bytes as sizes
from funcpipe._src.planning.batch_split import signature
from funcpipe._src.planning.plan import Plan
from funcpipe._src.planning.plan_text import values
from funcpipe._src.planning.planner import Planner
from funcpipe._src.planning.variants import StaleValues, Variants
from funcpipe._src.runtime.cuda_graph import MIXING, CapturedStep, feeder, new_pool, pool_bytes
from funcpipe._src.runtime.mismatch_text import (
    described,
    difference,
    majority,
    other_plan,
    too_large,
)
from funcpipe._src.runtime.rank import Rank
from funcpipe._src.runtime.replica_watch import STATE, Watch
from funcpipe._src.runtime.runner import Runner
from funcpipe._src.runtime.state_buffers import DonatedStep, Given, StateBuffers
from funcpipe.errors import (
    DeviceMemoryError,
    FuncpipeError,
    MismatchError,
    StackError,
    StateError,
    TraceError,
)

MOST_GRAPHS = 4  # of one plan, for other Python values
_REFUSED = -1  # in place of a digest: this rank cannot use its state
# bits below a digest: whether its rank has news, and what it wants to be compared (`Watch.due`)
_FLAGS = 4


class _Known(Exception):
    """An error that all ranks know of: none waits, and the next call may do better."""

    def __init__(self, error: FuncpipeError) -> None:
        self.error = error


class Spmd(Runner):
    """The rank that this process is; see `spmd`."""

    def __init__(
        self,
        step: Callable,
        mesh: Mesh,
        device: torch.device | str | None,
        timeout: float | None,
        batch: str,
        backend: str,
        accumulate: torch.dtype | None,
        cuda_graph: bool,
        donate: bool,
        check_every: int | None,
    ) -> None:
        super().__init__(step, mesh)
        if backend not in NAMES:
            raise StackError(
                f"spmd: backend={backend!r}; write one of {', '.join(map(repr, NAMES))}"
            )
        if batch not in ("global", "local"):
            raise StackError(f"spmd: batch={batch!r}; write 'global' or 'local'")
        if accumulate is not None and (backend == "eager" or not accumulate.is_floating_point):
            raise StackError(
                f"spmd: accumulate_dtype={accumulate!r}; give a floating-point dtype, with "
                "backend='inductor'"
            )
        if cuda_graph and not donate:
            raise StackError(
                "spmd: a captured step updates its state in place; leave donate=False or "
                "cuda_graph=True out"
            )
        if check_every is not None and (type(check_every) is not int or check_every < 1):
            raise StackError(
                f"spmd: check_every={check_every!r}; give a number of steps, 1 or more, or leave "
                "it out"
            )
        self._resolved = replace(self._resolved, local=batch == "local")
        options = {} if timeout is None else {"timeout": timeout}
        if cuda_graph:
            os.environ.setdefault(MIXING, "0")
        self._comm = ProcessGroupCommunicator(mesh, device=device, **options)
        _runners.add(self)
        if cuda_graph and self._comm.device.type != "cuda":
            raise StackError(
                "spmd: cuda_graph=True needs a GPU, but this rank computes on the "
                f"{self._comm.device}"
            )
        dtype = accumulate or torch.float32
        self._backend = Backend(backend, self._report, dtype, cuda_graph)
        self._cuda_graph = cuda_graph
        self._donate = donate
        self._bound: dict[int, Rank] = {}
        self._captured: dict[tuple, CapturedStep] = {}
        self._donated: dict[int, DonatedStep] = {}
        self._home, self._pool = StateBuffers(), new_pool() if cuda_graph else None
        self._feed = feeder(self._comm.device)
        # NCCL waits for graphs that hold its operations, so they go before the process groups do,
        # also at exit.
        self._release = weakref.finalize(self, _release, self._captured)
        self._digests: dict[tuple, int] = {}
        self._replicas = Watch(self._comm, self._resolved, check_every)

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
        self, init_state: Callable[[Any], Any], params: Any, batch: Any, key: torch.Tensor | int
    ) -> Any:
        params, leaf, sums = self._read(params, key)
        batch = self._feed(batch)
        self._agree({"params": params, "batch": batch}, self._what)
        self._replicas.given(params, sums(), batch)
        init_state = self._scaled(init_state)
        self._planner = Planner(self._resolved, init_state, params)
        self._bound.clear()
        _release(self._captured)
        self._donated.clear()
        self._home, self._pool = StateBuffers(), new_pool() if self._cuda_graph else None
        self._agreed_rank(batch)  # makes ready what measuring needs
        self._replicas.step(self._made.ops)
        self._plan_first(batch)
        variants = self._made.of(batch)
        self._rank_of(batch, variants, news=variants.is_news(everything=False))
        with torch.no_grad():
            state = self._home.give(init_state(self._placement.params(leaf, self.rank)))
        self._replicas.made(state, self._placement)
        return state

    def _rehearse(self) -> bool:
        """Each rank rehearses as itself; where one is refused, all are."""
        if self._made.rehearsal is None:
            return True
        place = self._placement.pipeline_rank(self.rank)
        problem: FuncpipeError | None = None
        expected = False
        try:
            expected = self._made.rehearse([place])
        except FuncpipeError as error:
            problem = error
        found = self._comm.exchange((place, expected, problem))
        for _, _, problem in sorted(found, key=operator.itemgetter(0)):
            if problem is not None:
                raise _Known(problem)
        return all(as_planned for _, as_planned, _ in found)

    @property
    def _what(self) -> str:
        records = ", ".join(spec.text for spec in self._resolved.specs)
        backend = self._backend
        how = f"backend={backend.name!r}, accumulate_dtype={backend.accumulate_dtype}"
        how += f", cuda_graph={self._cuda_graph}"
        if self._resolved.local:
            how += ", local batches"
        return f"{records or 'no transform'} on {self.mesh!r}, {how}"

    def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """One step of this rank; every rank calls it with the same global batch."""
        return self._guarded(self._step, state, batch)

    def prefetch(self, batch: Any) -> Any:
        """The batch on this rank's device, moved there on a stream of its own while the step that
        was called last runs.

        A step that is called with a batch on the CPU moves it so by itself. Prefetching pays where
        the host reads metrics of
        one step before it calls the next: ``state, metrics = run(state, batch)``, then ``batch =
        run.prefetch(next(loader))``, then read. Tensors that do not lie in pinned memory are moved
        all the same, but the host waits.
        """
        return self._guarded(self._feed, batch)

    @property
    def graph_memory(self) -> int:
        """Bytes of GPU memory that the captured steps of this rank hold for values of their own:
        activations, gradients."""
        return pool_bytes(self._pool) if self._captured else 0

    def plan(self, state: Any, batch: Any) -> Plan:
        """What will run for batches like this one: see `Plan`."""
        return super().plan(state, self._feed(batch))

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        refuse_inference_mode("a step")
        batch = self._feed(batch)
        variants = self._made.of(batch)
        variants.known()
        news = variants.is_news(everything=self._cuda_graph)
        given, news = self._agree(
            {"batch": batch}, "step", lambda: self._home.read(state), self._home.make_next, news
        )
        self._replicas.before_step(given.state, batch, self._made)
        try:
            return self._try(given, batch, variants, news)
        except StaleValues as problem:
            self._comm.flush()
            if any(map(invalidated, (*given.leaves, *self._home.leaves))):
                raise StateError(problem.midway) from None
        variants.forget()
        try:
            return self._try(given, batch, variants, news=True)
        except StaleValues as problem:
            raise StateError(problem.again) from None

    def _try(self, given: Given, batch: Any, variants: Variants, news: bool) -> tuple[Any, Any]:
        """One step, under the plan that was chosen; with ``news``, ranks compare it first."""
        rank = self._rank_of(batch, variants, news)
        self._watch([rank])
        try:
            with torch.no_grad():
                return self._run(rank, given, batch, variants.version)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(too_large(rank, given.state, error)) from error

    def _run(
        self, rank: Rank, given: Given, batch: Any, version: tuple[int, ...]
    ) -> tuple[Any, Any]:
        if self._cuda_graph and not self._recording:  # a graph has no instructions to time
            step = self._captured_step(rank, version)
            if step.ready:
                self._capture(step, given)
            elif step.graph is None:
                _wait_for(self._captured)
            try:
                return step(given, batch)
            except StaleValues:  # it has not run, so it cannot be captured
                self._captured.pop((id(rank), version)).release()
                raise
        _wait_for(self._captured)
        if self._donate and not self._cuda_graph:
            if id(rank) not in self._donated:
                self._donated[id(rank)] = DonatedStep(rank, self._home)
            return self._donated[id(rank)](given, batch)
        out = rank.step(given.state, batch)
        self._comm.flush()
        return out

    def _captured_step(self, rank: Rank, version: tuple[int, ...]) -> CapturedStep:
        """The step for what all ranks read from Python now: a graph repeats the numbers that it was
        captured with."""
        key = id(rank), version
        if key not in self._captured:
            others = [k for k in self._captured if k[0] == key[0]]
            for old in others[: len(others) + 1 - MOST_GRAPHS]:
                self._captured.pop(old).release()
            self._captured[key] = CapturedStep(rank, self._home, self._pool)
        return self._captured[key]

    def _capture(self, step: CapturedStep, given: Given) -> None:
        """Every rank captures its step, or none does: then all are where they were, and may go
        on."""
        problem: FuncpipeError | None = None
        try:
            step.capture()
        except torch.OutOfMemoryError as error:
            problem = DeviceMemoryError(too_large(step.rank, given.state, error))
        except TraceError as error:
            problem = error
        texts = self._comm.exchange(None if problem is None else str(problem))
        failed = [r for r, text in enumerate(texts) if text is not None]
        if failed:
            step.release()
            if not any(other.graph for other in self._captured.values()):
                self._pool = (
                    new_pool()
                )  # torch does not take up a pool again that no graph has any more
                for other in self._captured.values():
                    other.pool = self._pool
            raise _Known(
                problem
                or MismatchError(f"rank {failed[0]} failed to capture its step: {texts[failed[0]]}")
            )
        pools = self._by_place(step.rank, self.graph_memory, max)
        for plan in self._made.plans:  # whose graphs share one pool
            plan.graphs.update(pools)

    def _collect(self, mine: dict[int, Any]) -> dict[int, Any]:
        self._guarded(self._agree, {}, "share a recording")
        found: dict[int, Any] = {}
        for some in self._guarded(self._comm.exchange, mine):
            found |= some
        return found

    def _everywhere(self, fn: Callable[[Communicator, Backend], Any], together: bool) -> list[Any]:
        self._guarded(self._agree, {}, "measure or look for numbers")
        _wait_for(self._captured)
        return self._guarded(lambda: self._comm.exchange(fn(self._comm, self._backend)))

    def _report(self, text: str) -> None:
        if self.rank == 0 and sys.stderr.isatty():
            print(f"\r{text} ", end="", file=sys.stderr, flush=True)

    def _agreed_rank(self, batch: Any) -> Rank:
        """This rank, under the plan for what is read from Python now, which ranks have compared."""
        variants = self._made.of(batch)
        variants.known()
        return self._rank_of(batch, variants, news=True)

    def _rank_of(self, batch: Any, variants: Variants, news: bool) -> Rank:
        """This rank, under the plan that was chosen; with ``news``, ranks compare it first."""
        plan = self._made.chosen(batch, variants)
        if news:
            self._compare(plan, variants)
        if id(plan) not in self._bound:
            self._drop_old()
            rank = Rank(plan, self._comm, self._backend)
            rank.prepare()
            if self._backend.fuses:
                plan.found.update(self._by_place(rank, rank.usage, sizes.most))
            self._bound[id(plan)] = rank
        return self._bound[id(plan)]

    def _compare(self, plan: Plan, variants: Variants) -> None:
        """MismatchError, on every rank, unless all have the same plan."""
        digests = self._comm.exchange_digest(plan.digest())
        if len(set(digests)) > 1:
            most, odd = majority(digests)
            found = self._comm.exchange(
                values(plan) | plan.sections if self.rank in (most, odd[0]) else None
            )
            raise MismatchError(other_plan(found[most], found[odd[0]], most, odd[0]))
        mine = variants.agree(self._cuda_graph)
        if self._cuda_graph:
            variants.version = tuple(self._comm.exchange(mine))

    def _drop_old(self) -> None:
        """Let go of the ranks whose plans are no longer kept."""
        kept = set(map(id, self._made.plans))
        for key in [key for key in self._bound if key not in kept]:
            rank = self._bound.pop(key)
            self._donated.pop(id(rank), None)
            for version in [k for k in self._captured if k[0] == id(rank)]:
                self._captured.pop(version).release()

    def _by_place(self, rank: Rank, mine: Any, most: Callable[[list], Any]) -> dict[int, Any]:
        """For every place on the pipe axis, the most that the ranks there say."""
        found = self._comm.exchange((rank.place, mine))
        return {place: most([x for p, x in found if p == place]) for place, _ in found}

    def _agree(
        self,
        trees: dict[str, Any],
        what: str,
        read: Callable[[], Any] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
        news: bool = False,
    ) -> tuple[Any, bool]:
        """What ``read`` gives; all ranks are about to run the same on the same shapes, with states
        that they may use. ``meanwhile`` runs while they tell each other. And whether any of them
        has ``news``.

        Raises:
            MismatchError, on every rank: they are not.
            StateError: this rank's state was given to an earlier step; the others get a
            MismatchError that says so.
        """
        try:
            out, digest = read(), self._digest(trees, what)
        except StateError as error:
            self._comm.exchange_digest(_REFUSED)
            self._comm.exchange(str(error))
            raise _Known(error) from None
        flags = self._replicas.due << 1 | news
        said = self._comm.exchange_digest(digest << _FLAGS | flags, meanwhile)
        if _REFUSED in said:
            texts = self._comm.exchange(None)
            rank = said.index(_REFUSED)
            raise MismatchError(
                f"rank {rank} cannot use the state that it was given: {texts[rank]}"
            )
        if len({n >> _FLAGS for n in said}) > 1:
            raise MismatchError(
                difference(self._comm.exchange((what, described(trees))), self._resolved.local)
            )
        together = functools.reduce(operator.or_, said)
        asked = together & (1 << _FLAGS) - 1
        self._replicas.due = asked >> 1
        return out, bool(asked & 1)

    def _digest(self, trees: dict[str, Any], what: str) -> int:
        key = (what, signature(trees))
        if key not in self._digests:
            self._digests[key] = text_sum(repr(described(trees)) + what)
        return self._digests[key]

    def _guarded(self, fn: Callable, *args: Any) -> Any:
        try:
            return fn(*args)
        except (
            MismatchError,
            StaleValues,
        ):  # every rank has seen it: none waits, and the next call may do better
            raise
        except _Known as known:
            raise known.error from None
        except BaseException as error:
            raise self._fail(error) from (None if isinstance(error, FuncpipeError) else error)

    def _fail(self, error: BaseException) -> BaseException:
        """Tell the other ranks. NCCL gives up a communicator only when no graph holds it, and a
        graph ends only when the
        communicator that it waits on is given up: so both at once."""
        if not self._captured:
            return self._comm.fail(error)
        with ThreadPoolExecutor(1) as aside:
            told = aside.submit(self._comm.fail, error)
            _release(self._captured)
            return told.result()

    def place(self, full: Any) -> Any:
        """What this rank holds of a single-device state."""
        refuse_invalidated("state", full)
        self._replicas.due |= STATE
        return self._home.give(self._placement.place(full, self.rank))

    def unplace(self, state: Any) -> Any:
        """The single-device state again, on every rank."""
        return self._guarded(self._unplace, state)

    def _check_state(self, state: Any, what: str = "use a state") -> None:
        self._guarded(self._agree, {}, what, lambda: self._home.read(state))

    def _about_to_load(self) -> None:
        self._guarded(self._agree, {}, "load a checkpoint")
        self._replicas.due |= STATE

    def _unplace(self, state: Any) -> Any:
        self._agree({}, "unplace", lambda: self._home.read(state))
        leaves = self._placement.state_leaves(state, "unplace")
        held = {
            j: x
            for j, x in enumerate(leaves)
            if x is not None and self.rank in self._placement.holders(j)
        }
        found = self._comm.exchange(
            {j: x.cpu() if isinstance(x, torch.Tensor) else x for j, x in held.items()}
        )
        move = lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else x  # noqa: E731
        return self._placement.unplace(lambda rank, j: move(found[rank][j]))

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


def _wait_for(captured: dict[tuple, CapturedStep]) -> None:
    """Wait for graphs, before operations of NCCL outside of them: see `cuda_graph.py`."""
    if captured:
        torch.cuda.synchronize()


def _release(captured: dict[tuple, CapturedStep]) -> None:
    while captured:
        captured.popitem()[1].release()


def spmd(
    step: Callable,
    mesh: Mesh,
    *,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    batch: str = "global",
    backend: str = "eager",
    accumulate_dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    donate: bool = True,
    check_every: int | None = None,
) -> Spmd:
    """Run a transformed step on the rank that this process is: NCCL on GPUs, gloo on CPUs.

    Args:
        step: a step with transforms on it; the same in every process.
        mesh: as many ranks as there are processes (`launch` or torchrun started them).
        device: where this rank computes; its own GPU if there is one, else the CPU.
        timeout: seconds after which a rank that does not answer is given up.
        batch: "global": every rank passes the whole batch; "local": for loaders that hold a rank's
            own rows only. Ranks that differ on no axis that splits rows (those of one pipeline, or
            of one sequence) then pass the same rows, with all positions.
        backend: what runs a unit: "eager", bitwise as plain PyTorch; or "inductor", which compiles
            each distinct unit.
        accumulate_dtype: with "inductor", the dtype in which gradients with fewer bits are added
            up over microbatches: by default ``torch.float32``; ``torch.bfloat16`` adds those of
            bfloat16 params up as plain PyTorch does, in half the memory.
        cuda_graph: capture the whole step, optimizer and messages included, into one CUDA graph.
            The first step with a batch of some shapes runs as it is; the second one is captured.
            ``NCCL_GRAPH_MIXING_SUPPORT`` is set to 0 in the environment unless it is set: graphs of
            your own in this process must then not run beside other operations of their
            communicators.
        donate: whether a step may write the new state where the old one lies, so that there is
            memory for one only. What a step returned is then gone when it has been given to the
            next step: to use it again is an error. Clone what you want to keep. In a captured step
            always.
        check_every: compare replicas before every n-th step: copies of state leaves and the batch
            by checksums, computed where they lie, and the Python values that the step uses outside
            ``value_and_grad``, for which it runs once on fakes (about 0.1 s for fifty leaves, on
            the host). Without it ranks compare params, batch and those values in ``init``, the
            batch of the first step, and a state that was placed or loaded.

    Returns:
        a runner; ``state`` is this rank's part of it.

    Raises:
        MeshError, StackError: the transforms do not fit the mesh or each other.
        RankError, on every rank: another one failed; says which, and with what.
        MismatchError, on every rank, later: ranks differ; names leaves and ranks.
    """
    options = (batch, backend, accumulate_dtype, cuda_graph, donate, check_every)
    return Spmd(step, mesh, device, timeout, *options)
