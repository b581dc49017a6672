"""A save: first all ranks plan it together, then each writes its files, and rank 0 gives the
checkpoint its name.

In: a request, a rank's state. Out: the directory of a complete checkpoint. Between planning and
writing a job may copy what it needs, so that steps go on while it writes, over another
communicator. Rank 0 holds the folder (`claims.py`) from the beginning to the end; where all ranks
have agreed that the save failed, it is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from funcpipe._src.checkpoint import files
from funcpipe._src.checkpoint.claims import Claim
from funcpipe._src.checkpoint.dcp import Saver, Writer
from funcpipe._src.checkpoint.files import Leaf, Manifest, Piece, digest_of, leaf_of
from funcpipe._src.checkpoint.leaves import Leaves
from funcpipe._src.checkpoint.rank_agreement import Request, agree, check_alike
from funcpipe._src.comm import Communicator
from funcpipe.errors import CheckpointError

Offer = tuple[
    SavePlan, dict[str, Leaf]
]  # what a rank could write, and what the leaves are that it holds
Written = tuple[list[WriteResult], list[tuple[str, Piece]]]  # for DCP, and for the manifest


def plan(
    comm: Communicator, request: Request, leaves: Leaves, state: Any, staged: bool = False
) -> Save:
    """Find out, together, which rank writes what.

    Args:
        state: this rank's.
        staged: copy what this rank is to write.
    """
    check_alike(comm.exchange(request))
    job = Save(request, comm.rank)
    with job.held():
        job.enter(agree(comm, job.what, job.begin)[0])
        offers = agree(comm, job.what, partial(job.offer, leaves, state))
        job.finish_plan(agree(comm, job.what, partial(job.divide, leaves, offers))[0][comm.rank])
        if staged:
            agree(comm, job.what, job.stage)
    return job


def write(comm: Communicator, job: Save) -> Path:
    """Write what was planned; returns when the checkpoint is complete."""
    with job.held():
        found = agree(comm, job.what, job.write)
        path = agree(comm, job.what, partial(job.publish, found))[0]
    job.give_up()
    return path


class Save:
    """One rank's part in a save. Methods are called in this order; only rank 0 touches the
    directory and divides."""

    def __init__(self, request: Request, rank: int) -> None:
        self.request, self.rank, self.root = request, rank, Path(request.dir)
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
        self.folder, self.writer = folder, Writer(folder)

    def offer(self, leaves: Leaves, state: Any) -> Offer:
        """Every chunk that this rank holds."""
        held = leaves.held(state, self.rank)
        self.saver = Saver(held)
        self.writer.set_up_storage_writer(self.rank == 0)
        return (
            self.writer.prepare_local_plan(self.saver.create_local_plan()),
            {part.name: leaf_of(x, part.leaf.shape or ()) for part, x in held},
        )

    def divide(self, leaves: Leaves, offers: list[Offer]) -> list[SavePlan]:
        """For every rank what it is to write."""
        if self.rank:
            return []
        found = {name: leaf for _, held in offers for name, leaf in held.items()}
        self.mesh = dict(leaves.placement.mesh.axes)
        self.leaves = {name: found[name] for name in leaves.names}
        self.metadata: Metadata
        plans, self.metadata = self.saver.create_global_plan([offered for offered, _ in offers])
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
        return results, self.writer.pieces(self.plan, results)

    def publish(self, found: list[Written]) -> Path:
        """Give the checkpoint its name, and remove what is not to be kept."""
        if self.claim is not None:
            self.writer.finish(self.metadata, [results for results, _ in found])
            files.publish(self.root, self.claim, self._manifest(found, self.claim.path))
            if self.request.keep is not None:
                files.prune(self.root, self.request.keep)
        return files.final(self.root, self.request.step)

    def _manifest(self, found: list[Written], folder: Path) -> Manifest:
        pieces: dict[str, list[Piece]] = {name: [] for name in self.leaves}
        for _, some in found:
            for name, piece in some:
                pieces[name].append(piece)
        metadata = digest_of((folder / files.METADATA).read_bytes())
        extra, step = json.loads(self.request.extra), self.request.step
        return Manifest(files.FORMAT, step, extra, self.mesh, self.leaves, pieces, metadata)
