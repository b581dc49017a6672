"""Messages over process groups: one class for gloo, one for NCCL.

In: tensors, peers, names of channels.
Out: filled buffers, pending sends. Errors are those of torch.distributed.

A message is a sequence of tensors. Each travels as its flat elements (`tensor_layout.py`); one
without elements does not travel at all. A pending send may not have left yet: its tensor must live
until then.

The order of messages on a channel does not depend on how a library happens to match them: on gloo
every tensor carries its number in its tag, on NCCL every channel has a communicator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.utils.dlpack import to_dlpack

from funcpipe._src.comm import Done, Pending, tensor_layout
from funcpipe._src.comm.groups import ProcessGroups

_NUMBERS = 1 << 16  # tag = number of the channel's name * _NUMBERS + running number of the tensor
_NAMES = 1 << 14  # tags stay below 2**30
_SMALL = 1 << 16  # bytes of a tensor that is not worth waiting for


class _Outbox:
    """Sends that may not have left yet, with their tensors, in order."""

    def __init__(self) -> None:
        self.sends: dict[_Send, None] = {}

    def put(self, work: dist.Work, tensor: torch.Tensor) -> _Send:
        send = _Send(self, work, tensor)
        self.sends[send] = None
        return send

    def flush(self) -> None:
        for send in list(self.sends):
            send.wait()


class _Send:
    """A tensor on its way."""

    __slots__ = ("outbox", "tensor", "work")

    def __init__(self, outbox: _Outbox, work: dist.Work, tensor: torch.Tensor) -> None:
        self.outbox = outbox
        self.work = work
        self.tensor = tensor

    def wait(self) -> torch.Tensor:
        if self in self.outbox.sends:
            self.work.wait()
            del self.outbox.sends[self]
        return self.tensor


class _ChannelEnd:
    """One end of a gloo channel."""

    __slots__ = ("count", "first", "peer")

    def __init__(self, peer: int, number: int) -> None:
        self.peer = peer
        self.first = number * _NUMBERS
        self.count = 0

    def next_tag(self) -> int:
        self.count = (self.count + 1) % _NUMBERS
        return self.first + self.count


# The ends of this rank, by peer and name.
_Ends = dict[tuple[int, str], _ChannelEnd]


class GlooMessages:
    """Messages between CPUs, over one group of all ranks.

    gloo reports that a send has left only to a call that waits for it, and that wait would last
    until the receiver comes. So every sent tensor is kept until ``flush``, or until the runner
    waits for it because it has proof that it arrived. Even then waiting takes a moment, so small
    tensors are kept until ``flush`` in any case.
    """

    def __init__(self, group: dist.ProcessGroup, store: dist.Store, key: str) -> None:
        self._group = group
        self._store = store
        self._key = key
        self._numbers: dict[str, int] = {}
        self._outgoing: _Ends = {}
        self._incoming: _Ends = {}
        self._outbox = _Outbox()

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        destination: int,
        channel: str,
    ) -> list[Pending]:
        end = self._end(self._outgoing, destination, channel)
        sent: list[Pending] = []
        for tensor in tensors:
            if not tensor.numel():
                sent.append(Done(tensor))
                continue
            dense = _flat_if_strided(tensor)
            work = self._group.send([dense], end.peer, end.next_tag())
            send = self._outbox.put(work, dense)
            sent.append(send if tensor.nbytes >= _SMALL else Done(tensor))
        return sent

    def recv(
        self,
        buffers: Sequence[torch.Tensor],
        source: int,
        channel: str,
    ) -> Sequence[torch.Tensor]:
        end = self._end(self._incoming, source, channel)
        begun = []
        for buffer in buffers:
            if buffer.numel():
                dense = _flat_if_strided(buffer)
                work = self._group.recv([dense], end.peer, end.next_tag())
                begun.append((work, dense, buffer))
        for work, dense, buffer in begun:
            work.wait()
            _copy_back(dense, buffer)
        return buffers

    def flush(self) -> None:
        self._outbox.flush()

    def _end(self, ends: _Ends, peer: int, channel: str) -> _ChannelEnd:
        end = ends.get((peer, channel))
        if end is None:
            end = ends[peer, channel] = _ChannelEnd(peer, self._number(channel))
        return end

    def _number(self, channel: str) -> int:
        """The number of a name, the same on all ranks: the first that asks the store sets it."""
        if channel not in self._numbers:
            number = self._store.add(f"{self._key}/channels", 1)
            kept = int(self._store.compare_set(f"{self._key}/channel/{channel}", "", str(number)))
            if kept >= _NAMES:
                raise RuntimeError(
                    f"more than {_NAMES} channels; reuse names, FIFO order tells messages apart"
                )
            self._numbers[channel] = kept
        return self._numbers[channel]


def _flat_if_strided(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as it is; else its flat elements, a view or a copy."""
    return tensor if tensor.is_contiguous() else tensor_layout.flat(tensor)


def _copy_back(flat: torch.Tensor, buffer: torch.Tensor) -> None:
    """Put received elements in place, where they came into a copy of the buffer."""
    if flat.data_ptr() != buffer.data_ptr():
        buffer.copy_(flat.view(buffer.shape))


class NcclMessages:
    """Messages between GPUs, one communicator for each channel (`ProcessGroups.prepare`).

    Both ends only enqueue: a receive makes the current stream wait, not the host, and so does
    waiting for a send. What is then freed may be used again. ``flush`` joins the communicators'
    streams to the current one, as the capture of a step into a CUDA graph needs.

    torch marks what travels as used by the communicator's stream (``record_stream``). What is
    marked while a graph is captured is not used again before its end, so every message would keep
    memory of its own. The program proves how long each message lives, so messages travel in tensors
    that the allocator does not know (`unmarked`).
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        self._outbox = _Outbox()

    def send(
        self,
        tensors: Sequence[torch.Tensor],
        destination: int,
        channel: str,
    ) -> list[Pending]:
        rank = self._groups.rank
        group = self._groups.of_channel((rank, destination, channel))
        peer = int(rank < destination)  # the two ranks of a group are counted in ascending order
        sent: list[Pending] = []
        for tensor in tensors:
            if not tensor.numel():
                sent.append(Done(tensor))
                continue
            flat = unmarked(tensor_layout.flat(tensor).view(torch.uint8))
            sent.append(self._outbox.put(group.send([flat], peer, 0), flat))
        return sent

    def recv(
        self,
        buffers: Sequence[torch.Tensor],
        source: int,
        channel: str,
    ) -> Sequence[torch.Tensor]:
        rank = self._groups.rank
        group = self._groups.of_channel((source, rank, channel))
        peer = int(rank < source)
        for buffer in buffers:
            if buffer.numel():
                flat = tensor_layout.flat(buffer)
                group.recv([unmarked(flat.view(torch.uint8))], peer, 0).wait()
                _copy_back(flat, buffer)
        return buffers

    def flush(self) -> None:
        self._outbox.flush()


def unmarked(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor that torch's allocator takes for somebody else's.

    The memory lives as long as this tensor does.
    """
    return torch.from_dlpack(to_dlpack(tensor.detach()))


def messages_over(
    groups: ProcessGroups,
    store: dist.Store,
    key: str,
) -> GlooMessages | NcclMessages:
    """The messages that fit the groups' device."""
    if groups.messages is None:
        return NcclMessages(groups)
    return GlooMessages(groups.messages, store, key)
