"""The communicator of a process that is one rank of a mesh: gloo on CPUs, NCCL on GPUs.

In: a mesh, and the environment that torchrun (or fp.launch) sets. Out: see `funcpipe._src.comm`.
Collectives are in `group_collectives.py`, messages in `p2p.py`, what ranks tell each other before
every step in `consensus.py`.

How errors spread. A rank that fails writes so into the store (`failure_watch.py`) and severs its
process groups (`groups.py`). Whoever waits for it sees its connection close, finds the note, severs
its own groups and raises RankError in turn; whoever waits for a rank that is far from any
communication is freed by the thread that watches the store. A process that dies without a word is
noticed by the ranks whose connections to it close, and the first of them writes the note in its
place. A rank that closes its communicator says so in the store; who waits for it then is told.
"""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from funcpipe._src.comm import Pending
from funcpipe._src.comm import group_collectives as teams
from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.comm.consensus import Digests
from funcpipe._src.comm.cooperative_scheduler import ranks
from funcpipe._src.comm.failure_watch import Alarm, one_line
from funcpipe._src.comm.groups import Groups, Lane, Team
from funcpipe._src.comm.p2p import mail
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import RankError

T = TypeVar("T")
_LOSS = re.compile(r"connect|peer|socket|pipe|timed out|timeout|nccl", re.IGNORECASE)
# Seconds to look for a note when a connection closes. A rank writes it before it severs its groups,
# so one that is not there is most likely never written.
_NOTE = 0.5


class ProcessGroupCommunicator:
    """This process as one rank of ``mesh``, as ``funcpipe._src.comm.Communicator`` describes it.

    All ranks construct it alike. Where torch.distributed is not initialised, it is, from torchrun's
    environment.

    Args:
        mesh: has as many ranks as there are processes.
        device: where tensors live; by default this process's GPU if every process has one, else the
            CPU.
        timeout: seconds after which a rank that does not answer counts as lost.

    Raises:
        MeshError: the number of processes is not the size of the mesh, or this process was not
            started as one of several.
        RankError: not all of them construct it within the timeout.
    """

    def __init__(
        self, mesh: Mesh, device: torch.device | str | None = None, timeout: float = 600.0
    ) -> None:
        try:
            groups = Groups(mesh, device, timedelta(seconds=timeout))
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise RankError(
                f"not every rank of {mesh!r} came to make process groups within {timeout:g} s: "
                f"{_reason(error)}"
            ) from error
        self._groups = groups
        self.mesh, self.rank, self.device = mesh, groups.rank, groups.device
        self._timeout = timeout
        key = f"funcpipe/{groups.control.group_name}"
        store = dist.distributed_c10d._get_default_store()
        self._alarm = Alarm(store, f"{key}/failure", self.rank, groups.sever)
        self._mail = mail(groups, store, key)
        self._digests = Digests(groups.control)
        self._begun: dict[_Guarded, None] = {}  # collectives that nobody has waited for yet
        self._closer = weakref.finalize(self, _close, self._alarm, groups)

    def beside(self, device: torch.device | str) -> ProcessGroupCommunicator:
        """Another communicator of the same ranks, as patient as this one; all ranks make it
        alike."""
        return ProcessGroupCommunicator(self.mesh, device, self._timeout)

    def prepare(self, axes_sets: Iterable[Axes], lanes: Iterable[Lane] = ()) -> None:
        self._attempt(
            lambda: self._groups.prepare(axes_sets, lanes), lambda: "while making process groups"
        )

    # --- collectives
    # ----------------------------------------------------------------------------------

    def _collective(self, kind: str, x: torch.Tensor, axes: Axes, run: Callable[[Team], T]) -> T:
        team = self._groups.team(axes)

        def what() -> str:
            return f"in {kind} of {wire.spec(x.shape, x.dtype)} over {axes}"

        return self._attempt(lambda: run(team), what, team.ranks)

    def all_reduce(self, x: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        wire.check_op(op)
        return self._collective(
            f"all_reduce({op})", x, axes, lambda team: teams.all_reduce(x, op, team)
        )

    def all_gather(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        return self._collective("all_gather", x, axes, lambda team: teams.all_gather(x, team))

    def reduce_scatter(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        wire.check_pieces("reduce_scatter", x, axes, self.mesh.axis_size(axes))
        return self._collective(
            "reduce_scatter", x, axes, lambda team: teams.reduce_scatter(x, team)
        )

    def start_all_gather(self, x: torch.Tensor, axes: Axes) -> Pending:
        return self._start("all_gather", x, axes, lambda team: teams.start_all_gather(x, team))

    def start_reduce_scatter(self, x: torch.Tensor, axes: Axes) -> Pending:
        wire.check_pieces("reduce_scatter", x, axes, self.mesh.axis_size(axes))
        return self._start(
            "reduce_scatter", x, axes, lambda team: teams.start_reduce_scatter(x, team)
        )

    def _start(
        self, kind: str, x: torch.Tensor, axes: Axes, run: Callable[[Team], Pending]
    ) -> Pending:
        begun = self._collective(kind, x, axes, run)
        return _Guarded(
            lambda: self._collective(kind, x, axes, lambda _: begun.wait()), self._begun
        )

    def all_to_all(self, x: torch.Tensor, axes: Axes) -> torch.Tensor:
        wire.check_pieces("all_to_all", x, axes, self.mesh.axis_size(axes))
        return self._collective("all_to_all", x, axes, lambda team: teams.all_to_all(x, team))

    # --- messages and host objects
    # --------------------------------------------------------------------

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> Sequence[Pending]:
        try:
            return self._mail.send(xs, dst, channel)
        except RuntimeError as error:
            what = f"sending {wire.specs(xs)} on channel {channel!r}"
            raise self._lost(error, what, (dst,)) from error

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        try:
            return self._mail.recv(outs, src, channel)
        except RuntimeError as error:
            what = f"receiving {wire.specs(outs)} on channel {channel!r}"
            raise self._lost(error, what, (src,)) from error

    def settle(self, sent: Sequence[Pending]) -> None:
        if sent:
            self._attempt(lambda: [x.wait() for x in sent], lambda: "while messages left")

    def flush(self) -> None:
        self._attempt(self._mail.flush, lambda: "while messages left")
        for x in list(self._begun):
            x.wait()
        if self._alarm.failure is not None:
            raise self._alarm.failure.error()

    def exchange(self, what: Any) -> list[Any]:
        out: list[Any] = [None] * self.mesh.size
        self._attempt(
            lambda: dist.all_gather_object(out, what, group=self._groups.control),
            lambda: "in exchange",
        )
        return out

    def exchange_digest(self, n: int, meanwhile: Callable[[], object] = lambda: None) -> list[int]:
        return self._attempt(
            lambda: self._digests.exchange(n, meanwhile), lambda: "in exchange_digest"
        )

    # --- errors
    # ---------------------------------------------------------------------------------------

    def _attempt(
        self, run: Callable[[], T], what: Callable[[], str], peers: Sequence[int] = ()
    ) -> T:
        if self._alarm.failure is not None:
            raise self._alarm.failure.error()
        try:
            return run()
        except RuntimeError as error:
            raise self._lost(error, what(), peers or range(self.mesh.size)) from error

    def _lost(self, error: RuntimeError, what: str, peers: Sequence[int]) -> BaseException:
        """The error to raise for one that torch.distributed raised: who failed first, or what was
        lost here; or that error itself where it is about something else (out of memory, a dtype
        that NCCL lacks)."""
        if self._alarm.failure is None and not _is_loss(error):
            raise error
        # Where a rank was given the whole timeout to answer, a note about it would be there by now.
        failure = self._alarm.first(wait=0 if _late(error) else _NOTE)
        if failure is None:
            others = [r for r in peers if r != self.rank]
            # After a timeout gloo itself closes all connections, so that a closed one says nothing.
            found = [] if _late(error) else self._gone()
            culprit = found[0] if found else others[0] if len(others) == 1 else None
            failure = self._alarm.record(
                culprit, self._loss(error, what, found or others, bool(found))
            )
        self._groups.sever()
        return failure.error()

    def _gone(self) -> list[int]:
        """The ranks that are gone, as far as their connections tell: those that ended without a
        word, else those that left."""
        end = time.monotonic() + _NOTE
        while True:
            found = self._groups.gone()
            left = [r for r in found if self._alarm.has_left(r)]
            # Rank 0 keeps the store. Where that is gone, so is rank 0, and the others may have
            # followed it.
            first = [0] if not self._alarm.reachable and self.rank else []
            if (found and set(first) <= set(found)) or time.monotonic() > end:
                break
            time.sleep(0.05)
        if first and 0 in found:
            return first
        return [r for r in found if r not in left] or left

    def _loss(self, error: RuntimeError, what: str, others: Sequence[int], gone: bool) -> str:
        """What happened to a rank, or to one of several; or to several that are ``gone``."""
        late = _late(error)
        end = f" within {self._timeout:g} s" if late else f": {_reason(error)}"
        if gone and self._alarm.has_left(others[0]):
            return f"it ended, or closed its runner, while rank {self.rank} was {what}"
        if gone and len(others) > 1:
            return (
                f"it and {ranks(others[1:])} lost contact with rank {self.rank}, which was "
                f"{what}{end}"
            )
        if len(others) == 1:
            verb = "did not answer" if late else "lost contact with"
            return f"it {verb} rank {self.rank}, which was {what}{end}"
        names = f"ranks {', '.join(map(str, others))}"
        verb = f"not all of {names} answered" if late else f"lost contact with one of {names}"
        return f"rank {self.rank} was {what}; {verb}{end}"

    def fail(self, error: BaseException) -> BaseException:
        failure = self._alarm.record(self.rank, one_line(error))
        self._groups.sever()
        return (
            error
            if failure.teller == self.rank or isinstance(error, RankError)
            else failure.error()
        )

    def leave(self) -> None:
        """Let the ranks go that wait for this one, which communicates no more."""
        if self._closer.alive:
            self._alarm.close()
            self._alarm.leave()
            self._groups.leave()

    def close(self) -> None:
        # not in the finalizer: it calls torch, which may be tracing when a runner is collected
        self.leave()
        self._closer()


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOSS.search(str(error)))


def _late(error: RuntimeError) -> bool:
    return "timed out" in str(error).lower()


class _Guarded:
    """A collective under way, whose failure is explained like any other's."""

    def __init__(self, wait: Callable[[], torch.Tensor], begun: dict[_Guarded, None]) -> None:
        self._wait, self._begun = wait, begun
        begun[self] = None

    def wait(self) -> torch.Tensor:
        self._begun.pop(self, None)
        return self._wait()


def _reason(error: RuntimeError) -> str:
    """What torch.distributed says, without the source line and the advice.

    >>> _reason(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7. This is"))
    'Connection closed by peer [::1]:7'
    """
    return re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).split(". ")[0]


def _close(alarm: Alarm, groups: Groups) -> None:
    alarm.close()
    groups.close()
