"""python -m funcpipe: tables, pictures, and errors that say what to write."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from funcpipe.__main__ import main
from funcpipe._src.schedule import from_csv, zb_v
from funcpipe._src.schedule.catalogue import NAMES

SIZES = ("--pipe", "4", "--microbatches", "8")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_schedule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("x.svg", "x.html", "x.json", "x.csv"):
        assert main(["schedule", "zb-v", *SIZES, "--save", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "step 25.5, 24 in steady state, bubble 5.9%, memory 1.00 of 1F1B's, 96 messages" in out
    assert len([line for line in out.splitlines() if line.startswith("rank 3 |")]) == 4
    ET.parse(tmp_path / "x.svg")
    assert from_csv(tmp_path / "x.csv")(4, 8).placement == zb_v()(4, 8).placement


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", name, *SIZES]) == 0
    assert f"{name}" in capsys.readouterr().out


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--pipe", "8", "--microbatches", "32"]) == 0
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    ]
    found = {row[0]: row[1:] for row in rows}
    assert found["one_f_one_b"] == ["1", "117", "117", "17.9%", "1.00", "448"]
    assert found["interleaved_1f1b(v=4)"] == ["4", "101.2", "101.2", "5.2%", "1.22", "1984"]
    assert found["zb_v"] == ["2", "99.5", "96", "3.5%", "1.00", "896"]
    assert found["v_half"] == ["2", "106", "106", "9.4%", "0.62", "896"]
    assert found["v_min"] == ["2", "109.5", "109.5", "12.3%", "0.50", "896"]


def test_costs_and_transfers(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "schedule",
                "gpipe",
                "--pipe",
                "2",
                "--microbatches",
                "3",
                "--costs",
                "1",
                "2",
                "3",
                "--transfer",
                "0.5",
            ]
        )
        == 0
    )
    # The first F; three F of rank 1, with a receive ahead of each; its first B, of 5; three B of
    # rank 0, with a receive ahead of each.
    assert "step 27," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["schedule", "zbv", *SIZES], "no schedule is called 'zbv'; did you mean zb_v?"),
        (["schedule", "zb_v", "--v", "3", *SIZES], "zb_v has a fixed number of stages a rank"),
        (
            ["schedule", "gpipe", "--pipe", "0", "--microbatches", "3"],
            "needs at least 1 rank and 1 microbatch",
        ),
        (["schedule", "gpipe", *SIZES, "--save", "x.png"], "cannot draw a plan as '.png'"),
        (["compare", *SIZES, "--v", "0"], "a rank holds at least 1 stage, got v=0"),
    ],
)
def test_refused_stacks(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert text in " ".join(capsys.readouterr().out.split())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["schedule", "--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "python -m funcpipe compare --pipe 8 --microbatches 32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["schedule", "zb_v"])
    assert caught.value.code == 2
