"""Lines: where in the user's own code something happens, for errors.

In: the stack, or an error. Out: the innermost line that is neither torch's nor funcpipe's, as text
that is ready to be put into a sentence.
"""

from __future__ import annotations

import linecache
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import optree
import torch

_TORCH = str(Path(torch.__file__).parent)
_OPTREE = str(Path(optree.__file__).parent)
_FUNCPIPE = Path(__file__).parents[2]
# In a checkout the transforms lie beside the package, when installed within it.
_TRANSFORMS = _FUNCPIPE.parent / "transforms"
OWN = (f"{_FUNCPIPE}/", f"{_TRANSFORMS}/")
_FOREIGN = (_TORCH, _OPTREE, *OWN, "<")


@dataclass(frozen=True)
class Line:
    """A line of the user's code."""

    file: str
    number: int

    def __str__(self) -> str:
        return (
            f" at {Path(self.file).name}:{self.number} "
            f"`{linecache.getline(self.file, self.number).strip()}`"
        )


def user_line() -> Line | None:
    """The line that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_FOREIGN):
            return Line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


def user_depth() -> int:
    """The ``stacklevel`` with which the caller warns about the user's line that is running."""
    frame: Any = sys._getframe(1)
    depth = 1
    while frame is not None and frame.f_code.co_filename.startswith(_FOREIGN):
        frame, depth = frame.f_back, depth + 1
    return depth


def line_of(error: BaseException) -> Line | None:
    """The line that an error comes from."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_FOREIGN)
    ]
    return Line(frames[-1].filename, frames[-1].lineno or 0) if frames else None


def caller(frame: FrameType) -> FrameType:
    """The nearest frame outside of funcpipe, from a frame outwards."""
    while frame.f_code.co_filename.startswith(OWN) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def from_torch(frame: FrameType) -> bool:
    """Whether a frame is torch's own code."""
    return frame.f_code.co_filename.startswith(_TORCH)
