"""Pictures: well-formed, complete, escaped, and readable rows."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.schedule_tables import library, table

from funcpipe._src.schedule import (
    Schedule,
    check,
    interleaved_zb,
    one_f_one_b,
    timeline,
    unit_costs,
)
from funcpipe._src.viz.svg import timeline_html, timeline_svg, timeline_text

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg: str) -> list[ET.Element]:
    return [
        element
        for element in ET.fromstring(svg).iter(f"{SVG}rect")
        if element.get("class") == "box"
    ]


@given(library(ranks=6, microbatches=12))
def test_every_action_is_a_box_inside_the_picture(schedule: Schedule) -> None:
    svg = timeline_svg(timeline(schedule, unit_costs()))
    drawn = boxes(svg)
    assert len(drawn) == check(schedule).actions
    assert all(float(b.get("width", 0)) > 0 and float(b.get("x", -1)) >= 0 for b in drawn)
    assert max(float(b.get("x", 0)) + float(b.get("width", 0)) for b in drawn) <= 1120.01


def test_title_and_facts() -> None:
    svg = timeline_svg(timeline(one_f_one_b()(8, 32), unit_costs()), title="a < b & c", unit="ms")
    texts = [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]
    assert texts[:2] == ["a < b & c", "8 ranks · 32 microbatches · 117 ms · bubble 17.9%"]
    assert {"F forward", "B backward", "bubble", "rank 7", "100 ms", "82% busy"} <= set(texts)
    assert not {"W weight gradient", "memory"} & set(texts)


def test_kinds_have_colours_of_their_own() -> None:
    """F, I and W of the first and of the second stage of a rank: six different colours."""
    svg = timeline_svg(timeline(interleaved_zb(2)(2, 4), unit_costs()))
    assert len({box.get("fill") for box in boxes(svg)}) == 6


def test_memory() -> None:
    line = timeline(table("0F0 0B0"), unit_costs())
    svg = timeline_svg(line, memory=[[(0.0, 0.0), (1.0, 3 * 2**30), (2.0, 2**30)]])
    texts = [element.text for element in ET.fromstring(svg).iter(f"{SVG}text")]
    assert "3 GiB" in texts and "memory" in texts
    assert (
        "M0 50L0.00 50.00L373.33 50.00L373.33 26.00L746.67 26.00L746.67 42.00L1120.00 "
        "42.00L1120.00 50Z" in svg
    )


def test_page() -> None:
    page = timeline_html(
        timeline(table("0F0 0I0 0W0.0 0W0.1"), unit_costs(segments=[2])), unit="ms"
    )
    assert page.startswith("<!doctype html>")
    assert "<title>rank 0: 0W0.1, 2.5 to 3 ms</title>" in page
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "http" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )  # nothing is loaded from anywhere


@given(library(ranks=6, microbatches=12), st.integers(1, 200))
def test_rows_are_as_wide_as_asked(schedule: Schedule, width: int) -> None:
    rows = timeline_text(timeline(schedule, unit_costs()), width).splitlines()
    assert len(rows) == len(schedule.ranks)
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) == width or width < 12


@pytest.mark.parametrize("draw", [timeline_svg, timeline_html, timeline_text])
def test_no_time_at_all(draw) -> None:
    """Costs of zero draw an empty track instead of dividing by zero."""
    assert draw(timeline(table("0F0 0B0"), unit_costs(0, 0, 0)))
