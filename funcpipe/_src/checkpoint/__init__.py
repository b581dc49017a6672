"""Checkpoints: the state by tree path, as one device has it, to load on any mesh and schedule.

The format, planners and files are those of torch.distributed.checkpoint (DCP): every leaf is stored
under its path as one flat tensor, in chunks, each written by one of the ranks that hold it. To
load, a rank reads the chunks that overlap its own shards, and compares their bytes with the digests
that were taken as they were written. So no rank ever holds the full state, and the mesh that loads
need not be the one that saved.

The steps of DCP's save are called one by one, and not through ``dcp.save``. So ranks talk through
funcpipe's own communicators, which name a rank that failed, and ranks of one process save just as
processes do. An error of one rank is a CheckpointError of all, after which they go on. A save in
the background has a communicator of its own.

Loading runs no code of a file: the manifest is JSON, values are read by
``torch.load(weights_only=True)``, and DCP's own metadata, a pickle, is there for plain DCP and is
not unpickled here.

Read this file first, which has the public functions. Then `leaves` (what a rank holds), `saving`
(the steps of a save), `dcp` (its chunks), `files` and `claims` (directories), `reading` (a load),
and `rank_agreement` (how ranks fail together).

In: a runner after ``run.init``, its state, a directory.
Out: a checkpoint that appears at once, when every rank has written; or a state and its `Info`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from funcpipe._src.checkpoint import files
from funcpipe._src.checkpoint.files import Manifest, steps
from funcpipe._src.checkpoint.leaves import Leaves, unsharded
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

if TYPE_CHECKING:
    from funcpipe._src.checkpoint.saving import Save

__all__ = ["Info", "Saving", "export", "load", "save", "save_async", "steps"]

# DCP is imported only when it is used: it adds half to the time that importing funcpipe takes.

Run = Simulation | Spmd
Dir = str | os.PathLike[str]
T = TypeVar("T")


class Info(NamedTuple):
    """What a checkpoint has beside the state.

    Args:
        step: the number that it was saved under.
        extra: what the user added.
        mesh: the mesh that it was saved on.
        path: its directory.
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
    dir: Dir,
    run: Run,
    state: Any,
    *,
    step: int,
    extra: Any = None,
    keep: int | None = None,
) -> Path:
    """Save a state; every rank makes the same call.

    The checkpoint appears in ``dir`` at once, when all ranks have written. Whatever dies before
    that leaves the older checkpoints as they are. Each save writes in a folder of its own; of two
    saves of one step in flight, the first to be complete stays, and the other one raises. The next
    save removes what a dead save left, if it died on this machine since the machine started; else
    when nothing in it has changed for a day. The folder of a save that lives is never removed.

    All bytes are stored with a digest (SHA-256), which `load` compares: about 0.6 s for each GB
    that a rank writes, and again for each GB that it reads, on one core.

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
    >>> def loss_fn(w, x):
    ...     return fp.Mean((x @ w).sum(), torch.tensor(float(len(x))))
    >>> def step(w, x):
    ...     return w, {"loss": fp.value_and_grad(loss_fn)(w, x)[0]}
    >>> step = fp.data_parallel(step, axis="data")
    >>> run = fp.simulate(fp.sharded_weights(step, axis="data"), fp.Mesh(data=2))
    >>> state = run.init(lambda w: w, torch.arange(3.0), torch.ones(4, 3))
    >>> with tempfile.TemporaryDirectory() as dir:
    ...     path = save(dir, run, state, step=7, extra={"seed": 1})
    ...     state, info = load(dir, run)
    >>> path.name, info.step, info.extra, info.mesh, state
    ('step-7', 7, {'seed': 1}, Mesh(data=2), [tensor([0., 1.]), tensor([2.])])
    """
    from funcpipe._src.checkpoint.saving import plan, write

    request = request_of(dir, step, extra, keep)
    leaves = Leaves(run)

    def save_on_rank(comm: Communicator) -> Path:
        own_state = _of_rank(comm, run, state)
        return write(comm, plan(comm, request, leaves, own_state))

    return _on_ranks(run, save_on_rank)[0]


def save_async(
    dir: Dir,
    run: Run,
    state: Any,
    *,
    step: int,
    extra: Any = None,
    keep: int | None = None,
) -> Saving:
    """Save a state in the background: copy it to the CPU, and return while it is written.

    A rank copies what it is to write; of a leaf that several ranks hold, each writes some chunks.
    Arguments and errors are those of `save`; ``wait`` raises what fails later.

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

    request = request_of(dir, step, extra, keep)
    leaves = Leaves(run)

    def plan_on_rank(comm: Communicator) -> Save:
        own_state = _of_rank(comm, run, state)
        return plan(comm, request, leaves, own_state, staged=True)

    saves = _on_ranks(run, plan_on_rank)
    if isinstance(run, Simulation):
        ranks = Ranks(run.mesh)

        def write_all() -> Path:
            return ranks.run(lambda comm: write(comm, saves[comm.rank]))[0]

        return _background(write_all, ranks.close)
    assert isinstance(run._comm, ProcessGroupCommunicator)
    (own_save,) = saves
    try:
        comm = run._guarded(run._comm.beside, "cpu")
    except BaseException:
        own_save.give_up()
        raise
    return _background(lambda: write(comm, own_save), comm.close)


def _background(body: Callable[[], Path], close: Callable[[], None]) -> Saving:
    pool = ThreadPoolExecutor(1, "funcpipe-checkpoint")
    future = pool.submit(body)
    pool.shutdown(wait=False)
    return Saving(future, close)


def load(
    dir: Dir,
    run: Run,
    *,
    step: int | None = None,
) -> tuple[Any, Info]:
    """Load a checkpoint of any mesh, stack and schedule; every rank makes the same call.

    Each rank makes the tensors that it holds and reads into them. The state of ``run.init`` is not
    needed, so let go of it before: ``state = None``.

    Args:
        dir: the directory that `save` was given.
        run: a runner, after ``run.init``.
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
    _, info = found[0]
    return states if isinstance(run, Simulation) else states[0], info


def export(
    dir: Dir,
    path: Dir,
    *,
    step: int | None = None,
) -> Info:
    """Write the full state as one file that plain PyTorch reads, from one process.

    Args:
        dir: the directory that `save` was given.
        path: the file to write.
        step: which checkpoint; by default the newest complete one.

    Returns:
        what the checkpoint has beside the state. In the file is a dict from the path of every
        leaf, such as ``"state['params']['w']"``, to the leaf as one device has it, for
        ``torch.load(path, weights_only=True)``.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.

    >>> export("elsewhere", "state.pt")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    funcpipe.errors.CheckpointError: elsewhere holds no checkpoint: pass the directory that ...
    """
    from funcpipe._src.checkpoint.reading import read

    where, manifest = files.find(Path(dir), step)
    leaves = [unsharded(name, leaf) for name, leaf in manifest.leaves.items()]
    try:
        values = read(where, leaves, manifest)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {one_line(error)}") from error
    unfinished = Path(f"{os.fspath(path)}.tmp")
    torch.save(dict(zip(manifest.leaves, values, strict=True)), unfinished)
    unfinished.replace(path)
    return _info(where, manifest)


# ---- what ranks do


def _on_ranks(run: Run, body: Callable[[Communicator], T]) -> list[T]:
    """``body`` on the ranks that this process has."""
    return run._ranks.run(body) if isinstance(run, Simulation) else [body(run._comm)]


def _of_rank(
    comm: Communicator,
    run: Run,
    state: Any,
) -> Any:
    """A rank's own state."""
    run._check_state(state, "save a checkpoint")
    return state if isinstance(run, Spmd) else state[comm.rank]


def _load(
    comm: Communicator,
    wanted: Leaves,
    root: Path,
    step: int | None,
) -> tuple[Any, Info]:
    from funcpipe._src.checkpoint.reading import read

    def find() -> tuple[Path, Manifest] | None:
        if comm.rank:
            return None  # on a shared file system it may see another directory than rank 0
        where, manifest = files.find(root, step)
        wanted.check(str(where), manifest.leaves)
        return where, manifest

    found = agree(comm, f"loading from {root}", find)[0]
    assert found is not None
    where, manifest = found
    shards = list(wanted.shards(comm.rank))
    values: dict[str, Any] = {}

    def fetch() -> None:
        held = [shard for shard in shards if shard is not None]
        names = [shard.name for shard in held]
        values.update(zip(names, read(where, held, manifest), strict=True))

    agree(comm, f"loading {where}", fetch)
    leaves = [None if shard is None else values[shard.name] for shard in shards]
    return wanted.state(leaves), _info(where, manifest)


def _info(where: Path, manifest: Manifest) -> Info:
    return Info(manifest.step, manifest.extra, Mesh(**manifest.mesh), where)
