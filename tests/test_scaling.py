"""The scaling benchmark: every row can be asked for, and the page is made from the file."""

import json

from benchmarks import scaling
from benchmarks.record import section


def test_every_row_is_a_valid_configuration():
    for size in scaling._SHAPES:
        for target in scaling.V5E + scaling.H100:
            config = scaling.config_of(size, target, "auto")
            devices = 1 if config.mesh is None else config.mesh_shape.size
            assert config.batch_size == devices


def test_the_page_is_made_from_the_file():
    made = json.loads(scaling.OUTPUT.read_text())
    text = section(scaling._table(made["rows"]), made)
    assert text in scaling.PAGE.read_text()


def test_of_several_plans_the_fastest_that_fits_is_shown():
    shared = {"model": "8B", "target": "v5e-16", "mesh": "fsdp=16", "collective_seconds": 0.1}
    row = lambda plan, gib, seconds, fits: (
        shared
        | {
            **{"asked": plan, "plan": plan, "peak_bytes": gib << 30, "fits": fits},
            "step_seconds": seconds,
        }
    )
    rows = [row("none", 20, 1.0, False), row("full", 9, 1.5, True), row("sqrt", 7, 1.8, True)]
    assert [shown["plan"] for shown in scaling._table(rows).rows] == ["`full`"]
    (shown,) = scaling._table(rows[:1]).rows
    assert (shown["plan"], shown["peak GiB"]) == ("none fits", "20.00")
