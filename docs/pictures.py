"""Draw the pictures of the documentation: python docs/pictures.py."""

from pathlib import Path

from funcpipe import schedules
from funcpipe._src.viz import svg as picture


def main() -> None:
    table = schedules.one_f_one_b()(4, 8)
    table = schedules.insert_communication(table, schedules.chain(4))
    drawn = picture.timeline_svg(
        schedules.timeline(table, schedules.unit_costs()), title="1F1B: 4 ranks, 8 microbatches"
    )
    Path(__file__).with_name("one_f_one_b.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
