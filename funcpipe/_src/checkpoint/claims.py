"""The folder in which a save writes, and when a folder that a dead save left is removed.

A save writes in ``step-N.TOKEN.tmp``, with a TOKEN that no other save has. In it lies the file
``lock``, on which rank 0 holds an exclusive lock (flock) while the save lives. The kernel takes the
lock back when the process ends, however it ends.

A folder whose lock was taken on this machine, since it started, is removed as soon as nobody holds
the lock. Any other folder (of another machine, of an earlier funcpipe, on a file system without
locks) is removed when nobody holds a lock on it and nothing in it has changed for a day.

In: a root and a step.
Out: a claim, which is given up in the end; a root without folders of dead saves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LOCK = "lock"
_NAME = re.compile(r"step-(0|[1-9]\d*)(\.[0-9a-f]+)?\.tmp")  # without TOKEN: of an earlier funcpipe
_DAY = 24 * 3600.0  # seconds
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def new_folder(root: Path, step: int) -> Path:
    """A path that no other save has."""
    return root / f"step-{step}.{secrets.token_hex(6)}.tmp"


class Claim:
    """The folder of a save, held until `give_up`, or until this process ends.

    Args:
        root: where checkpoints lie; it is made where it is missing.
        step: which step is saved.
    """

    def __init__(self, root: Path, step: int) -> None:
        self.path = new_folder(root, step)
        self.path.mkdir(parents=True)
        try:
            self._lock = _lock_in(self.path)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def give_up(self) -> None:
        """Let go of the folder: whoever saves next may remove it."""
        if self._lock is not None:
            with self._lock as file:
                fcntl.flock(file, fcntl.LOCK_UN)  # forked processes may hold the same open file
            self._lock = None


def _lock_in(folder: Path) -> TextIO | None:
    """A new lock, held. It gets its name when it is held, so that nobody finds it free before.

    None on a file system that has no locks.
    """
    new = folder / f"{LOCK}.new"
    file = new.open("w")
    try:
        file.write(_machine())
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        new.unlink()
        if error.errno in _NO_LOCKS:
            return None
        raise
    os.rename(new, folder / LOCK)
    return file


def _machine() -> str:
    """This machine since it started: who reads the same text meets the same kernel's locks."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return platform.node()


# ---- which may go


def remove_dead(root: Path) -> None:
    """Remove the folders of saves that died, by the rule above."""
    for path in root.glob("step-*.tmp"):
        if _NAME.fullmatch(path.name) and _is_dead(path):
            shutil.rmtree(path, ignore_errors=True)  # another save may be removing it as well


def _is_dead(folder: Path) -> bool:
    try:
        with (folder / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.read() == _machine():
                return True
    except BlockingIOError:
        return False
    except OSError:  # there is no lock, or the file system has none
        pass
    return _untouched(folder)


def _untouched(folder: Path) -> bool:
    """Whether nothing in it has changed for a day."""
    try:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # something goes at this moment
        return False
    return time.time() - newest > _DAY
