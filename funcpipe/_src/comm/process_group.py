"""The communicator of a process that is one rank of a mesh: gloo on CPUs, NCCL on GPUs.

In: a mesh, and the environment that torchrun (or fp.launch) sets.
Out: as `funcpipe._src.comm` says.

How errors spread. A rank that fails reports so in the store (`failure_watch.py`) and severs its
process groups (`groups.py`). A rank that waits for it sees its connection close, finds the report,
severs its own groups and raises RankError in turn. The thread that watches the store frees a rank
that waits for one which is far from any communication. A process that dies without a report is
noticed by the ranks whose connections to it close, and the first of them reports in its place. A
rank that closes its communicator reports that, so that ranks which wait for it can say so.
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

from funcpipe._src.comm import Channel, Pending, group_collectives, nothing, tensor_layout
from funcpipe._src.comm.consensus import DigestExchange
from funcpipe._src.comm.cooperative_scheduler import ranks_text
from funcpipe._src.comm.failure_watch import Failure, FailureWatch, one_line
from funcpipe._src.comm.groups import AxesGroup, ProcessGroups
from funcpipe._src.comm.p2p import messages_over
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import RankError

T = TypeVar("T")
_LOSS = re.compile(r"connect|peer|socket|pipe|timed out|timeout|nccl", re.IGNORECASE)
# Seconds to look for a report when a connection closes. A rank writes it before it severs its
# groups, so one that is not there is most likely never written.
_REPORT_WAIT = 0.5


class ProcessGroupCommunicator:
    """This process as one rank of ``mesh``, as ``funcpipe._src.comm.Communicator`` describes it.

    All ranks construct it alike. If torch.distributed is not initialised, the first communicator
    initialises it from torchrun's environment.

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
        self,
        mesh: Mesh,
        device: torch.device | str | None = None,
        timeout: float = 600.0,
    ) -> None:
        try:
            groups = ProcessGroups(mesh, device, timedelta(seconds=timeout))
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise RankError(
                f"not every rank of {mesh!r} came to make process groups within {timeout:g} s: "
                f"{_reason(error)}"
            ) from error
        self._groups = groups
        self.mesh = mesh
        self.rank = groups.rank
        self.device = groups.device
        self._timeout = timeout
        key = f"funcpipe/{groups.control.group_name}"
        store = dist.distributed_c10d._get_default_store()
        self._watch = FailureWatch(store, f"{key}/failure", self.rank, groups.sever)
        self._messages = messages_over(groups, store, key)
        self._digests = DigestExchange(groups.control)
        self._started: dict[_Started, None] = {}  # collectives that nobody has waited for yet
        self._closer = weakref.finalize(self, _close, self._watch, groups)

    def beside(self, device: torch.device | str) -> ProcessGroupCommunicator:
        """Another communicator of the same ranks and timeout; all ranks make it alike."""
        return ProcessGroupCommunicator(self.mesh, device, self._timeout)

    def prepare(
        self,
        axes_sets: Iterable[Axes],
        channels: Iterable[Channel] = (),
    ) -> None:
        def run() -> None:
            self._groups.prepare(axes_sets, channels)

        self._attempt(run, lambda: "while making process groups")

    # --- collectives --------------------------------------------------------------------------

    def _collective(
        self,
        kind: str,
        tensor: torch.Tensor,
        axes: Axes,
        run: Callable[[AxesGroup], T],
    ) -> T:
        group = self._groups.over(axes)

        def what() -> str:
            return f"in {kind} of {tensor_layout.spec(tensor.shape, tensor.dtype)} over {axes}"

        return self._attempt(lambda: run(group), what, group.ranks)

    def _check_shards(self, kind: str, tensor: torch.Tensor, axes: Axes) -> None:
        tensor_layout.check_shards(kind, tensor, axes, self.mesh.axis_size(axes))

    def all_reduce(self, tensor: torch.Tensor, axes: Axes, op: str = "sum") -> torch.Tensor:
        tensor_layout.check_op(op)

        def run(group: AxesGroup) -> torch.Tensor:
            return group_collectives.all_reduce(tensor, op, group)

        return self._collective(f"all_reduce({op})", tensor, axes, run)

    def all_gather(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        def run(group: AxesGroup) -> torch.Tensor:
            return group_collectives.all_gather(tensor, group)

        return self._collective("all_gather", tensor, axes, run)

    def reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        self._check_shards("reduce_scatter", tensor, axes)

        def run(group: AxesGroup) -> torch.Tensor:
            return group_collectives.reduce_scatter(tensor, group)

        return self._collective("reduce_scatter", tensor, axes, run)

    def start_all_gather(self, tensor: torch.Tensor, axes: Axes) -> Pending:
        def run(group: AxesGroup) -> Pending:
            return group_collectives.start_all_gather(tensor, group)

        return self._start("all_gather", tensor, axes, run)

    def start_reduce_scatter(self, tensor: torch.Tensor, axes: Axes) -> Pending:
        self._check_shards("reduce_scatter", tensor, axes)

        def run(group: AxesGroup) -> Pending:
            return group_collectives.start_reduce_scatter(tensor, group)

        return self._start("reduce_scatter", tensor, axes, run)

    def _start(
        self,
        kind: str,
        tensor: torch.Tensor,
        axes: Axes,
        run: Callable[[AxesGroup], Pending],
    ) -> Pending:
        pending = self._collective(kind, tensor, axes, run)

        def wait() -> torch.Tensor:
            return self._collective(kind, tensor, axes, lambda _: pending.wait())

        return _Started(wait, self._started)

    def all_to_all(self, tensor: torch.Tensor, axes: Axes) -> torch.Tensor:
        self._check_shards("all_to_all", tensor, axes)

        def run(group: AxesGroup) -> torch.Tensor:
            return group_collectives.all_to_all(tensor, group)

        return self._collective("all_to_all", tensor, axes, run)

    # --- messages and host objects ------------------------------------------------------------

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        destination: int,
        channel: str,
    ) -> Sequence[Pending]:
        try:
            return self._messages.send(tensors, destination, channel)
        except RuntimeError as error:
            what = f"sending {tensor_layout.specs(tensors)} on channel {channel!r}"
            raise self._explained(error, what, (destination,)) from error

    def recv(
        self,
        buffers: Sequence[torch.Tensor],
        source: int,
        channel: str,
    ) -> Sequence[torch.Tensor]:
        try:
            return self._messages.recv(buffers, source, channel)
        except RuntimeError as error:
            what = f"receiving {tensor_layout.specs(buffers)} on channel {channel!r}"
            raise self._explained(error, what, (source,)) from error

    def settle(self, sent: Sequence[Pending]) -> None:
        def run() -> None:
            for pending in sent:
                pending.wait()

        if sent:
            self._attempt(run, lambda: "while messages left")

    def flush(self) -> None:
        self._attempt(self._messages.flush, lambda: "while messages left")
        for started in list(self._started):
            started.wait()
        self._raise_failure()

    def exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.mesh.size

        def run() -> None:
            dist.all_gather_object(values, value, group=self._groups.control)

        self._attempt(run, lambda: "in exchange")
        return values

    def exchange_digest(
        self,
        digest: int,
        meanwhile: Callable[[], object] = nothing,
    ) -> list[int]:
        def run() -> list[int]:
            return self._digests.exchange(digest, meanwhile)

        return self._attempt(run, lambda: "in exchange_digest")

    # --- errors -------------------------------------------------------------------------------

    def _attempt(
        self,
        run: Callable[[], T],
        what: Callable[[], str],
        peers: Sequence[int] = (),
    ) -> T:
        """Run what communicates with peers (by default all ranks), and explain its failure."""
        self._raise_failure()
        try:
            return run()
        except RuntimeError as error:
            raise self._explained(error, what(), peers or range(self.mesh.size)) from error

    def _raise_failure(self) -> None:
        """Raise the first failure, if this rank has seen one."""
        if self._watch.failure is not None:
            raise self._watch.failure.error()

    def _explained(self, error: RuntimeError, what: str, peers: Sequence[int]) -> BaseException:
        """The error to raise for one of torch.distributed: which rank failed, or what was lost.

        An error that is about something else (out of memory, a dtype that NCCL lacks) is raised as
        it is.
        """
        if self._watch.failure is None and not _is_loss(error):
            raise error
        # If a rank had the whole timeout to answer, a report about it would be there by now.
        failure = self._watch.first(wait=0 if _is_late(error) else _REPORT_WAIT)
        if failure is None:
            failure = self._report_loss(error, what, peers)
        self._groups.sever()
        return failure.error()

    def _report_loss(self, error: RuntimeError, what: str, peers: Sequence[int]) -> Failure:
        """Report that peers were lost, in their place."""
        others = [rank for rank in peers if rank != self.rank]
        # After a timeout gloo itself closes all connections, so a closed one proves nothing.
        gone = [] if _is_late(error) else self._gone()
        culprit = None
        if gone:
            culprit = gone[0]
        elif len(others) == 1:
            culprit = others[0]
        text = self._loss(error, what, gone or others, bool(gone))
        return self._watch.record(culprit, text)

    def _gone(self) -> list[int]:
        """The ranks that are gone, as far as their connections show.

        Those that ended without a report come before those that closed their communicator.
        """
        end = time.monotonic() + _REPORT_WAIT
        while True:
            gone = self._groups.gone()
            left = [rank for rank in gone if self._watch.has_left(rank)]
            # Rank 0 keeps the store. If the store is gone, so is rank 0, and the others may have
            # followed it.
            store_is_gone = self.rank != 0 and not self._watch.reachable
            if gone and (0 in gone or not store_is_gone):
                break
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        if store_is_gone and 0 in gone:
            return [0]
        return [rank for rank in gone if rank not in left] or left

    def _loss(self, error: RuntimeError, what: str, others: Sequence[int], gone: bool) -> str:
        """What happened to a rank, or to one of several; or to several that are ``gone``."""
        late = _is_late(error)
        end = f" within {self._timeout:g} s" if late else f": {_reason(error)}"
        if gone and self._watch.has_left(others[0]):
            return f"it ended, or closed its runner, while rank {self.rank} was {what}"
        if gone and len(others) > 1:
            return (
                f"it and {ranks_text(others[1:])} lost contact with rank {self.rank}, which was "
                f"{what}{end}"
            )
        if len(others) == 1:
            verb = "did not answer" if late else "lost contact with"
            return f"it {verb} rank {self.rank}, which was {what}{end}"
        names = f"ranks {', '.join(map(str, others))}"
        verb = f"not all of {names} answered" if late else f"lost contact with one of {names}"
        return f"rank {self.rank} was {what}; {verb}{end}"

    def fail(self, error: BaseException) -> BaseException:
        failure = self._watch.record(self.rank, one_line(error))
        self._groups.sever()
        if failure.reporter == self.rank or isinstance(error, RankError):
            return error
        return failure.error()

    def leave(self) -> None:
        """Free the ranks that wait for this one, which communicates no more."""
        if self._closer.alive:
            self._watch.close()
            self._watch.leave()
            self._groups.leave()

    def close(self) -> None:
        # not in the finalizer: it calls torch, which may be tracing when a runner is collected
        self.leave()
        self._closer()


def _is_loss(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOSS.search(str(error)))


def _is_late(error: RuntimeError) -> bool:
    return "timed out" in str(error).lower()


class _Started:
    """A collective under way, whose failure is explained like any other's."""

    def __init__(
        self,
        wait: Callable[[], torch.Tensor],
        started: dict[_Started, None],
    ) -> None:
        self._wait = wait
        self._started = started
        started[self] = None

    def wait(self) -> torch.Tensor:
        self._started.pop(self, None)
        return self._wait()


def _reason(error: RuntimeError) -> str:
    """What torch.distributed says, without the source line and the advice.

    >>> text = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7. This is"
    >>> _reason(RuntimeError(text))
    'Connection closed by peer [::1]:7'
    """
    text = " ".join(str(error).split())
    text = re.sub(r"^\[\S*\] ", "", text)
    return text.split(". ")[0]


def _close(watch: FailureWatch, groups: ProcessGroups) -> None:
    watch.close()
    groups.close()
