"""What ranks say to each other about a checkpoint.

In: a communicator, what one rank found or was asked for.
Out: the same of all ranks, or one error on all of them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from funcpipe._src.comm import Communicator
from funcpipe._src.comm.failure_watch import one_line
from funcpipe.errors import CheckpointError, FuncpipeError, MismatchError

T = TypeVar("T")


def agree(
    comm: Communicator,
    what: str,
    fn: Callable[[], T],
) -> list[T]:
    """What ``fn`` gives on every rank.

    If it raises on one rank, all ranks raise a CheckpointError with its text. So no rank waits for
    one that failed, and all can go on. ``fn`` itself does not communicate.
    """
    cause, mine, failure = None, None, None
    try:
        mine = fn()
    except Exception as error:
        cause, failure = error, str(error)
        if not isinstance(error, FuncpipeError):
            failure = f"{what} failed on rank {comm.rank}: {_plain(error)}"
    found = comm.exchange((mine, failure))
    for _, text in found:
        if text is not None:
            raise CheckpointError(text) from cause
    return [result for result, _ in found]


_PLAIN = {
    errno.ENOSPC: "no space is left on that disk: free some, or save into another directory",
    errno.EDQUOT: "this user's quota of that disk is used up: free some, or use another directory",
    errno.EROFS: "that file system is read-only: save into another directory",
    errno.EACCES: "this user has no right to it: change its mode, or use another directory",
    errno.EPERM: "this user has no right to it: change its mode, or use another directory",
    errno.ENOTDIR: "a file is where a directory must be: use another directory",
    errno.EEXIST: "a file is where a directory must be: use another directory",
}


def _plain(error: Exception) -> str:
    """What happened; in plain words first, where it is an error that users meet.

    >>> print(_plain(OSError(errno.EROFS, "not writable")))
    that file system is read-only: save into another directory (OSError: [Errno 30] not writable)
    """
    plain = _PLAIN.get(error.errno or 0) if isinstance(error, OSError) else None
    return one_line(error) if plain is None else f"{plain} ({one_line(error)})"


class Request(NamedTuple):
    """What a rank was asked to save; ``extra`` as JSON."""

    dir: str
    step: int
    extra: str
    keep: int | None

    def __str__(self) -> str:
        return f"step={self.step}, extra={self.extra}, keep={self.keep} to {self.dir}"


def request_of(
    dir: str | os.PathLike[str],
    step: int,
    extra: Any,
    keep: int | None,
) -> Request:
    """The arguments of a save; CheckpointError when they make no sense.

    >>> print(request_of("runs", 3, {"seed": 1}, None))
    step=3, extra={"seed": 1}, keep=None to runs
    """
    _check_count("step", step, least=0)
    if keep is not None:
        _check_count("keep", keep, least=1)
    try:
        text = json.dumps(extra, sort_keys=True)
        same = json.loads(text) == extra
    except (TypeError, ValueError):
        same = False
    if not same:
        raise CheckpointError(
            f"fp.checkpoint.save: extra={extra!r} would not come back from JSON as it is: write "
            "dicts with text as keys, lists, text, numbers, True, False and None; tensors belong "
            "in the state"
        )
    return Request(os.fspath(dir), step, text, keep)


def _check_count(
    name: str,
    value: Any,
    least: int,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(
            f"fp.checkpoint.save: {name}={value!r}; write a whole number, {least} or more"
        )


def check_alike(requests: list[Request]) -> None:
    """MismatchError unless every rank was asked to save the same."""
    for rank, other in enumerate(requests):
        if other != requests[0]:
            raise MismatchError(
                f"fp.checkpoint.save: rank 0 saves {requests[0]}, but rank {rank} saves {other}: "
                "every rank saves the same step of the same run, with the same extra and keep"
            )
