"""Messages over process groups: one mail for gloo, one for NCCL.

Terms. A *lane* is a (source, destination, channel). A message is a sequence of tensors; each travels as the
flat elements in its wire order (`wire.py`), and one without elements does not travel at all. A *pending*
send is one that may not have left yet: its tensor must live until then.

In: tensors, peers, channels. Out: filled tensors. Errors are those of torch.distributed.

FIFO on a lane does not hang on the order in which a library happens to match messages: on gloo every tensor
carries its number in its tag, on NCCL every lane has a communicator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from funcpipe.comm import wire
from funcpipe.comm.groups import Groups

_NUMBERS = 1 << 16  # tag = channel number * _NUMBERS + running number of the tensor on its lane
_CHANNELS = 1 << 14  # tags stay below 2**30


class _Lane:
    """One end of a gloo lane."""

    __slots__ = ("count", "first", "peer")

    def __init__(self, peer: int, channel: int) -> None:
        self.peer, self.first, self.count = peer, channel * _NUMBERS, 0

    def tag(self) -> int:
        self.count = (self.count + 1) % _NUMBERS
        return self.first + self.count


class GlooMail:
    """Messages between CPUs, over one group of all ranks.

    A gloo send says that it has left only to who waits for it, and to wait would make a send wait for its
    receiver. So every sent tensor is kept until ``flush``.
    """

    def __init__(self, group: dist.ProcessGroup, store: dist.Store, key: str) -> None:
        self._group, self._store, self._key = group, store, key
        self._channels: dict[str, int] = {}
        self._outgoing: dict[tuple[int, str], _Lane] = {}
        self._incoming: dict[tuple[int, str], _Lane] = {}
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> None:
        lane = self._outgoing.get((dst, channel)) or self._open(self._outgoing, dst, channel)
        for x in xs:
            if x.numel():
                dense = x if x.is_contiguous() else wire.flat(x)
                self._pending.append((self._group.send([dense], lane.peer, lane.tag()), dense))

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        lane = self._incoming.get((src, channel)) or self._open(self._incoming, src, channel)
        works = []
        for out in outs:
            if out.numel():
                # A view or copy where `out` is not contiguous; the elements of a copy are put in place below.
                dense = out if out.is_contiguous() else wire.flat(out)
                works.append((self._group.recv([dense], lane.peer, lane.tag()), dense, out))
        for work, dense, out in works:
            work.wait()
            if dense is not out and dense.data_ptr() != out.data_ptr():
                out.copy_(dense.view(out.shape))
        return outs

    def flush(self) -> None:
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()

    def _open(self, lanes: dict[tuple[int, str], _Lane], peer: int, channel: str) -> _Lane:
        lane = lanes[peer, channel] = _Lane(peer, self._number(channel))
        return lane

    def _number(self, channel: str) -> int:
        """The number of a channel, the same on all ranks: whoever asks the store first gives it one."""
        if channel not in self._channels:
            number = self._store.add(f"{self._key}/channels", 1)
            kept = int(self._store.compare_set(f"{self._key}/channel/{channel}", "", str(number)))
            if kept >= _CHANNELS:
                raise RuntimeError(f"more than {_CHANNELS} channels; reuse names, FIFO order tells messages apart")
            self._channels[channel] = kept
        return self._channels[channel]


class NcclMail:
    """Messages between GPUs, one communicator for each lane (`Groups.prepare`).

    Both ends only enqueue: a receive makes the current stream wait, not the host. A sent tensor is kept
    until its work is waited on, at the latest by ``flush``, which also joins the communicators' streams to
    the current one, as a capture of the step into a CUDA graph needs.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._pending: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> None:
        group = self._groups.lane(self._groups.rank, dst, channel)
        there = int(self._groups.rank < dst)  # the two ranks of a group are counted in ascending order
        for x in xs:
            if x.numel():
                flat = wire.flat(x).view(torch.uint8)
                self._pending.append((group.send([flat], there, 0), flat))
        if len(self._pending) > 64 and not torch.cuda.is_current_stream_capturing():
            self._pending = [(work, x) for work, x in self._pending if not work.is_completed()]

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        group = self._groups.lane(src, self._groups.rank, channel)
        there = int(self._groups.rank < src)
        for out in outs:
            if out.numel():
                flat = wire.flat(out)
                group.recv([flat.view(torch.uint8)], there, 0).wait()
                if flat.data_ptr() != out.data_ptr():
                    out.copy_(flat.view(out.shape))
        return outs

    def flush(self) -> None:
        for work, _ in self._pending:
            work.wait()
        self._pending.clear()


def mail(groups: Groups, store: dist.Store, key: str) -> GlooMail | NcclMail:
    """The mail that fits the groups' device."""
    return NcclMail(groups) if groups.mail is None else GlooMail(groups.mail, store, key)
