"""Failure watch: which rank failed first, as a report in the store of torch.distributed.

In: a store that all ranks reach, errors.
Out: the first failure; a call of ``on_failure``, from a daemon thread, where another rank wrote it.

A failure says which rank is at fault, if that is known, and what happened, in one line. The first
one written counts; later ones follow from it. A rank whose peers fall silent looks into the store
to find out why. The thread is needed because a rank may wait for a healthy one that itself is far
from any communication. A rank that closes its communicator reports that, too; it is no failure
unless another rank waits for it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from funcpipe.errors import RankError

_LINE = 1000  # characters of an error text that travel to the other ranks


class Failure(NamedTuple):
    """The first error among the ranks.

    Args:
        rank: the one at fault; None if that is not known.
        text: what happened, in one line.
        reporter: the rank that wrote it.
    """

    rank: int | None
    text: str
    reporter: int

    def error(self) -> RankError:
        """The error that every other rank raises."""
        if self.rank is None:
            return RankError(self.text)
        return RankError(f"rank {self.rank} failed: {self.text}")


def one_line(error: BaseException) -> str:
    """The type and text of an error in one line.

    >>> one_line(ValueError("a\\n  b"))
    'ValueError: a b'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LINE] if text else type(error).__name__


class FailureWatch:
    """The first failure among the ranks that share ``key`` in ``store``.

    Args:
        store: a key-value store that all ranks reach.
        key: where the failure is kept.
        rank: the own rank.
        on_failure: called once from a daemon thread when another rank's failure is seen there.
        period: seconds between two looks at the store.
    """

    def __init__(
        self,
        store: dist.Store,
        key: str,
        rank: int,
        on_failure: Callable[[], None],
        period: float = 0.5,
    ) -> None:
        self.failure: Failure | None = None
        self.reachable = True  # whether the store answered when it was looked at last
        self._store = store
        self._key = key
        self._rank = rank
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._watch,
            args=(on_failure, period),
            name="funcpipe-failure-watch",
            daemon=True,
        )
        self._thread.start()

    def record(self, rank: int | None, text: str) -> Failure:
        """Write a failure, unless there is one; returns the first one."""
        if self.failure is None:
            mine = Failure(rank, text, self._rank)
            try:
                kept = self._store.compare_set(self._key, "", json.dumps(mine))
                self.failure = Failure(*json.loads(kept))
            except RuntimeError:  # the store went down with the rank that kept it
                self.failure = mine
        return self.failure

    def first(self, wait: float = 0.0) -> Failure | None:
        """The first failure, or None where none appears within ``wait`` seconds."""
        end = time.monotonic() + wait
        while not self._look() and time.monotonic() < end:
            time.sleep(0.05)
        return self.failure

    def _look(self) -> bool:
        """Whether there is a failure, or the store is gone."""
        if self.failure is None:
            try:
                if self._store.check([self._key]):
                    self.failure = Failure(*json.loads(self._store.get(self._key)))
            except RuntimeError:
                self.reachable = False
                return True
        return self.failure is not None

    def leave(self) -> None:
        """Report that this rank is about to close its communicator."""
        with contextlib.suppress(RuntimeError):  # the store may be gone first
            self._store.set(f"{self._key}/left/{self._rank}", "1")

    def has_left(self, rank: int) -> bool:
        """Whether a rank has reported that it closes its communicator."""
        try:
            return self._store.check([f"{self._key}/left/{rank}"])
        except RuntimeError:
            self.reachable = False
            return False

    def _watch(self, on_failure: Callable[[], None], period: float) -> None:
        while not self._closed.wait(period):
            if self._look():
                if self.failure is not None and self.failure.reporter != self._rank:
                    on_failure()
                return

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
