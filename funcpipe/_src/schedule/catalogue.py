"""Catalogue: every schedule of the library by its name.

In: a name, and the number of stages a rank holds, where the schedule leaves that open.
Out: a ``ScheduleFn``. The order is that in which the schedules were invented.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from funcpipe._src.schedule.actions import ScheduleFn
from funcpipe._src.schedule.controllable_memory import v_half, v_min
from funcpipe._src.schedule.library import (
    dual_pipe_v,
    forward_only,
    gpipe,
    interleaved_1f1b,
    interleaved_zb,
    looped_bfs,
    one_f_one_b,
    zb_h1,
    zb_v,
)
from funcpipe.errors import ScheduleError

_FACTORIES: tuple[Callable[..., ScheduleFn], ...] = (
    gpipe,
    one_f_one_b,
    interleaved_1f1b,
    looped_bfs,
    zb_h1,
    interleaved_zb,
    zb_v,
    dual_pipe_v,
    v_half,
    v_min,
    forward_only,
)
NAMES: tuple[str, ...] = tuple(factory.__name__ for factory in _FACTORIES)
_SHORT = {"1f1b": "one_f_one_b"}


def by_name(name: str, v: int | None = None) -> ScheduleFn:
    """The schedule of a name.

    Args:
        name: one of ``NAMES``, or "1f1b"; dashes count as underscores.
        v: stages a rank, where the schedule leaves that open (2 by default).

    Raises:
        ScheduleError: there is no such name, or the schedule has a fixed number of stages a rank
            and ``v`` is given.

    >>> by_name("interleaved-1f1b", v=4).__name__
    'interleaved_1f1b(v=4)'
    >>> by_name("zbv")
    Traceback (most recent call last):
    funcpipe.errors.ScheduleError: no schedule is called 'zbv';
    did you mean zb_v? There are: gpipe, one_f_one_b, ...
    """
    plain = name.replace("-", "_").lower()
    plain = _SHORT.get(plain, plain)
    if plain not in NAMES:
        names = ", ".join(NAMES)
        near = difflib.get_close_matches(plain, NAMES, n=1)
        hint = f"did you mean {near[0]}? There are: " if near else "there are: "
        raise ScheduleError(f"no schedule is called {name!r}; {hint}{names}")
    factory = _FACTORIES[NAMES.index(plain)]
    if takes_v(plain):
        return factory(2 if v is None else v)
    if v is not None:
        some = ", ".join(filter(takes_v, NAMES))
        raise ScheduleError(
            f"{plain} has a fixed number of stages a rank: leave out v, which {some} take"
        )
    return factory()


def takes_v(name: str) -> bool:
    """Whether a schedule leaves the number of stages a rank open.

    >>> takes_v("looped_bfs"), takes_v("zb_v")
    (True, False)
    """
    return "v" in inspect.signature(_FACTORIES[NAMES.index(name)]).parameters


def training(vs: tuple[int, ...] = (2, 4)) -> list[ScheduleFn]:
    """Every schedule that has backwards; those that take ``v``, once for each of ``vs``.

    >>> [fn.__name__ for fn in training(vs=(3,))][:4]
    ['gpipe', 'one_f_one_b', 'interleaved_1f1b(v=3)', 'looped_bfs(v=3)']
    """
    schedules: list[ScheduleFn] = []
    for name in NAMES:
        if name == "forward_only":
            continue
        counts = vs if takes_v(name) else (None,)
        schedules += [by_name(name, count) for count in counts]
    return schedules
