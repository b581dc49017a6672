"""The process groups of one mesh: made by all ranks alike, severed on failure, given back.

In: a mesh, a device, the environment that torchrun sets.
Out: process groups.

A process group counts its ranks in ascending order, a mesh in the order of the axes that are asked
for; where those are not in mesh order the two differ. To sever a group is to make every operation
that waits on it end with an error, here and on the other ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from funcpipe._src.comm import Channel
from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import MeshError

_SEVER_TAG = 2**30  # no message has it, nor the next one: channels count below it
_PROBE_TAG = _SEVER_TAG + 1

# torch.distributed has one default group in a process. Where funcpipe made it, the last
# communicator unmakes it.
_users: weakref.WeakSet[ProcessGroups] = weakref.WeakSet()
_initialised = itertools.count()


class AxesGroup(NamedTuple):
    """The process group of this rank over some axes.

    Args:
        process_group: None where the rank is alone.
        ranks: in the order of the mesh.
        positions: of each of these ranks in the process group; None if the orders are the same.
    """

    process_group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    positions: list[int] | None


class ProcessGroups:
    """The process groups of one communicator. All ranks construct it, and call ``prepare``, alike.

    Raises:
        MeshError: the number of processes is not the size of the mesh, or there is no process group
            and no environment to make one from.
    """

    def __init__(self, mesh: Mesh, device: torch.device | str | None, timeout: timedelta) -> None:
        self.mesh = mesh
        self.timeout = timeout
        self.device = _default_device() if device is None else _with_index(torch.device(device))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._made: list[tuple[dist.ProcessGroup, str]] = []  # with its backend
        self._by_axes: dict[Axes, dist.ProcessGroup | None] = {}  # axes in mesh order
        self._views: dict[Axes, AxesGroup] = {}  # axes in any order
        self._by_channel: dict[Channel, dist.ProcessGroup] = {}
        self._probes: list[tuple[torch.Tensor, dist.Work]] = []
        ours = bool(_users)
        if not dist.is_initialized():
            _initialise(mesh, self.device, timeout)
            ours = True
        _check_size(mesh, dist.get_world_size())
        self.rank = dist.get_rank()
        if ours:
            _users.add(self)
        try:
            self._make_first()
        except BaseException:
            self.close()
            raise

    def _make_first(self) -> None:
        everyone = range(self.mesh.size)
        control = self._new(everyone, "gloo", "control")
        assert control is not None
        self.control = control
        # On CPUs one group carries all messages, which tags tell apart. NCCL knows no tags, so
        # `prepare` makes a group for each channel.
        self.messages = None
        if self.device.type == "cpu":
            self.messages = self._new(everyone, "gloo", "messages")

    def _new(self, ranks: Iterable[int], backend: str, what: str) -> dist.ProcessGroup | None:
        """A process group of these ranks; None where this rank is not among them."""
        group = dist.new_group(
            sorted(ranks), timeout=self.timeout, backend=backend, group_desc=f"funcpipe {what}"
        )
        if not isinstance(group, dist.ProcessGroup):
            return None
        self._made.append((group, backend))
        return group

    # --- over axes and for channels -----------------------------------------------------------

    def prepare(
        self,
        axes_sets: Iterable[Axes],
        channels: Iterable[Channel] = (),
    ) -> None:
        """Make the groups that are still missing.

        Every rank calls it with the same arguments, since every rank takes part in making every
        group. Channels matter to NCCL alone, where each gets a communicator of its own: on a shared
        one, messages would wait for each other.
        """
        wanted = {self._canonical(axes) for axes in axes_sets}
        for axes in sorted(wanted - self._by_axes.keys()):
            self._by_axes[axes] = self._make_over(axes)
        if self.device.type != "cpu":
            for channel in sorted(set(channels) - self._by_channel.keys()):
                self._make_for(channel)

    def _canonical(self, axes: Axes) -> Axes:
        """The axes in mesh order, without those of one rank."""
        ordered = self.mesh.ordered(self.mesh.check(axes, "prepare"))
        return tuple(axis for axis in ordered if self.mesh.axes[axis] > 1)

    def _make_over(self, axes: Axes) -> dist.ProcessGroup | None:
        mine = None
        groups = [self.mesh.group(rank, axes) for rank in range(self.mesh.size)]
        for ranks in dict.fromkeys(groups):
            if len(ranks) > 1:
                mine = self._new(ranks, _backend(self.device), f"axes {axes}") or mine
        if mine is not None and self.device.type != "cpu":
            self._warm_up(mine)
        return mine

    def _make_for(self, channel: Channel) -> None:
        source, destination, name = channel
        text = f"channel {source}>{destination} {name}"
        group = self._new({source, destination}, _backend(self.device), text)
        if group is not None:
            self._warm_up(group)
            self._connect(group, self.rank == source, int(source < destination))
            self._by_channel[channel] = group

    def _connect(self, group: dist.ProcessGroup, sends: bool, receiver: int) -> None:
        # The first message of a channel blocks the host until both ends are there. Where ranks send
        # to each other before they receive, as in a ring, all of them would wait.
        message = torch.zeros(1, device=self.device)
        if sends:
            group.send([message], receiver, 0).wait()
        else:
            group.recv([message], 1 - receiver, 0).wait()
        torch.cuda.synchronize(self.device)

    def _warm_up(self, group: dist.ProcessGroup) -> None:
        # NCCL connects at first use, which must not happen while a graph is captured, or in a send
        # that the receiver has not reached.
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        torch.cuda.synchronize(self.device)

    def over(self, axes: Axes) -> AxesGroup:
        """The process group of this rank over axes.

        Raises:
            MeshError: it was not prepared.
        """
        if axes not in self._views:
            self._views[axes] = self._view(axes)
        return self._views[axes]

    def _view(self, axes: Axes) -> AxesGroup:
        ranks = self.mesh.group(self.rank, axes)
        if len(ranks) == 1:
            return AxesGroup(None, ranks, None)
        canonical = self._canonical(axes)
        if canonical not in self._by_axes:
            raise MeshError(
                f"no process groups over {axes}: every rank must call prepare([{axes}]) first"
            )
        ascending = sorted(ranks)
        positions = None
        if list(ranks) != ascending:
            positions = [ascending.index(rank) for rank in ranks]
        return AxesGroup(self._by_axes[canonical], ranks, positions)

    def of_channel(self, channel: Channel) -> dist.ProcessGroup:
        """The NCCL group of a channel.

        Raises:
            MeshError: it was not prepared.
        """
        group = self._by_channel.get(channel)
        if group is None:
            source, destination, name = channel
            raise MeshError(
                f"no communicator for messages from rank {source} to rank {destination} on channel "
                f"{name!r}: every rank must call prepare(..., channels=[{channel}]) first"
            )
        return group

    # --- the end ------------------------------------------------------------------------------

    def gone(self) -> list[int]:
        """The ranks whose connection to this one is closed.

        Ask only before `sever`: the messages that this sends are never received.
        """
        others = [rank for rank in range(self.mesh.size) if rank != self.rank]
        return [rank for rank in others if not self._reaches(rank)]

    def _reaches(self, rank: int) -> bool:
        byte = torch.empty(1, dtype=torch.uint8)
        try:
            self._probes.append((byte, self.control.send([byte], rank, _PROBE_TAG)))
        except RuntimeError:  # gloo refuses to send over a connection that is closed
            return False
        return True

    def leave(self) -> None:
        """Close the connections between hosts.

        Ranks that wait for this one are freed; what NCCL has begun goes on.
        """
        for group, backend in self._made:
            if backend == "gloo" and group.size() > 1:
                _sever_gloo(group)

    def sever(self) -> None:
        """End all operations that wait on these groups, here and on the other ranks.

        May be called from any thread, and again.
        """
        for group, backend in self._made:
            if group.size() == 1:
                continue
            if backend == "gloo":
                _sever_gloo(group)
            else:
                _abort(group)

    def close(self) -> None:
        """Give the groups back."""
        for group, _ in reversed(self._made):
            try:
                dist.destroy_process_group(group)
            except ValueError:  # its owner has destroyed all of torch.distributed meanwhile
                break
        self._made.clear()
        if self in _users:
            _users.discard(self)
            if not _users and dist.is_initialized():
                dist.destroy_process_group()


def _sever_gloo(group: dist.ProcessGroup) -> None:
    # abort() and shutdown() of a gloo group end nothing (torch 2.13). A receive that times out
    # does: gloo then closes every connection of the group (gloo/transport/tcp/unbound_buffer.cc,
    # waitRecv). That ends what waits here, and the peers see "connection closed". A receive from a
    # peer whose connection is closed already ends at once and closes nothing, so all peers are
    # tried.
    nothing = torch.empty(1, dtype=torch.uint8)
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):
                group.recv([nothing], peer, _SEVER_TAG).wait(timedelta(milliseconds=1))


def _abort(group: dist.ProcessGroup) -> None:
    if hasattr(group, "abort"):
        group.abort()


def _backend(device: torch.device) -> str:
    return "gloo" if device.type == "cpu" else "nccl"


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def _default_device() -> torch.device:
    """The GPU of this process where every process of this machine has one, else the CPU."""
    if dist.is_initialized() and "nccl" not in dist.get_backend_config():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_size:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def _initialise(mesh: Mesh, device: torch.device, timeout: timedelta) -> None:
    """Start torch.distributed from torchrun's environment."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise MeshError(
            f"this process is not one of several ({', '.join(missing)} not set); start {mesh.size} "
            f"with `torchrun --nproc-per-node={mesh.size} script.py` or fp.launch(fn, {mesh.size})"
        )
    _check_size(mesh, int(os.environ["WORLD_SIZE"]))
    # A prefix of its own: NCCL would else find the address that an earlier group of this process
    # left in the store. torchrun keeps its store when it restarts the processes, and with it the
    # addresses of those that are gone.
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"funcpipe {start} {next(_initialised)}", store)
    if device.type == "cpu":
        dist.init_process_group("gloo", timeout=timeout, store=store, rank=rank, world_size=world)
    else:
        # The warning is about groups that both send and receive; each channel has its own.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
        # With a device_id NCCL connects now, and later groups are split off without a handshake.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            timeout=timeout,
            device_id=device,
            store=store,
            rank=rank,
            world_size=world,
        )


def _check_size(mesh: Mesh, world: int) -> None:
    if world != mesh.size:
        raise MeshError(
            f"{mesh!r} has {mesh.size} ranks, but {world} processes were started; start one for "
            f"each rank, as with `torchrun --nproc-per-node={mesh.size}`, or change the mesh"
        )
