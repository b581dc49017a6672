"""Checkpoints: the state by tree path, in the layout of one device, to be loaded on any mesh, stack
or schedule.

Terms. A *root* is the directory that a user names; ``step-N`` in it is the checkpoint of step N
(`files.py`). A *part* is what a rank holds of a leaf (`leaves.py`). *DCP* is
torch.distributed.checkpoint, whose format, planners and files these are (`dcp.py`): every leaf is
stored under its path as one flat tensor, in chunks, each written by one of the ranks that hold it.
To load, a rank reads the chunks that overlap its own parts, and compares their bytes with the
digests that were taken as they were written (`pieces.py`). So no rank ever holds the full state,
and the mesh that loads need not be the one that saved.

The steps of DCP's save are called here one by one, and not through ``dcp.save``: then ranks talk
through funcpipe's own communicators, which name a rank that failed, and ranks of one process save
just as processes do. An error of one rank is a CheckpointError of all, after which they go on. A
save in the background has a communicator of its own.

In: a runner after ``run.init``, its state, a root. Out: a directory that appears at once, when
every rank has written; or a state and its `Info`.

Loading runs nothing that a file brings along: the manifest is JSON, values are read by
``torch.load(weights_only=True)``, and DCP's own metadata, a pickle, is there for plain DCP and is
not unpickled here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from funcpipe._src.checkpoint import files
from funcpipe._src.checkpoint.files import Manifest, steps
from funcpipe._src.checkpoint.leaves import Leaves, whole
from funcpipe._src.checkpoint.rank_agreement import agree, request_of
from funcpipe._src.comm import Communicator
from funcpipe._src.comm.failure_watch import one_line
from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.comm.simulated import Ranks
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.simulate import Simulation
from funcpipe._src.runtime.spmd_runner import Spmd
from funcpipe._src.runtime.state_buffers import StateBuffers
from funcpipe.errors import CheckpointError

__all__ = ["Info", "Saving", "export", "load", "save", "save_async", "steps"]

# DCP is imported where it is used: it would add half to the time that importing funcpipe takes.

Run = Simulation | Spmd
Dir = str | os.PathLike[str]
T = TypeVar("T")


class Info(NamedTuple):
    """What a checkpoint says beside the state.

    Args:
        step: the number that it was saved under.
        extra: what the user added.
        mesh: the mesh that it was saved on.
        path: where it lies.
    """

    step: int
    extra: Any
    mesh: Mesh
    path: Path


@dataclass(frozen=True)
class Saving:
    """A save in the background."""

    _future: Future[Path]
    _close: Callable[[], None]

    def wait(self) -> Path:
        """Wait until the checkpoint is complete, on every rank; the process does not end before
        that either.

        Returns:
            its directory.

        Raises:
            CheckpointError: a rank could not write. RankError: one is gone.
        """
        try:
            return self._future.result()
        finally:
            self._close()


# ---- the interface


def save(
    dir: Dir, run: Run, state: Any, *, step: int, extra: Any = None, keep: int | None = None
) -> Path:
    """Save a state; every rank calls it alike.

    The checkpoint appears in ``dir`` as a whole, when all ranks have written; whatever dies before
    that leaves the ones that are there as they are. Each save writes in a folder of its own, so of
    two saves of one step in flight, the first to be complete is there, and the other one raises.
    What a dead save left goes with the next save, if it died on this machine since that started;
    else when nothing in it has changed for a day. The folder of a save that lives never goes.

    Every piece is stored with a digest of its bytes (SHA-256), which `load` compares: about 0.6 s
    for each GB that a rank writes, and again for each GB that it reads, on one core.

    Args:
        dir: a directory that all ranks see.
        run: the runner, after ``run.init``.
        state: what ``run.init``, ``run.place`` or a step returned.
        step: what to number it by, 0 or more: how many steps were made.
        extra: what else is needed to go on, such as seeds and the place in the data; anything that
            JSON gives back as it is. Of all ranks the same.
        keep: how many checkpoints stay, 1 or more, the newest ones; without it, all.

    Returns:
        the directory of the checkpoint, ``dir/step-N``.

    Raises:
        CheckpointError: there is a checkpoint of this step, or another save of it was complete
            first; a leaf cannot be stored, or has another shape or dtype than ``init_state`` gave
            it; the state has another structure; a rank could not write.
        MismatchError: ranks do not save the same.
        RankError: a rank is gone.
        StateError: ``run.init`` was not called.

    Built on torch.distributed.checkpoint, which also reads what this writes, one flat tensor for
    each leaf.

    >>> import tempfile, funcpipe as fp
    >>> step = fp.data_parallel(lambda w, x: (w, {"loss": fp.value_and_grad(loss_fn)(w, x)[0]}), axis="data")
    >>> loss_fn = lambda w, x: fp.Mean((x @ w).sum(), torch.tensor(float(len(x))))
    >>> run = fp.simulate(fp.sharded_weights(step, axis="data"), fp.Mesh(data=2))
    >>> state = run.init(lambda w: w, torch.arange(3.0), torch.ones(4, 3))
    >>> with tempfile.TemporaryDirectory() as dir:
    ...     path = save(dir, run, state, step=7, extra={"seed": 1})
    ...     state, info = load(dir, run)
    >>> path.name, info.step, info.extra, info.mesh, state
    ('step-7', 7, {'seed': 1}, Mesh(data=2), [tensor([0., 1.]), tensor([2.])])
    """
    from funcpipe._src.checkpoint.saving import plan, write

    request, leaves = request_of(dir, step, extra, keep), Leaves(run)
    return _on_ranks(
        run, lambda comm: write(comm, plan(comm, request, leaves, _of_rank(comm, run, state)))
    )[0]


def save_async(
    dir: Dir, run: Run, state: Any, *, step: int, extra: Any = None, keep: int | None = None
) -> Saving:
    """Save a state in the background: copy it to the CPU, and return while it is written.

    A rank copies what it is to write, which for a leaf that several ranks hold is a part. Arguments
    and errors are those of `save`; what fails later is raised by ``wait``.

    Returns:
        the save; call its ``wait`` before the next one, and at the end.

    >>> import tempfile, funcpipe as fp
    >>> step = lambda w, x: (w, {"loss": fp.value_and_grad(lambda w, x: (w * x).sum())(w, x)[0]})
    >>> run = fp.simulate(step, fp.Mesh())
    >>> state = run.init(lambda w: w, torch.ones(3), torch.ones(3))
    >>> with tempfile.TemporaryDirectory() as dir:
    ...     saving = save_async(dir, run, state, step=1)
    ...     _ = [x.zero_() for x in state]  # steps may go on
    ...     _ = saving.wait()
    ...     load(dir, run)[0]
    [tensor([1., 1., 1.])]
    """
    from funcpipe._src.checkpoint.saving import plan, write

    request, leaves = request_of(dir, step, extra, keep), Leaves(run)
    jobs = _on_ranks(
        run, lambda comm: plan(comm, request, leaves, _of_rank(comm, run, state), staged=True)
    )
    if isinstance(run, Simulation):
        ranks = Ranks(run.mesh)
        return _background(
            lambda: ranks.run(lambda comm: write(comm, jobs[comm.rank]))[0], ranks.close
        )
    assert isinstance(run._comm, ProcessGroupCommunicator)
    try:
        comm = run._guarded(run._comm.beside, "cpu")
    except BaseException:
        jobs[0].give_up()
        raise
    return _background(lambda: write(comm, jobs[0]), comm.close)


def _background(body: Callable[[], Path], close: Callable[[], None]) -> Saving:
    pool = ThreadPoolExecutor(1, "funcpipe-checkpoint")
    future = pool.submit(body)
    pool.shutdown(wait=False)
    return Saving(future, close)


def load(dir: Dir, run: Run, *, step: int | None = None) -> tuple[Any, Info]:
    """Load a checkpoint, whatever mesh, stack and schedule it was saved from; every rank calls it
    alike.

    Each rank makes the tensors that it holds and reads into them; nothing of ``run.init``'s state
    is needed, so let go of
    that before: ``state = None``.

    Args:
        dir: the directory that `save` was given.
        run: a runner, after ``run.init``, which tells it the leaves.
        step: which checkpoint; by default the newest complete one.

    Returns:
        the state as ``run`` holds it, with the bits that were saved, and what the checkpoint says
        beside it.

    Raises:
        CheckpointError, on every rank: there is no such checkpoint; it is of another format; it has
            other leaves, shapes or dtypes than the state of this run; a file is missing, cut off,
            damaged, or of another checkpoint, in what this run reads of it.
        StateError: ``run.init`` was not called.

    See `save` for an example.
    """
    wanted = Leaves(run)
    run._about_to_load()
    found = _on_ranks(run, lambda comm: _load(comm, wanted, Path(dir), step))
    states = [StateBuffers.give(state) for state, _ in found]
    return states if isinstance(run, Simulation) else states[0], found[0][1]


def export(dir: Dir, path: Dir, *, step: int | None = None) -> Info:
    """Write the full state as one file that plain PyTorch reads: in one process, which holds all of
    it.

    Args:
        dir: the directory that `save` was given.
        path: the file to write.
        step: which checkpoint; by default the newest complete one.

    Returns:
        what the checkpoint says beside the state. In the file is a dict from the path of every
        leaf, such as ``"state['params']['w']"``, to the leaf as one device has it, for
        ``torch.load(path, weights_only=True)``.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.

    >>> export("no such directory", "state.pt")
    Traceback (most recent call last):
    funcpipe.errors.CheckpointError: no such directory holds no
    checkpoint: pass the directory that fp.checkpoint.save was given
    """
    from funcpipe._src.checkpoint.pieces import read

    where, manifest = files.find(Path(dir), step)
    parts = [whole(name, leaf) for name, leaf in manifest.leaves.items()]
    try:
        values = read(where, parts, manifest)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {one_line(error)}") from error
    unfinished = Path(f"{os.fspath(path)}.tmp")
    torch.save({part.name: x for part, x in zip(parts, values, strict=True)}, unfinished)
    unfinished.replace(path)
    return _info(where, manifest)


# ---- what ranks do


def _on_ranks(run: Run, body: Callable[[Communicator], T]) -> list[T]:
    """``body`` on the ranks that this process has."""
    return run._ranks.run(body) if isinstance(run, Simulation) else [body(run._comm)]


def _of_rank(comm: Communicator, run: Run, state: Any) -> Any:
    """A rank's own state."""
    run._check_state(state, "save a checkpoint")
    return state if isinstance(run, Spmd) else state[comm.rank]


def _load(comm: Communicator, wanted: Leaves, root: Path, step: int | None) -> tuple[Any, Info]:
    from funcpipe._src.checkpoint.pieces import read

    def find() -> tuple[Path, Manifest] | None:
        if comm.rank:
            return None  # on a shared file system it may see another directory than rank 0
        where, manifest = files.find(root, step)
        wanted.check(str(where), manifest.leaves)
        return where, manifest

    found = agree(comm, f"loading from {root}", find)[0]
    assert found is not None
    where, manifest = found
    parts = list(wanted.parts(comm.rank))
    values: dict[str, Any] = {}

    def fetch() -> None:
        held = [part for part in parts if part is not None]
        values.update(zip([part.name for part in held], read(where, held, manifest), strict=True))

    agree(comm, f"loading {where}", fetch)
    return wanted.state([None if part is None else values[part.name] for part in parts]), _info(
        where, manifest
    )


def _info(where: Path, manifest: Manifest) -> Info:
    return Info(manifest.step, manifest.extra, Mesh(**manifest.mesh), where)
