"""A save: all ranks plan it together, each writes its files, and rank 0 names the checkpoint.

Between planning and writing a save may copy what it needs, so that steps go on while it writes,
over another communicator. Rank 0 holds the folder (`claims.py`) from the beginning to the end; if
all ranks have agreed that the save failed, it is removed.

In: a request, a rank's state.
Out: the directory of a complete checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from funcpipe._src.checkpoint import files
from funcpipe._src.checkpoint.claims import Claim
from funcpipe._src.checkpoint.dcp import Saver, Writer
from funcpipe._src.checkpoint.files import Leaf, Manifest, StoredSpan, digest_of, leaf_of
from funcpipe._src.checkpoint.leaves import Leaves
from funcpipe._src.checkpoint.rank_agreement import Request, agree, check_alike
from funcpipe._src.comm import Communicator
from funcpipe.errors import CheckpointError


class LocalPlan(NamedTuple):
    """What a rank could write, and what the leaves are that it holds."""

    plan: SavePlan
    leaves: dict[str, Leaf]


class Written(NamedTuple):
    """What a rank has written: for DCP, and for the manifest, by the path of a leaf."""

    results: list[WriteResult]
    spans: list[tuple[str, StoredSpan]]


def plan(
    comm: Communicator,
    request: Request,
    leaves: Leaves,
    state: Any,
    staged: bool = False,
) -> Save:
    """Find out, together, which rank writes what.

    Args:
        state: this rank's.
        staged: whether to copy what this rank is to write.
    """
    check_alike(comm.exchange(request))
    save = Save(request, comm.rank)
    with save.held():
        folders = agree(comm, save.what, save.begin)
        save.enter(folders[0])
        local_plans = agree(comm, save.what, partial(save.plan_locally, leaves, state))
        plans = agree(comm, save.what, partial(save.divide, leaves, local_plans))
        save.finish_plan(plans[0][comm.rank])
        if staged:
            agree(comm, save.what, save.stage)
    return save


def write(comm: Communicator, save: Save) -> Path:
    """Write what was planned; returns when the checkpoint is complete."""
    with save.held():
        written = agree(comm, save.what, save.write)
        paths = agree(comm, save.what, partial(save.publish, written))
    save.give_up()
    return paths[0]


class Save:
    """What one rank does in a save, in the order of the methods.

    Rank 0 alone touches the directory, and divides the chunks among ranks.
    """

    def __init__(self, request: Request, rank: int) -> None:
        self.request = request
        self.rank = rank
        self.root = Path(request.dir)
        self.what = f"saving step {request.step} to {self.root}"
        self.folder: Path | None = None
        self.claim: Claim | None = None  # of rank 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while this goes well."""
        try:
            yield
        except BaseException as error:
            self.give_up()
            agreed = isinstance(error, CheckpointError)  # all ranks have it: none writes any more
            if agreed and self.folder is not None and self.folder.exists():
                shutil.rmtree(self.folder, ignore_errors=True)  # by the rank that is told first
            raise

    def give_up(self) -> None:
        """Let go of the folder."""
        if self.claim is not None:
            self.claim.give_up()

    def begin(self) -> Path | None:
        """Make the folder in which all ranks write."""
        if self.rank:
            return None
        self.claim = files.begin(self.root, self.request.step)
        return self.claim.path

    def enter(self, folder: Path | None) -> None:
        """Take the folder that rank 0 made."""
        assert folder is not None
        self.folder = folder
        self.writer = Writer(folder)

    def plan_locally(self, leaves: Leaves, state: Any) -> LocalPlan:
        """Every chunk that this rank holds."""
        held = leaves.held(state, self.rank)
        self.saver = Saver(held)
        self.writer.set_up_storage_writer(self.rank == 0)
        save_plan = self.writer.prepare_local_plan(self.saver.create_local_plan())
        own_leaves = {}
        for shard, value in held:
            own_leaves[shard.name] = leaf_of(value, shard.leaf.shape or ())
        return LocalPlan(save_plan, own_leaves)

    def divide(self, leaves: Leaves, local_plans: list[LocalPlan]) -> list[SavePlan]:
        """For every rank what it is to write."""
        if self.rank:
            return []
        found: dict[str, Leaf] = {}
        for local_plan in local_plans:
            found.update(local_plan.leaves)
        self.mesh = dict(leaves.placement.mesh.axes)
        self.leaves = {name: found[name] for name in leaves.names}
        self.metadata: Metadata
        save_plans = [local_plan.plan for local_plan in local_plans]
        plans, self.metadata = self.saver.create_global_plan(save_plans)
        return self.writer.prepare_global_plan(plans)

    def finish_plan(self, plan: SavePlan) -> None:
        """Take this rank's share."""
        self.plan = self.saver.finish_plan(plan)

    def stage(self) -> None:
        """Copy this rank's share to the CPU."""
        self.saver.stage(self.plan)

    def write(self) -> Written:
        """Write this rank's share."""
        results = self.writer.write_data(self.plan, self.saver).wait()
        return Written(results, self.writer.spans(self.plan, results))

    def publish(self, written: list[Written]) -> Path:
        """Give the checkpoint its name, and remove what is not to be kept."""
        if self.claim is not None:
            results = [of_rank.results for of_rank in written]
            self.writer.finish(self.metadata, results)
            manifest = self._manifest(written, self.claim.path)
            files.publish(self.root, self.claim, manifest)
            if self.request.keep is not None:
                files.prune(self.root, self.request.keep)
        return files.final(self.root, self.request.step)

    def _manifest(self, written: list[Written], folder: Path) -> Manifest:
        spans_of_leaf: dict[str, list[StoredSpan]]
        spans_of_leaf = {name: [] for name in self.leaves}
        for of_rank in written:
            for name, span in of_rank.spans:
                spans_of_leaf[name].append(span)
        metadata = (folder / files.METADATA).read_bytes()
        return Manifest(
            files.FORMAT,
            self.request.step,
            extra=json.loads(self.request.extra),
            mesh=self.mesh,
            leaves=self.leaves,
            pieces=spans_of_leaf,
            metadata=digest_of(metadata),
        )
