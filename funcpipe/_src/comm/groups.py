"""The process groups of one mesh: made by all ranks alike, severed when a rank fails, given back at
the end.

Terms. A *team* is the process group of a rank over some axes. A process group counts its ranks in
ascending order, a team in the order of the mesh; for axes that are not in mesh order the two
differ. A *lane* is a (source, destination, channel). To *sever* a group is to make every operation
that waits on it end with an error, here and on the other ranks.

In: a mesh, a device, the environment that torchrun sets. Out: process groups.
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

from funcpipe._src.core.mesh import Axes, Mesh
from funcpipe.errors import MeshError

Lane = tuple[int, int, str]
_SEVER_TAG = 2**30  # no message has it, nor the next one: lanes count below it
_PROBE_TAG = _SEVER_TAG + 1

# torch.distributed has one default group in a process. Where funcpipe made it, the last
# communicator unmakes it.
_tenants: weakref.WeakSet[Groups] = weakref.WeakSet()
_initialised = itertools.count()


class Team(NamedTuple):
    """The process group of this rank over some axes."""

    group: dist.ProcessGroup | None  # None: the rank is alone
    ranks: tuple[int, ...]
    places: (
        list[int] | None
    )  # the place of each member in the process group; None: its place in the team


class Groups:
    """The process groups of one communicator. All ranks construct it, and call ``prepare``, alike.

    Raises:
        MeshError: the number of processes is not the size of the mesh, or there is no process group
            and no environment to make one from.
    """

    def __init__(self, mesh: Mesh, device: torch.device | str | None, timeout: timedelta) -> None:
        self.mesh, self.timeout = mesh, timeout
        self.device = _with_index(torch.device(device)) if device is not None else _default_device()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._made: list[tuple[dist.ProcessGroup, str]] = []  # with its backend
        self._teams: dict[Axes, dist.ProcessGroup | None] = {}
        self._views: dict[Axes, Team] = {}
        self._lanes: dict[Lane, dist.ProcessGroup] = {}
        self._probes: list[tuple[torch.Tensor, dist.Work]] = []
        ours = bool(_tenants)
        if not dist.is_initialized():
            _initialise(mesh, self.device, timeout)
            ours = True
        _check_size(mesh, dist.get_world_size())
        self.rank = dist.get_rank()
        if ours:
            _tenants.add(self)
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
        # On CPUs one group carries all messages, told apart by tags; NCCL knows no tags (see
        # `prepare`).
        self.mail = self._new(everyone, "gloo", "mail") if self.device.type == "cpu" else None

    def _new(self, ranks: Iterable[int], backend: str, what: str) -> dist.ProcessGroup | None:
        """A process group of these ranks; None where this rank is not among them."""
        group = dist.new_group(
            sorted(ranks), timeout=self.timeout, backend=backend, group_desc=f"funcpipe {what}"
        )
        if not isinstance(group, dist.ProcessGroup):
            return None
        self._made.append((group, backend))
        return group

    # --- teams and lanes
    # ------------------------------------------------------------------------------

    def prepare(self, axes_sets: Iterable[Axes], lanes: Iterable[Lane] = ()) -> None:
        """Make the groups that are still missing. Every rank calls it with the same arguments,
        since every rank takes part in making every group. Lanes matter to NCCL alone, where each
        gets a communicator of
        its own: on a shared one, messages wait for each other."""
        wanted = {self._canonical(axes) for axes in axes_sets}
        for axes in sorted(wanted - self._teams.keys()):
            self._teams[axes] = self._make_team(axes)
        if self.device.type != "cpu":
            for lane in sorted(set(lanes) - self._lanes.keys()):
                self._make_lane(lane)

    def _canonical(self, axes: Axes) -> Axes:
        sizes = self.mesh.axes
        return tuple(a for a in self.mesh.ordered(self.mesh.check(axes, "prepare")) if sizes[a] > 1)

    def _make_team(self, axes: Axes) -> dist.ProcessGroup | None:
        mine = None
        for ranks in dict.fromkeys(self.mesh.group(r, axes) for r in range(self.mesh.size)):
            if len(ranks) > 1:
                mine = self._new(ranks, _backend(self.device), f"axes {axes}") or mine
        if mine is not None and self.device.type != "cpu":
            self._warm_up(mine)
        return mine

    def _make_lane(self, lane: Lane) -> None:
        src, dst, channel = lane
        group = self._new({src, dst}, _backend(self.device), f"lane {src}>{dst} {channel}")
        if group is not None:
            self._warm_up(group)
            self._connect(group, self.rank == src, int(src < dst))
            self._lanes[lane] = group

    def _connect(self, group: dist.ProcessGroup, sends: bool, receiver: int) -> None:
        # The first message of a lane blocks the host until both ends are there. Where ranks send to
        # each other before they receive, as in a ring, all of them would wait.
        x = torch.zeros(1, device=self.device)
        (group.send([x], receiver, 0) if sends else group.recv([x], 1 - receiver, 0)).wait()
        torch.cuda.synchronize(self.device)

    def _warm_up(self, group: dist.ProcessGroup) -> None:
        # NCCL connects at first use, which must not happen while a graph is captured, or in a send
        # that the receiver has not reached.
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        torch.cuda.synchronize(self.device)

    def team(self, axes: Axes) -> Team:
        """The team of this rank over ``axes``; MeshError where it was not prepared."""
        team = self._views.get(axes)
        if team is None:
            ranks = self.mesh.group(self.rank, axes)
            if len(ranks) > 1 and self._canonical(axes) not in self._teams:
                raise MeshError(
                    f"no process groups over {axes}: every rank must call prepare([{axes}]) first"
                )
            places = [sorted(ranks).index(r) for r in ranks]
            team = self._views[axes] = Team(
                self._teams[self._canonical(axes)] if len(ranks) > 1 else None,
                ranks,
                places if places != sorted(places) else None,
            )
        return team

    def lane(self, src: int, dst: int, channel: str) -> dist.ProcessGroup:
        """The NCCL group of a lane; MeshError where it was not prepared."""
        group = self._lanes.get((src, dst, channel))
        if group is None:
            raise MeshError(
                f"no communicator for messages from rank {src} to rank {dst} on channel "
                f"{channel!r}: every rank must call prepare(..., lanes=[{(src, dst, channel)}]) "
                "first"
            )
        return group

    # --- the end
    # --------------------------------------------------------------------------------------

    def gone(self) -> list[int]:
        """The ranks whose connection to this one is closed. Ask only before `sever`: what it sends
        is never received."""
        return [r for r in range(self.mesh.size) if r != self.rank and not self._reaches(r)]

    def _reaches(self, rank: int) -> bool:
        byte = torch.empty(1, dtype=torch.uint8)
        try:
            self._probes.append((byte, self.control.send([byte], rank, _PROBE_TAG)))
        except RuntimeError:  # gloo refuses to send over a connection that is closed
            return False
        return True

    def leave(self) -> None:
        """Close the connections between hosts. Ranks that wait for this one are freed; what NCCL
        has begun goes on."""
        for group, backend in self._made:
            if backend == "gloo" and group.size() > 1:
                _sever_gloo(group)

    def sever(self) -> None:
        """End all operations that wait on these groups, here and on the other ranks. May be called
        from any thread, and again."""
        for group, backend in self._made:
            if group.size() > 1:
                (_sever_gloo if backend == "gloo" else _abort)(group)

    def close(self) -> None:
        """Give the groups back."""
        for group, _ in reversed(self._made):
            try:
                dist.destroy_process_group(group)
            except ValueError:  # its owner has destroyed all of torch.distributed meanwhile
                break
        self._made.clear()
        if self in _tenants:
            _tenants.discard(self)
            if not _tenants and dist.is_initialized():
                dist.destroy_process_group()


def _sever_gloo(group: dist.ProcessGroup) -> None:
    # abort() and shutdown() of a gloo group end nothing (torch 2.13). A receive that times out
    # does: gloo
    # then closes every connection of the group (gloo/transport/tcp/unbound_buffer.cc, waitRecv),
    # which ends
    # what waits here and makes the peers see "connection closed".
    # One from a peer whose connection is closed already ends at once, and closes nothing: so from
    # all of them.
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
    missing = [
        n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing:
        raise MeshError(
            f"this process is not one of several ({', '.join(missing)} not set); start {mesh.size} "
            f"with `torchrun --nproc-per-node={mesh.size} script.py` or fp.launch(fn, {mesh.size})"
        )
    _check_size(mesh, int(os.environ["WORLD_SIZE"]))
    # A prefix of its own: NCCL would else find the address that an earlier group of this process
    # left in the store.
    # torchrun keeps its store when it restarts the processes, and with it the addresses of those
    # that are gone.
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"funcpipe {start} {next(_initialised)}", store)
    if device.type == "cpu":
        dist.init_process_group("gloo", timeout=timeout, store=store, rank=rank, world_size=world)
    else:
        # With a device_id NCCL connects now, and groups made later are split off without a
        # handshake.
        os.environ.setdefault(
            "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false"
        )  # lanes are one way
        backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend, timeout=timeout, device_id=device, store=store, rank=rank, world_size=world
        )


def _check_size(mesh: Mesh, world: int) -> None:
    if world != mesh.size:
        raise MeshError(
            f"{mesh!r} has {mesh.size} ranks, but {world} processes were started; start one for "
            f"each rank, as with `torchrun --nproc-per-node={mesh.size}`, or change the mesh"
        )
