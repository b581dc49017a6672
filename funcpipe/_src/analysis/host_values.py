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
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import is_
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NamedTuple

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


class Place(NamedTuple):
    """A place in Python: how to read and to write it, and what was there."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]
    held: Any


# What reading a place raises where what was there is gone.
_GONE = (KeyError, AttributeError, TypeError, RuntimeError)


# ---- what a walk found, and whether it still holds


class Watch:
    """What is reached from a shell, read again at every call.

    Args:
        shell: of the function.
        written: the paths that functions were seen to write; shared.
        tensors: whether what a tensor holds counts.
    """

    def __init__(self, shell: Shell, written: set[str], tensors: bool) -> None:
        self.shell = shell
        self.written = written
        self.tensors = tensors
        files = (fn.__code__.co_filename for fn in shell.functions)
        packages = map(package_of, files)
        self._packages = frozenset(filter(None, packages))
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
        if len(old.objects) != len(new.objects):
            return False
        if len(old.functions) != len(new.functions):
            return False
        for (_, before), (_, now) in zip(old.objects, new.objects, strict=True):
            if before is not now:
                return False
        return all(map(_fits, old.functions, new.functions))

    def now(self) -> Values:
        """The values as they are; the same tuple as long as nothing was touched."""
        walk = self._walk
        try:
            by_dict = [get(box) for get, box in walk.getters]
            polled = [read(value) for read, value in walk.polls]
            sizes = list(map(len, walk.sized))
        except _GONE:
            self._read()
            return self.values
        new = list(itertools.chain.from_iterable(by_dict))
        if polled != walk.polled or sizes != walk.sizes:
            self._read()
        elif not all(map(is_, new, walk.last)):
            self._update(walk, new)
        return self.values

    def _update(self, walk: Walk, new: list[Any]) -> None:
        """Take in numbers and flags that are others now; where anything else is, walk again."""
        values = list(self.values)
        for place, before, now in zip(walk.places, walk.last, new, strict=True):
            if before is now:
                continue
            if not is_value(before) or not is_value(now):
                self._read()
                return
            path, _ = values[place]
            values[place] = path, token(now)
        if tuple(values) != self.values:
            self.values = tuple(values)
        walk.last = new  # after the values: threads read both

    def places(self) -> list[Place]:
        """How to read and to write every place that was found, and what is there."""
        walk = self._walk
        found: list[Place] = []
        for number, (box, key) in enumerate(walk.dicts):
            owner = walk.owners.get(number, box)
            read = partial(box.get, key, MISSING)
            write = partial(_set, owner, key)
            found.append(Place(read, write, walk.last[number]))
        for cell, held in walk.cells:
            found.append(_cell_place(cell, held))
        for box, held in walk.lists:
            found.append(Place(partial(list, box), partial(_refill, box), held))
        for params in walk.params:
            for param in params.values():
                if param is not None:
                    found.append(_flag_place(param))
        return found


def _cell_place(cell: CellType, held: Any) -> Place:
    return Place(partial(contents, cell), partial(_fill, cell), held)


def _flag_place(param: Any) -> Place:
    read = partial(getattr, param, "requires_grad")
    return Place(read, param.requires_grad_, param.requires_grad)


def _fits(old: FunctionType, new: FunctionType) -> bool:
    if old is new:
        return True
    own = old.__dict__.keys() | new.__dict__.keys()
    if own - {"__wrapped__"}:
        return False
    same_code = old.__code__ is new.__code__
    return same_code and old.__globals__ is new.__globals__


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
        # The function, its shell, and what of it counts.
        self._last: tuple[Any, Shell, Values] | None = None

    def values(self, fn: Callable) -> tuple[Values, Values]:
        """What the function itself holds, and what it reaches."""
        watch = self.watch
        if watch is not None and self._last is not None:
            last, shell, held = self._last
            if same_function(last, fn) and shell.holds():
                return held, watch.now()
        shell = shell_of(fn)
        if watch is None or not watch.fits(shell):
            watch = Watch(shell, self.written, self.tensors)
            self.watch = watch
        held = tuple(pair for pair in shell.values if pair[0] not in self.written)
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
        own = [_cell_place(cell, held) for cell, held in cells]
        self._places = own + follower.watch.places()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, every place holds what it held at the call."""
        moved = []
        for place in self._places:
            now = place.read()
            if not _held_alike(now, place.held):
                moved.append((place.write, now))
                place.write(place.held)
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
            held, reached = self.values
            self.values = _without(held, changed), _without(reached, changed)

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
        pairs = itertools.chain(*self.values)
        told = [pair for pair in pairs if isinstance(pair[1], Token)]
        return [f"{path} = {noted}" for path, noted in told]


WRITES = (
    "changes `{path}` from {old} to {new} while it runs: a loss is planned once, not run at every "
    "step, so the number would stay. Count in the step, outside value_and_grad, or return it as aux"
)


def _without(values: Values, changed: Iterable[str]) -> Values:
    """The values that do not lie at or below some paths."""
    return tuple(pair for pair in values if not _within(pair[0], changed))


def _within(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith((f"{other}[", f"{other}.")) for other in others)


def differences(
    before: tuple[Values, Values],
    after: tuple[Values, Values],
) -> dict[str, tuple[Any, Any]]:
    """By path, what differs between two readings of a function.

    >>> differences(((("k", 1),), ()), ((("k", 2),), ()))
    {'k': (1, 2)}
    """
    old = _by_path(before)
    new = _by_path(after)
    found = {}
    for path in old | new:
        pair = old.get(path), new.get(path)
        if pair[0] != pair[1]:
            found[path] = pair
    return found


def _by_path(values: tuple[Values, Values]) -> dict[str, Any]:
    """The first value of every path."""
    found: dict[str, Any] = {}
    for path, value in itertools.chain(*values):
        found.setdefault(path, value)
    return found


def name_of(fn: Callable) -> str:
    """A function by its place in the code."""
    functions = shell_of(fn).functions
    if not functions:
        return f"the loss function {type(fn).__name__}"
    code = functions[0].__code__
    return f"the loss function at {Path(code.co_filename).name}:{code.co_firstlineno}"


# ---- writing places


def _set(owner: Any, key: Any, value: Any) -> None:
    missing = value is MISSING
    if isinstance(owner, type):
        delattr(owner, key) if missing else setattr(owner, key, value)
    elif missing:
        dict.pop(owner, key, None)
    else:
        dict.__setitem__(owner, key, value)


def _fill(cell: CellType, value: Any) -> None:
    if value is MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _refill(box: Any, held: list) -> None:
    box.clear()
    box.extend(held)


def _held_alike(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(is_, now, then))
    if not is_value(now) or not is_value(then):
        return False
    return token(now) == token(then)
