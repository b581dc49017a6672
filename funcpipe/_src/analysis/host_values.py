"""Host values: what a function reads from Python beside its arguments, such as closed-over numbers,
settings and the training flags of modules.

Followed: closure cells, defaults and globals of the function; of every object that is found so, the
attributes, properties and methods whose names occur in the user's code that it calls; entries of
dicts, elements of lists, tuples and sets, small numpy arrays, fields of dataclasses, attributes of
classes and modules; ``training``, numbers, texts and configs of every ``nn.Module``, and which of
its params require gradients. Up to `DEPTH` steps from the function, and `LONGEST` entries of a
container.

Not followed: what a library's own code reads (torch, and what is installed, unless the step is of
the same package), objects of C extensions (another one counts, a change within does not), the
elements of tensors, longer containers (another length counts), attributes by names that are
computed beside ones that are written out, files, the environment, clocks and random states; what
the function itself writes.

In: functions. Out: `Reading`, whose values are equal as long as the functions read the same.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from funcpipe._src.analysis.host_code import package_of
from funcpipe._src.analysis.host_shell import (
    MISSING,
    Shell,
    Token,
    Values,
    contents,
    is_number,
    is_value,
    same_function,
    shell_of,
    token,
)
from funcpipe._src.analysis.host_walk import Walk
from funcpipe.errors import TraceError

Place = tuple[
    Callable[[], Any], Callable[[Any], Any], Any
]  # how to read it, how to write it, what was there


# ---- what a walk found, and whether it still holds


class Watch:
    """What is reached from a shell, read again at every call.

    Args:
        shell: of the function.
        written: the paths that functions were seen to write; shared.
        tensors: whether what a tensor holds counts.
    """

    def __init__(self, shell: Shell, written: set[str], tensors: bool) -> None:
        self.shell, self.written, self.tensors = shell, written, tensors
        files = (package_of(fn.__code__.co_filename) for fn in shell.functions)
        self._packages = frozenset(filter(None, files))
        self._names: set[str] = set()
        self._read()

    def _read(self) -> None:
        """Walk, again where that brought names that objects seen before may have."""
        known = -1
        while len(self._names) != known:
            known = len(self._names)
            walk = Walk(self._names, self._packages, self.written, self.tensors)
            walk.run(self.shell)
        self._walk = walk
        self.values: Values = tuple(walk.values)

    def fits(self, new: Shell) -> bool:
        """Whether another shell reaches the same objects, by the same code."""
        old = self.shell
        if (len(old.objects), len(old.functions)) != (len(new.objects), len(new.functions)):
            return False
        same_objects = all(a is b for (_, a), (_, b) in zip(old.objects, new.objects, strict=True))
        functions = zip(old.functions, new.functions, strict=True)
        return same_objects and all(_fits(a, b) for a, b in functions)

    def now(self) -> Values:
        """The values as they are; the same tuple as long as nothing was touched."""
        walk = self._walk
        try:
            new = [get(box) for get, box in walk.getters]
            polled = [read(x) for read, x in walk.polls]
            sizes = list(map(len, walk.sized))
        except (KeyError, AttributeError, TypeError, RuntimeError):  # what was there is gone
            self._read()
            return self.values
        if polled != walk.polled or sizes != walk.sizes:
            self._read()
        elif not all(map(is_, itertools.chain.from_iterable(new), walk.last)):
            self._update(walk, list(itertools.chain.from_iterable(new)))
        return self.values

    def _update(self, walk: Walk, new: list[Any]) -> None:
        """Take in numbers and flags that are others now; where anything else is, walk again."""
        touched = [n for n, (a, b) in enumerate(zip(new, walk.last, strict=True)) if a is not b]
        if not all(is_value(new[n]) and is_value(walk.last[n]) for n in touched):
            self._read()
            return
        values = list(self.values)
        for n in touched:
            place = walk.places[n]
            values[place] = values[place][0], token(new[n])
        if tuple(values) != self.values:
            self.values = tuple(values)
        walk.last = new  # after the values: threads read both

    def places(self) -> list[Place]:
        """How to read and to write every place that was found, and what is there."""
        walk = self._walk
        out: list[Place] = []
        for n, ((box, key), x) in enumerate(zip(walk.dicts, walk.last, strict=True)):
            owner = walk.owners.get(n, box)
            out.append(
                (functools.partial(box.get, key, MISSING), functools.partial(_set, owner, key), x)
            )
        for cell, x in walk.cells:
            out.append((functools.partial(contents, cell), functools.partial(_fill, cell), x))
        for box, held in walk.lists:
            out.append((functools.partial(list, box), functools.partial(_refill, box), held))
        for p in (p for some in walk.params for p in some.values() if p is not None):
            out.append(
                (functools.partial(getattr, p, "requires_grad"), p.requires_grad_, p.requires_grad)
            )
        return out


def _fits(old: FunctionType, new: FunctionType) -> bool:
    if old is new:
        return True
    own = (old.__dict__.keys() | new.__dict__.keys()) - {"__wrapped__"}
    return old.__code__ is new.__code__ and old.__globals__ is new.__globals__ and not own


class Follower:
    """Reads a function of a step, time and again: the step itself, or the loss function of one
    call.

    Args:
        written: the paths that functions were seen to write; shared, and grows.
        tensors: whether what a tensor holds counts: a loss function may read it as a number, a step
            as it is.
    """

    def __init__(self, written: set[str], tensors: bool = True) -> None:
        self.written, self.tensors = written, tensors
        self.watch: Watch | None = None
        self._last: tuple[Any, Shell, Values] | None = (
            None  # the function, its shell, and what of it counts
        )

    def values(self, fn: Callable) -> tuple[Values, Values]:
        """What the function itself holds, and what it reaches."""
        last, watch = self._last, self.watch
        if (
            watch is not None
            and last is not None
            and same_function(last[0], fn)
            and last[1].holds()
        ):
            return last[2], watch.now()
        shell = shell_of(fn)
        if watch is None or not watch.fits(shell):
            watch = self.watch = Watch(shell, self.written, self.tensors)
        held = tuple(v for v in shell.values if v[0] not in self.written)
        self._last = fn, shell, held
        return held, watch.now()

    def reached(self) -> Values:
        """What the function that was read last reaches now."""
        return self.watch.now() if self.watch is not None else ()


class Reading:
    """What a loss function reads at a call: compared with other calls, and put back while it is
    traced."""

    def __init__(self, fn: Callable, follower: Follower) -> None:
        self.name = name_of(fn)
        self.fn: Callable | None = fn
        self.follower = follower
        self.values = follower.values(fn)
        assert follower.watch is not None
        cells = shell_of(fn).cells
        held: list[Place] = [
            (functools.partial(contents, c), functools.partial(_fill, c), x) for c, x in cells
        ]
        self._places = held + follower.watch.places()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, every place holds what it held at the call."""
        moved = []
        for read, write, then in self._places:
            now = read()
            if not _held_alike(now, then):
                moved.append((write, now))
                write(then)
        try:
            yield
        finally:
            for write, now in reversed(moved):
                write(now)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the function runs: what it writes is its own, and not read from now on."""
        assert self.fn is not None
        before = self.follower.values(self.fn)
        try:
            yield
        except Exception as error:  # it may have failed because of what it wrote
            self._changed(before, error)
            raise
        changed = self._changed(before)
        if changed:
            self.follower.written.update(changed)
            self.follower.watch = None
            kept = [tuple(v for v in some if not _within(v[0], changed)) for some in self.values]
            self.values = kept[0], kept[1]

    def _changed(
        self, before: tuple[Values, Values], cause: Exception | None = None
    ) -> dict[str, tuple[Any, Any]]:
        """By path, what the function has written; TraceError if it is a number."""
        assert self.fn is not None
        changed = differences(before, self.follower.values(self.fn))
        for path, (old, new) in changed.items():
            if is_number(old) and is_number(new):
                raise TraceError(
                    f"{self.name} {WRITES.format(path=path, old=old, new=new)}"
                ) from cause
        return changed

    def done(self) -> None:
        """It is traced: let go of the function and of what it reaches."""
        self.fn, self._places = None, []

    def lines(self) -> list[str]:
        """The values as text, line by line: what ranks compare."""
        told = [(path, x) for path, x in (*self.values[0], *self.values[1]) if isinstance(x, Token)]
        return [f"{path} = {x}" for path, x in told]


WRITES = (
    "changes `{path}` from {old} to {new} while it runs: a loss is planned once, not run at every "
    "step, so the number would stay. Count in the step, outside value_and_grad, or return it as aux"
)


def _within(path: str, others: Mapping[str, Any]) -> bool:
    return any(path == other or path.startswith((f"{other}[", f"{other}.")) for other in others)


def differences(
    before: tuple[Values, Values], after: tuple[Values, Values]
) -> dict[str, tuple[Any, Any]]:
    """By path, what differs between two readings of a function.

    >>> differences(((("k", 1),), ()), ((("k", 2),), ()))
    {'k': (1, 2)}
    """
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for found, values in ((old, before), (new, after)):
        for path, x in (*values[0], *values[1]):
            found.setdefault(path, x)
    paths = dict.fromkeys([*old, *new])
    return {p: (old.get(p), new.get(p)) for p in paths if old.get(p) != new.get(p)}


def name_of(fn: Callable) -> str:
    """A function by its place in the code."""
    functions = shell_of(fn).functions
    if not functions:
        return f"the loss function {type(fn).__name__}"
    code = functions[0].__code__
    return f"the loss function at {Path(code.co_filename).name}:{code.co_firstlineno}"


# ---- writing places


def _set(owner: Any, key: Any, x: Any) -> None:
    if isinstance(owner, type):
        delattr(owner, key) if x is MISSING else setattr(owner, key, x)
    elif x is MISSING:
        dict.pop(owner, key, None)
    else:
        dict.__setitem__(owner, key, x)


def _fill(cell: CellType, x: Any) -> None:
    if x is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = x


def _refill(box: Any, held: list) -> None:
    box.clear()
    box.extend(held)


def _held_alike(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(is_, now, then))
    return is_value(now) and is_value(then) and token(now) == token(then)
