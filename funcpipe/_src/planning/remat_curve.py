"""The trade-off of `remat`: for budgets of bytes, what is saved and what is computed again.

In: what the segments of a cut may save (`funcpipe._src.graph.remat.Saved`). Out: `RematCurve`, as
text or as a picture. Nothing is traced again, and nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from funcpipe._src.graph.partition import Units
from funcpipe._src.graph.remat import Saved
from funcpipe._src.graph.remat_min_cut import Outcome, outcome, within
from funcpipe._src.graph.unit_code import bytes_text
from funcpipe._src.viz.svg import _COLOURS, _FAINT, _FONT, _INK
from funcpipe.errors import PlanError

BUDGETS = tuple(tenths / 10 for tenths in range(11))
# Pixels: the plot, and what is around it.
_WIDTH, _HEIGHT = 640.0, 280.0
_LEFT, _RIGHT = 84.0, 40.0
_TOP, _BOTTOM = 84.0, 56.0


@dataclass(frozen=True)
class Point:
    """A choice.

    Args:
        budget: the part of the bytes that may be saved; None for what the plan does.
        nbytes: of residuals, of one microbatch, over all segments. What two segments save counts
            twice.
        flops: computed again.
        reached: whether every segment keeps within the budget; if not, it saves the least that it
            can.
    """

    budget: float | None
    nbytes: int
    flops: int
    reached: bool = True


@dataclass(frozen=True)
class RematCurve:
    """What `remat` with a budget would save and compute again, on every segment of a
    ``value_and_grad``.

    Args:
        points: by budget, in order.
        here: what the plan does.
        whole: bytes of residuals without remat.
        forward: FLOPs of the forward pass.

    >>> from funcpipe._src.planning.remat_curve import Point
    >>> points = (Point(0.5, 512, 100), Point(1.0, 1024, 0))
    >>> print(RematCurve(points, Point(None, 1024, 0), 1024, 400))
    residuals and FLOPs computed again, of one microbatch (1.0 KiB and 400 FLOP in the forward pass)
      budget 0.50      512 B     50.0%       100 FLOP  25.0%
      budget 1.00    1.0 KiB    100.0%         0 FLOP   0.0%
      this plan      1.0 KiB    100.0%         0 FLOP   0.0%
    """

    points: tuple[Point, ...]
    here: Point
    whole: int
    forward: int

    def __str__(self) -> str:
        size = f"{bytes_text(self.whole)} and {flops_text(self.forward)} in the forward pass"
        head = f"residuals and FLOPs computed again, of one microbatch ({size})"
        rows = [self._row(point) for point in self._all_points]
        return "\n".join([head, *rows])

    @property
    def _all_points(self) -> tuple[Point, ...]:
        return *self.points, self.here

    def _row(self, point: Point) -> str:
        name = "this plan" if point.budget is None else f"budget {point.budget:.2f}"
        saved = f"{bytes_text(point.nbytes):>10} {_part(point.nbytes, self.whole):>9.1%}"
        again = f"{flops_text(point.flops):>14} {_part(point.flops, self.forward):>6.1%}"
        missed = "" if point.reached else "  the least there is"
        return f"  {name:<11} {saved} {again}{missed}"

    def save(self, path: str | Path, title: str = "remat") -> Path:
        """Draw it as an ``.svg`` picture.

        Raises:
            PlanError: another ending.
        """
        path = Path(path)
        if path.suffix != ".svg":
            raise PlanError(
                f"cannot draw a curve as {path.suffix or path.name!r}; name a file .svg"
            )
        path.write_text(self.svg(title), encoding="utf-8")
        return path

    def svg(self, title: str = "remat") -> str:
        """The picture: bytes saved to the right, FLOPs computed again upwards, as parts of what the
        forward pass has."""
        return "\n".join(self._svg(title))

    def _svg(self, title: str) -> Iterator[str]:
        width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
        parts = [_part(point.flops, self.forward) for point in self._all_points]
        most = max(parts) or 1.0
        yield (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' "
            f"width='{width:g}' height='{height:g}' {_FONT} font-size='11' fill='{_INK}'>"
        )
        yield f"<rect width='{width:g}' height='{height:g}' fill='#fff'/>"
        yield f"<text x='{_LEFT:g}' y='26' font-size='17' font-weight='600'>{escape(title)}</text>"
        facts = (
            f"{bytes_text(self.whole)} of residuals, {flops_text(self.forward)} in the forward pass"
        )
        yield (
            f"<text x='{_LEFT:g}' y='46' font-size='12' fill='{_FAINT}'>one microbatch: "
            f"{facts}</text>"
        )
        yield f"<g transform='translate({_LEFT:g} {_TOP:g})'>"
        yield from _axes(most)
        places = [self._at(point, most) for point in self.points]
        path = " ".join(f"{right:.1f},{down:.1f}" for right, down in places)
        yield f"<polyline points='{path}' fill='none' stroke='{_COLOURS['F']}' stroke-width='1.6'/>"
        for point, (right, down) in zip(self.points, places, strict=True):
            saved, again = bytes_text(point.nbytes), flops_text(point.flops)
            text = f"budget {point.budget:g}: {saved}, {again} again"
            yield (
                f"<circle class='point' cx='{right:.1f}' cy='{down:.1f}' r='3.5' "
                f"fill='{_COLOURS['F']}'><title>{text}</title></circle>"
            )
        right, down = self._at(self.here, most)
        yield (
            f"<circle class='here' cx='{right:.1f}' cy='{down:.1f}' r='6' fill='none' "
            f"stroke='{_COLOURS['B']}' stroke-width='2'/>"
        )
        side, anchor = (-10, "end") if right > _WIDTH / 2 else (10, "start")
        label = (
            f"<text x='{right + side:.1f}' y='{down - 8:.1f}' text-anchor='{anchor}' "
            f"fill='{_COLOURS['B']}'>"
        )
        yield f"{label}this plan</text>"
        yield "</g></svg>"

    def _at(self, point: Point, most: float) -> tuple[float, float]:
        """Pixels to the right and down from the plot's corner."""
        saved = _part(point.nbytes, self.whole)
        again = _part(point.flops, self.forward)
        return _WIDTH * saved, _HEIGHT * (1 - again / most)


def remat_curve(cut: Units, budgets: Sequence[float] = BUDGETS) -> RematCurve:
    """The curve of a cut that a planner made.

    Raises:
        PlanError: a budget that is no part of a whole.
    """
    for budget in budgets:
        if not 0 <= budget <= 1:
            raise PlanError(
                f"remat_curve: there is a budget of {budget!r}; it is the part of the bytes that "
                "may be saved, from 0 to 1"
            )
    here = [saved.outcome for saved in cut.saved]
    whole = [saved.whole for saved in cut.saved]
    return RematCurve(
        points=tuple(_point(budget, cut.saved) for budget in sorted(budgets)),
        here=Point(None, _bytes(here), _flops(here)),
        whole=_bytes(whole),
        forward=sum(unit.code.flops for unit in cut.units.values() if unit.kind == "F"),
    )


def _point(budget: float, segments: Sequence[Saved]) -> Point:
    """What all segments save and compute again within a budget."""
    found = []
    reached = True
    for saved in segments:
        choice = saved.choice
        chosen = outcome(choice, within(choice, budget))
        found.append(chosen)
        reached = reached and chosen.nbytes <= budget * saved.whole.nbytes
    return Point(budget, _bytes(found), _flops(found), reached)


def _bytes(outcomes: Sequence[Outcome]) -> int:
    return sum(chosen.nbytes for chosen in outcomes)


def _flops(outcomes: Sequence[Outcome]) -> int:
    return sum(chosen.flops for chosen in outcomes)


def _part(count: int, whole: int) -> float:
    return count / whole if whole else 0.0


def _axes(most: float) -> Iterator[str]:
    """The frame, and five marks along each side."""
    yield f"<path d='M0 0V{_HEIGHT:g}H{_WIDTH:g}' fill='none' stroke='{_FAINT}'/>"
    for mark in range(6):
        right = _WIDTH * mark / 5
        down = _HEIGHT * (1 - mark / 5)
        yield f"<path d='M{right:g} {_HEIGHT:g}v5M0 {down:g}h-5' stroke='{_FAINT}'/>"
        yield (
            f"<text x='{right:g}' y='{_HEIGHT + 18:g}' text-anchor='middle' "
            f"fill='{_FAINT}'>{mark / 5:.0%}</text>"
        )
        yield (
            f"<text x='-10' y='{down + 4:g}' text-anchor='end' "
            f"fill='{_FAINT}'>{most * mark / 5:.1%}</text>"
        )
    yield (
        f"<text x='{_WIDTH / 2:g}' y='{_HEIGHT + 40:g}' text-anchor='middle'>residuals, of those "
        "without remat</text>"
    )
    yield "<text x='-70' y='-10'>FLOPs again, of the forward pass</text>"


def flops_text(flops: float) -> str:
    """FLOPs for people.

    >>> flops_text(999), flops_text(2_500_000)
    ('999 FLOP', '2.5 MFLOP')
    """
    for unit in ("", "k", "M", "G", "T"):
        if flops < 1000 or unit == "T":
            break
        flops /= 1000
    return f"{flops:.1f} {unit}FLOP" if unit else f"{flops:g} FLOP"


def lines(saved: Sequence[Saved]) -> list[str]:
    """What the segments of a cut that have a `remat` save: a line for each of those."""
    groups: dict[str, list[int]] = {}
    for segment, of_segment in enumerate(saved):
        if of_segment.remat is not None:
            groups.setdefault(str(of_segment.remat), []).append(segment)
    found = []
    for name, segments in groups.items():
        outcomes = [saved[segment].outcome for segment in segments]
        whole = [saved[segment].whole for segment in segments]
        line = (
            f"  {name}: segments {_spans(segments)} save {bytes_text(_bytes(outcomes))} of "
            f"{bytes_text(_bytes(whole))} a microbatch, and compute "
            f"{flops_text(_flops(outcomes))} again"
        )
        over = [segment for segment in segments if saved[segment].over]
        if over:
            line += f"; segments {_spans(over)} cannot save less"
        found.append(line)
    return found


def _spans(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours as one span.

    >>> _spans([0, 1, 2, 4])
    '0-2, 4'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(map(_span_text, spans))


def _span_text(span: Sequence[int]) -> str:
    return f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}"
