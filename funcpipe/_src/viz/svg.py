"""Timelines as pictures: SVG text, a page that explains every box on hover, lines for a terminal.

In: a ``Timeline``, and for every rank what memory it holds over time, if that is known.
Out: a string.

A track is a rank; a box is an F, B, I or W with its microbatch; what is left grey is bubble.
Colours are Okabe and Ito's, which colour-blind readers can tell apart
(https://jfly.uni-koeln.de/color/); later stages of a rank are paler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path

from funcpipe._src.schedule.actions import COMPUTE
from funcpipe._src.schedule.timeline import Span, Timeline
from funcpipe._src.viz import perfetto
from funcpipe.errors import PlanError

# For every rank: (time, bytes held from then on), in order of time.
Memory = Sequence[Sequence[tuple[float, float]]]

_COLOURS = {"F": "#0072B2", "B": "#D55E00", "I": "#E69F00", "W": "#009E73"}
_MEANING = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_BUBBLE, _INK, _FAINT, _CURVE = "#E9ECEF", "#212529", "#868E96", "#CC79A7"
_FONT = (
    "font-family='ui-sans-serif, system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, "
    "sans-serif'"
)

# Pixels.
_PLOT = 1120.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 84.0, 74.0, 44.0  # beside the plot
_TRACK = 24.0
_AREA = 26.0  # the memory curve under a track
_GAP = 6.0  # between tracks
_DIGIT = 0.58  # the width of a digit, in font sizes


def save(
    timeline: Timeline,
    path: str | Path,
    title: str = "",
    memory: Memory | None = None,
    unit: str = "",
) -> Path:
    """Write a timeline to a file: an ``.html`` page, an ``.svg`` picture, or a ``.json`` trace for
    Perfetto.

    Times in seconds are drawn in milliseconds; in a trace, a unit without a name is a millisecond.

    Raises:
        PlanError: another ending.
    """
    path = Path(path)
    check_suffix(path)
    if path.suffix == ".json":
        found = perfetto.trace(timeline, memory, microseconds=1e6 if unit == "s" else 1e3)
        path.write_text(json.dumps(found), encoding="utf-8")
        return path
    if unit == "s":
        timeline, unit = timeline.scaled(1e3), "ms"
        memory = memory and [_scaled(curve, 1e3) for curve in memory]
    draw = timeline_html if path.suffix == ".html" else timeline_svg
    path.write_text(draw(timeline, title=title, memory=memory, unit=unit), encoding="utf-8")
    return path


def _scaled(curve: Sequence[tuple[float, float]], factor: float) -> list[tuple[float, float]]:
    return [(time * factor, held) for time, held in curve]


def check_suffix(path: Path) -> None:
    """PlanError unless a picture can be saved under this name.

    >>> check_suffix(Path("x.png"))
    Traceback (most recent call last):
    funcpipe.errors.PlanError: cannot draw a plan as '.png'; name
    a file .html or .svg, or .json for a Perfetto trace
    """
    if path.suffix not in (".html", ".svg", ".json"):
        kind = path.suffix or path.name
        raise PlanError(
            f"cannot draw a plan as {kind!r}; name a file .html or .svg, or .json for a Perfetto "
            "trace"
        )


def timeline_svg(
    timeline: Timeline,
    title: str = "",
    memory: Memory | None = None,
    unit: str = "",
) -> str:
    """The picture of a timeline.

    Args:
        timeline: when every action runs.
        title: the headline; the schedule's name by default.
        memory: for every rank a curve of (time, bytes), drawn under its track, all to one scale.
        unit: of time, for the axis, such as ``"ms"``.

    Returns: a whole SVG document.

    >>> from funcpipe._src.schedule import one_f_one_b, timeline, unit_costs
    >>> picture = timeline_svg(timeline(one_f_one_b()(2, 3), unit_costs()))
    >>> picture[:4], picture.count("<rect class='box'")
    ('<svg', 12)
    """
    return "\n".join(_svg(timeline, title, memory, unit, hover=False))


def timeline_html(
    timeline: Timeline,
    title: str = "",
    memory: Memory | None = None,
    unit: str = "",
) -> str:
    """A page of its own with the picture; a box says on hover what it is and when it runs.

    >>> from funcpipe._src.schedule import gpipe, timeline, unit_costs
    >>> page = timeline_html(timeline(gpipe()(2, 1), unit_costs()), unit="ms")
    >>> "<title>rank 1: 1F0, 1 to 2 ms</title>" in page
    True
    """
    head = _page_head(title or timeline.schedule.name)
    return "\n".join([*head, *_svg(timeline, title, memory, unit, hover=True), "</body></html>"])


def _page_head(title: str) -> list[str]:
    return [
        "<!doctype html>",
        "<html lang='en'><head><meta charset='utf-8'>",
        f"<title>{escape(title)}</title>",
        "<style>body{margin:24px;background:#fff} svg{max-width:100%;height:auto} "
        ".box:hover{stroke:#212529;stroke-width:1.5}</style></head><body>",
    ]


def pair(
    timelines: Mapping[str, Timeline],
    page: bool,
    unit: str = "",
) -> str:
    """Several timelines of one schedule, one over the other, drawn to one scale.

    Returns:
        a page, or an SVG document.

    >>> from funcpipe._src.schedule import gpipe, timeline, unit_costs
    >>> recorded = timeline(gpipe()(2, 1), unit_costs())
    >>> lines = {"recorded": recorded, "predicted": timeline(gpipe()(2, 1), unit_costs(2, 2, 2))}
    >>> pair(lines, page=True).count("<svg"), pair(lines, page=False).count("<svg")
    (2, 3)
    """
    until = max(line.makespan for line in timelines.values())
    titles = {title: f"{title}: {line.schedule.name}" for title, line in timelines.items()}
    drawn = []
    for name, line in timelines.items():
        drawn.append("\n".join(_svg(line, titles[name], None, unit, hover=page, until=until)))
    if page:
        return "\n".join([*_page_head(" and ".join(timelines)), *drawn, "</body></html>"])
    height = _TOP + len(next(iter(timelines.values())).spans) * (_TRACK + _GAP) + _BOTTOM
    moved = []
    for nth, text in enumerate(drawn):
        moved.append(text.replace("<svg ", f"<svg y='{nth * height:g}' ", 1))
    size = f"width='{_LEFT + _PLOT + _RIGHT:g}' height='{len(drawn) * height:g}'"
    return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size}>", *moved, "</svg>"])


def timeline_text(timeline: Timeline, width: int = 100) -> str:
    """The timeline for a terminal: a line a rank, with dots for bubbles.

    A box shows its kind, and its microbatch where it fits.

    >>> from funcpipe._src.schedule import one_f_one_b, timeline, unit_costs
    >>> print(timeline_text(timeline(one_f_one_b()(2, 2), unit_costs()), width=54))
    rank 0 |F0-- F1-- ··········B0------- ·····B1------- |
    rank 1 |·····F0-- B0------- F1-- B1------- ··········|
    """
    ranks = len(timeline.spans)
    label = len(f"rank {ranks - 1} ")
    columns = max(width - label - 2, 1)
    scale = columns / timeline.makespan if timeline.makespan else 0.0
    lines = []
    for rank, spans in enumerate(timeline.spans):
        cells = ["·"] * columns
        for span in _boxes(spans):
            first, last = round(span.start * scale), round(span.end * scale)
            name = f"{span.action.kind}{span.action.microbatch}"
            text = name if len(name) <= last - first else span.action.kind
            cells[first:last] = f"{text:-<{max(last - first - 1, len(text))}} "[: last - first]
        lines.append(f"{f'rank {rank}':<{label}}|{''.join(cells)}|")
    return "\n".join(lines)


def _svg(
    timeline: Timeline,
    title: str,
    memory: Memory | None,
    unit: str,
    hover: bool,
    until: float | None = None,
) -> Iterator[str]:
    """``until``: the time at the right edge, which is the timeline's end by default."""
    ranks = len(timeline.spans)
    track = _TRACK + (_AREA if memory else 0) + _GAP
    width, height = _LEFT + _PLOT + _RIGHT, _TOP + ranks * track + _BOTTOM
    end = timeline.makespan if until is None else until
    scale = _PLOT / end if end else 0.0
    steps = chain.from_iterable(memory or ())
    top = max((held for _, held in steps), default=0.0)
    yield (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' "
        f"width='{width:g}' height='{height:g}' {_FONT} font-size='11' fill='{_INK}'>"
    )
    yield f"<rect width='{width:g}' height='{height:g}' fill='#fff'/>"
    yield from _heading(timeline, title, memory, unit)
    for rank, spans in enumerate(timeline.spans):
        yield f"<g transform='translate({_LEFT:g} {_TOP + rank * track:g})'>"
        yield from _track(timeline, rank, spans, scale, unit, hover)
        if memory:
            yield from _curve(memory[rank], scale, end, top)
        yield "</g>"
    yield from _axis(end, scale, _TOP + ranks * track, unit)
    yield "</svg>"


def _heading(
    timeline: Timeline,
    title: str,
    memory: Memory | None,
    unit: str,
) -> Iterator[str]:
    schedule = timeline.schedule
    facts = [
        f"{len(timeline.spans)} ranks",
        f"{schedule.microbatches} microbatches",
        f"{_number(timeline.makespan)}{_unit(unit)}",
        f"bubble {timeline.bubble:.1%}",
    ]
    if schedule.stages > len(timeline.spans):
        facts.append("paler: a rank's later stages")
    headline, y = escape(title or schedule.name), 26
    yield f"<text x='{_LEFT:g}' y='{y}' font-size='17' font-weight='600'>{headline}</text>"
    yield (
        f"<text x='{_LEFT:g}' y='{y + 20}' font-size='12' "
        f"fill='{_FAINT}'>{' · '.join(facts)}</text>"
    )
    kinds = {span.action.kind for span in chain.from_iterable(timeline.spans)}
    entries = [(_COLOURS[kind], f"{kind} {_MEANING[kind]}") for kind in COMPUTE if kind in kinds]
    entries += [(_BUBBLE, "bubble"), *([(_CURVE, "memory")] if memory else [])]
    x = _LEFT + _PLOT
    for colour, text in reversed(entries):
        x -= 6.2 * len(text) + 26
        yield f"<rect x='{x:.0f}' y='{y + 9}' width='12' height='12' rx='2' fill='{colour}'/>"
        yield f"<text x='{x + 17:.0f}' y='{y + 19}' fill='{_INK}'>{text}</text>"


def _track(
    timeline: Timeline,
    rank: int,
    spans: Iterable[Span],
    scale: float,
    unit: str,
    hover: bool,
) -> Iterator[str]:
    """A rank's boxes on grey, its name to the left, and how busy it is to the right."""
    placement = timeline.schedule.placement
    stages = [stage for stage, holder in enumerate(placement) if holder == rank]
    share = timeline.busy[rank] / timeline.makespan if timeline.makespan else 0.0
    middle = _TRACK / 2 + 4
    yield f"<rect width='{_PLOT:g}' height='{_TRACK:g}' fill='{_BUBBLE}'/>"
    yield f"<text x='-10' y='{middle:g}' text-anchor='end'>rank {rank}</text>"
    yield f"<text x='{_PLOT + 8:g}' y='{middle:g}' fill='{_FAINT}'>{share:.0%} busy</text>"
    numbers = []
    for span in _boxes(spans):
        x, width = span.start * scale, (span.end - span.start) * scale
        gap = min(
            0.8, width / 6
        )  # a thin line between boxes, which goes when boxes get thin themselves
        colour = _paler(_COLOURS[span.action.kind], stages.index(span.action.stage) / len(stages))
        box = (
            f"<rect class='box' x='{x:.2f}' width='{width - gap:.2f}' height='{_TRACK:g}' "
            f"fill='{colour}'"
        )
        when = f"{_number(span.start)} to {_number(span.end)}{_unit(unit)}"
        yield (
            f"{box}><title>rank {rank}: {span.action}, {when}</title></rect>"
            if hover
            else f"{box}/>"
        )
        number = str(span.action.microbatch)
        size = min(10.0, (width - 1) / (len(number) * _DIGIT))
        if size >= 6:
            ink = "#fff" if _luminance(colour) < 0.3 else "#000"
            where = (
                f"x='{x + (width - gap) / 2:.2f}' y='{_TRACK / 2 + size * 0.36:.1f}' "
                f"font-size='{size:.1f}'"
            )
            numbers.append(f"<text {where} fill='{ink}'>{number}</text>")
    yield f"<g text-anchor='middle' pointer-events='none'>{''.join(numbers)}</g>"


def _curve(
    curve: Sequence[tuple[float, float]],
    scale: float,
    end: float,
    top: float,
) -> Iterator[str]:
    """The memory that a rank holds, as an area of steps under its track; ``top`` fills the
    height."""
    ground, height = _TRACK + _AREA, _AREA - 2
    points = [f"M0 {ground:g}"]
    for (time, held), (until, _) in zip(curve, [*curve[1:], (end, 0.0)], strict=True):
        y = ground - (held / top * height if top else 0.0)
        points.append(f"L{time * scale:.2f} {y:.2f}L{until * scale:.2f} {y:.2f}")
    path = "".join([*points, f"L{end * scale:.2f} {ground:g}Z"])
    peak = max((held for _, held in curve), default=0.0)
    yield (
        f"<path d='{path}' fill='{_CURVE}' fill-opacity='0.35' stroke='{_CURVE}' "
        "stroke-width='0.8'/>"
    )
    yield f"<text x='{_PLOT + 8:g}' y='{ground - 6:g}' fill='{_FAINT}'>{_bytes(peak)}</text>"


def _axis(
    makespan: float,
    scale: float,
    y: float,
    unit: str,
) -> Iterator[str]:
    yield f"<path d='M{_LEFT:g} {y:g}h{_PLOT:g}' stroke='{_FAINT}'/>"
    step = _tick(makespan)
    ticks = math.floor(makespan / step + 1e-9) + 1 if step else 0
    for nth in range(ticks):
        x = _LEFT + nth * step * scale
        yield f"<path d='M{x:.2f} {y:g}v5' stroke='{_FAINT}'/>"
        text = f"{_number(nth * step)}{_unit(unit)}"
        yield f"<text x='{x:.2f}' y='{y + 18:g}' text-anchor='middle' fill='{_FAINT}'>{text}</text>"


def _boxes(spans: Iterable[Span]) -> Iterator[Span]:
    return (span for span in spans if span.action.kind in COMPUTE)


def _tick(makespan: float, about: int = 12) -> float:
    """The roundest step that gives about so many ticks.

    >>> _tick(117), _tick(0.9)
    (10.0, 0.1)
    """
    if not makespan:
        return 0.0
    power = 10.0 ** math.floor(math.log10(makespan / about))
    steps = (power * round_number for round_number in (1, 2, 5, 10))
    return next(step for step in steps if step * about * 1.4 >= makespan)


def _paler(colour: str, part: float) -> str:
    """A colour on its way to white; ``part`` 1 would be most of the way.

    >>> _paler("#0072B2", 0), _paler("#000000", 1)
    ('#0072b2', '#b2b2b2')
    """
    channels = bytes.fromhex(colour[1:])
    mixed = (round(channel + (255 - channel) * 0.7 * part) for channel in channels)
    return "#" + bytes(mixed).hex()


def _luminance(colour: str) -> float:
    red, green, blue = (channel / 255 for channel in bytes.fromhex(colour[1:]))
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


def _number(value: float) -> str:
    return f"{value:.4g}"


def _unit(unit: str) -> str:
    return f" {escape(unit)}" if unit else ""


def _bytes(count: float) -> str:
    """A number of bytes for people.

    >>> _bytes(512), _bytes(3 * 2**30)
    ('512 B', '3 GiB')
    """
    for name in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or name == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {name}"
