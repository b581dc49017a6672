"""A save: first all ranks plan it together, then each writes its files, and rank 0 gives the checkpoint its name.

In: a request, a rank's state. Out: the directory of a complete checkpoint. Between planning and writing a job may copy
what it needs, so that steps go on while it writes, over another communicator.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from funcpipe.checkpoint import files
from funcpipe.checkpoint.chunks import Saver
from funcpipe.checkpoint.files import Leaf, Manifest, leaf_of
from funcpipe.checkpoint.leaves import Leaves
from funcpipe.checkpoint.together import Request, agree, check_alike
from funcpipe.comm import Communicator

Offer = tuple[SavePlan, dict[str, Leaf]]  # what a rank could write, and what the leaves are that it holds


def plan(comm: Communicator, request: Request, leaves: Leaves, state: Any, staged: bool = False) -> Save:
    """Find out, together, which rank writes what.

    Args:
        state: this rank's.
        staged: copy what this rank is to write.
    """
    check_alike(comm.exchange(request))
    job = Save(request, comm.rank)
    agree(comm, job.what, job.begin)
    offers = agree(comm, job.what, partial(job.offer, leaves, state))
    job.finish_plan(agree(comm, job.what, partial(job.divide, leaves, offers))[0][comm.rank])
    if staged:
        agree(comm, job.what, job.stage)
    return job


def write(comm: Communicator, job: Save) -> Path:
    """Write what was planned; returns when the checkpoint is complete."""
    results = agree(comm, job.what, job.write)
    return agree(comm, job.what, partial(job.publish, results))[0]


class Save:
    """One rank's part in a save. Methods are called in this order; only rank 0 touches the directory and divides."""

    def __init__(self, request: Request, rank: int) -> None:
        self.request, self.rank, self.root = request, rank, Path(request.dir)
        self.what = f"saving step {request.step} to {self.root}"
        # Flushed to the disk file by file. With copies ahead, DCP would hold several chunks of a GPU's state at once.
        unfinished = files.unfinished(self.root, request.step)
        self.writer = FileSystemWriter(unfinished, per_thread_copy_ahead=0, overwrite=False)

    def begin(self) -> None:
        """Make the directory."""
        if self.rank == 0:
            files.begin(self.root, self.request.step)

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
        extra, mesh = json.loads(self.request.extra), dict(leaves.placement.mesh.axes)
        in_order = {name: found[name] for name in leaves.names}
        self.manifest = Manifest(files.FORMAT, self.request.step, extra, mesh, in_order)
        self.metadata: Metadata
        plans, self.metadata = self.saver.create_global_plan([offered for offered, _ in offers])
        return self.writer.prepare_global_plan(plans)

    def finish_plan(self, plan: SavePlan) -> None:
        """Take this rank's share."""
        self.plan = self.saver.finish_plan(plan)

    def stage(self) -> None:
        """Copy this rank's share to the CPU."""
        self.saver.stage(self.plan)

    def write(self) -> list[WriteResult]:
        """Write this rank's share."""
        return self.writer.write_data(self.plan, self.saver).wait()

    def publish(self, results: list[list[WriteResult]]) -> Path:
        """Give the checkpoint its name, and remove what is not to be kept."""
        final = files.final(self.root, self.request.step)
        if self.rank == 0:
            self.writer.finish(self.metadata, results)
            files.publish(self.root, self.manifest)
            if self.request.keep is not None:
                files.prune(self.root, self.request.keep)
        return final
