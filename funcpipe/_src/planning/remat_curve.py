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

BUDGETS = tuple(i / 10 for i in range(11))
# Pixels: the plot, and what is around it.
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 640.0, 280.0, 84.0, 84.0, 56.0, 40.0


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
        return "\n".join([head, *map(self._row, (*self.points, self.here))])

    def _row(self, p: Point) -> str:
        name = "this plan" if p.budget is None else f"budget {p.budget:.2f}"
        parts = (
            f"{_part(p.nbytes, self.whole):>9.1%} {flops_text(p.flops):>14} "
            f"{_part(p.flops, self.forward):>6.1%}"
        )
        return f"  {name:<11} {bytes_text(p.nbytes):>10} {parts}" + (
            "" if p.reached else "  the least there is"
        )

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
        most = (
            max((_part(p.flops, self.forward) for p in (*self.points, self.here)), default=0.0)
            or 1.0
        )
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
        at = [self._at(p, most) for p in self.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        yield f"<polyline points='{path}' fill='none' stroke='{_COLOURS['F']}' stroke-width='1.6'/>"
        for p, (x, y) in zip(self.points, at, strict=True):
            text = f"budget {p.budget:g}: {bytes_text(p.nbytes)}, {flops_text(p.flops)} again"
            yield (
                f"<circle class='point' cx='{x:.1f}' cy='{y:.1f}' r='3.5' "
                f"fill='{_COLOURS['F']}'><title>{text}</title></circle>"
            )
        x, y = self._at(self.here, most)
        yield (
            f"<circle class='here' cx='{x:.1f}' cy='{y:.1f}' r='6' fill='none' "
            f"stroke='{_COLOURS['B']}' stroke-width='2'/>"
        )
        side, anchor = (-10, "end") if x > _WIDTH / 2 else (10, "start")
        label = (
            f"<text x='{x + side:.1f}' y='{y - 8:.1f}' text-anchor='{anchor}' "
            f"fill='{_COLOURS['B']}'>"
        )
        yield f"{label}this plan</text>"
        yield "</g></svg>"

    def _at(self, p: Point, most: float) -> tuple[float, float]:
        return _WIDTH * _part(p.nbytes, self.whole), _HEIGHT * (
            1 - _part(p.flops, self.forward) / most
        )


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
    whole = [s.whole for s in cut.saved]
    points = [
        _point(b, [outcome(s.choice, within(s.choice, b)) for s in cut.saved], whole)
        for b in sorted(budgets)
    ]
    here = [s.outcome for s in cut.saved]
    forward = sum(unit.code.flops for (kind, _), unit in cut.units.items() if kind == "F")
    return RematCurve(
        tuple(points), Point(None, _bytes(here), sum(x.flops for x in here)), _bytes(whole), forward
    )


def _point(budget: float, found: Sequence[Outcome], whole: Sequence[Outcome]) -> Point:
    reached = all(x.nbytes <= budget * w.nbytes for x, w in zip(found, whole, strict=True))
    return Point(budget, _bytes(found), sum(x.flops for x in found), reached)


def _bytes(found: Sequence[Outcome]) -> int:
    return sum(x.nbytes for x in found)


def _part(n: int, whole: int) -> float:
    return n / whole if whole else 0.0


def _axes(most: float) -> Iterator[str]:
    """The frame, and five marks along each side."""
    yield f"<path d='M0 0V{_HEIGHT:g}H{_WIDTH:g}' fill='none' stroke='{_FAINT}'/>"
    for i in range(6):
        x, y = _WIDTH * i / 5, _HEIGHT * (1 - i / 5)
        yield f"<path d='M{x:g} {_HEIGHT:g}v5M0 {y:g}h-5' stroke='{_FAINT}'/>"
        yield (
            f"<text x='{x:g}' y='{_HEIGHT + 18:g}' text-anchor='middle' "
            f"fill='{_FAINT}'>{i / 5:.0%}</text>"
        )
        yield (
            f"<text x='-10' y='{y + 4:g}' text-anchor='end' "
            f"fill='{_FAINT}'>{most * i / 5:.1%}</text>"
        )
    yield (
        f"<text x='{_WIDTH / 2:g}' y='{_HEIGHT + 40:g}' text-anchor='middle'>residuals, of those "
        "without remat</text>"
    )
    yield "<text x='-70' y='-10'>FLOPs again, of the forward pass</text>"


def flops_text(n: float) -> str:
    """FLOPs for people.

    >>> flops_text(999), flops_text(2_500_000)
    ('999 FLOP', '2.5 MFLOP')
    """
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            break
        n /= 1000
    return f"{n:.1f} {unit}FLOP" if unit else f"{n:g} FLOP"


def lines(saved: Sequence[Saved]) -> list[str]:
    """What the segments of a cut that have a `remat` save: a line for each of those."""
    groups: dict[str, list[int]] = {}
    for segment, s in enumerate(saved):
        if s.remat is not None:
            groups.setdefault(str(s.remat), []).append(segment)
    out = []
    for name, segments in groups.items():
        some = [saved[s] for s in segments]
        again = sum(s.outcome.flops for s in some)
        kept, whole = (
            bytes_text(_bytes(x)) for x in ([s.outcome for s in some], [s.whole for s in some])
        )
        line = (
            f"  {name}: segments {_spans(segments)} save {kept} of {whole} a microbatch, and "
            f"compute {flops_text(again)} again"
        )
        over = [s for s in segments if saved[s].over]
        out.append(line + (f"; segments {_spans(over)} cannot save less" if over else ""))
    return out


def _spans(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours as one span.

    >>> _spans([0, 1, 2, 4])
    '0-2, 4'
    """
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][-1] == n - 1:
            spans[-1].append(n)
        else:
            spans.append([n])
    return ", ".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in spans)
