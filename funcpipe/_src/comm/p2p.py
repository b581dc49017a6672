"""Messages over process groups: one mail for gloo, one for NCCL.

Terms. A *lane* is a (source, destination, channel). A message is a sequence of tensors; each
travels as the flat elements in its wire order (`tensor_layout.py`), and one without elements does
not travel at all. A *pending*
send is one that may not have left yet: its tensor must live until then.

In: tensors, peers, channels. Out: filled tensors, pending sends. Errors are those of
torch.distributed.

FIFO on a lane does not hang on the order in which a library happens to match messages: on gloo
every tensor carries its number in its tag, on NCCL every lane has a communicator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.utils.dlpack import to_dlpack

from funcpipe._src.comm import Done, Pending
from funcpipe._src.comm import tensor_layout as wire
from funcpipe._src.comm.groups import Groups

_NUMBERS = 1 << 16  # tag = channel number * _NUMBERS + running number of the tensor on its lane
_CHANNELS = 1 << 14  # tags stay below 2**30
_SMALL = 1 << 16  # bytes of a tensor that is not worth waiting for


class _Outbox:
    """Sends that may not have left yet, with their tensors, in order."""

    def __init__(self) -> None:
        self.sends: dict[_Send, None] = {}

    def put(self, work: dist.Work, x: torch.Tensor) -> _Send:
        send = _Send(self, work, x)
        self.sends[send] = None
        return send

    def flush(self) -> None:
        for x in list(self.sends):
            x.wait()


class _Send:
    """A tensor on its way."""

    __slots__ = ("outbox", "work", "x")

    def __init__(self, outbox: _Outbox, work: dist.Work, x: torch.Tensor) -> None:
        self.outbox, self.work, self.x = outbox, work, x

    def wait(self) -> torch.Tensor:
        if self in self.outbox.sends:
            self.work.wait()
            del self.outbox.sends[self]
        return self.x


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

    A gloo send says that it has left only to who waits for it, and to wait would make a send wait
    for its receiver. So every sent tensor is kept until somebody who knows that it has arrived
    waits for it, or ``flush``. To wait takes a moment even then, so that small ones are kept until
    ``flush`` in any case.
    """

    def __init__(self, group: dist.ProcessGroup, store: dist.Store, key: str) -> None:
        self._group, self._store, self._key = group, store, key
        self._channels: dict[str, int] = {}
        self._outgoing: dict[tuple[int, str], _Lane] = {}
        self._incoming: dict[tuple[int, str], _Lane] = {}
        self._outbox = _Outbox()

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> list[Pending]:
        lane = self._outgoing.get((dst, channel)) or self._open(self._outgoing, dst, channel)
        out: list[Pending] = []
        for x in xs:
            sent: Pending = Done(x)
            if x.numel():
                dense = x if x.is_contiguous() else wire.flat(x)
                send = self._outbox.put(self._group.send([dense], lane.peer, lane.tag()), dense)
                sent = send if x.nbytes >= _SMALL else sent
            out.append(sent)
        return out

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        lane = self._incoming.get((src, channel)) or self._open(self._incoming, src, channel)
        works = []
        for out in outs:
            if out.numel():
                # A view or copy where `out` is not contiguous; the elements of a copy are put in
                # place below.
                dense = out if out.is_contiguous() else wire.flat(out)
                works.append((self._group.recv([dense], lane.peer, lane.tag()), dense, out))
        for work, dense, out in works:
            work.wait()
            if dense is not out and dense.data_ptr() != out.data_ptr():
                out.copy_(dense.view(out.shape))
        return outs

    def flush(self) -> None:
        self._outbox.flush()

    def _open(self, lanes: dict[tuple[int, str], _Lane], peer: int, channel: str) -> _Lane:
        lane = lanes[peer, channel] = _Lane(peer, self._number(channel))
        return lane

    def _number(self, channel: str) -> int:
        """The number of a channel, the same on all ranks: whoever asks the store first gives it
        one."""
        if channel not in self._channels:
            number = self._store.add(f"{self._key}/channels", 1)
            kept = int(self._store.compare_set(f"{self._key}/channel/{channel}", "", str(number)))
            if kept >= _CHANNELS:
                raise RuntimeError(
                    f"more than {_CHANNELS} channels; reuse names, FIFO order tells messages apart"
                )
            self._channels[channel] = kept
        return self._channels[channel]


class NcclMail:
    """Messages between GPUs, one communicator for each lane (`Groups.prepare`).

    Both ends only enqueue: a receive makes the current stream wait, not the host, and so does who
    waits for a send; what is then freed may be used again. At the latest ``flush`` does so, which
    joins the communicators' streams to the current one, as a capture of the step into a CUDA graph
    needs.

    torch marks what travels as used by the communicator's stream (``record_stream``), and what is
    marked while a
    graph is captured is not used again before its end: every message would keep memory of its own.
    Here the program proves how long each lives, so they travel under names that the allocator does
    not know.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._outbox = _Outbox()

    def send(self, xs: Sequence[torch.Tensor], dst: int, channel: str) -> list[Pending]:
        group = self._groups.lane(self._groups.rank, dst, channel)
        there = int(
            self._groups.rank < dst
        )  # the two ranks of a group are counted in ascending order
        out: list[Pending] = []
        for x in xs:
            if x.numel():
                flat = unmarked(wire.flat(x).view(torch.uint8))
                out.append(self._outbox.put(group.send([flat], there, 0), flat))
            else:
                out.append(Done(x))
        return out

    def recv(self, outs: Sequence[torch.Tensor], src: int, channel: str) -> Sequence[torch.Tensor]:
        group = self._groups.lane(src, self._groups.rank, channel)
        there = int(self._groups.rank < src)
        for out in outs:
            if out.numel():
                flat = wire.flat(out)
                group.recv([unmarked(flat.view(torch.uint8))], there, 0).wait()
                if flat.data_ptr() != out.data_ptr():
                    out.copy_(flat.view(out.shape))
        return outs

    def flush(self) -> None:
        self._outbox.flush()


def unmarked(x: torch.Tensor) -> torch.Tensor:
    """The same memory, which lives as long as this does, in a tensor that torch's allocator takes
    for somebody else's."""
    return torch.from_dlpack(to_dlpack(x.detach()))


def mail(groups: Groups, store: dist.Store, key: str) -> GlooMail | NcclMail:
    """The mail that fits the groups' device."""
    return NcclMail(groups) if groups.mail is None else GlooMail(groups.mail, store, key)
