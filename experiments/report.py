"""Rows of sweeps and runs as one HTML page that needs no network, and as a figure.

python -m experiments.report sweeps/small -o report.html
python -m experiments.report runs/full runs/sqrt -o report.html --figure report.svg
"""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments import files, plotting
from experiments.cli import main
from experiments.config import ConfigError
from experiments.reporting import groups, page, reading
from experiments.training.display import waiting


def report(
    runs: Annotated[
        tuple[Path, ...],
        Parameter(help="Folders of sweeps and of runs, or folders that hold them."),
    ] = (),
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"), help="HTML file to write.")],
    figure: Annotated[Path | None, Parameter(help="Also write a figure: .svg or .png.")] = None,
    title: Annotated[str, Parameter(help="Title of the page.")] = (
        "Plans of activation checkpointing"
    ),
):
    """Write a page with memory against time, memory against depth, largest buffers and losses."""
    if not runs:
        raise ConfigError(f"name at least one folder of a sweep or a run; {reading.CURE}")
    files.check_output(out, (".html", ".htm"))
    if figure is not None:
        files.check_output(figure, plotting.FIGURES)
        plotting.import_matplotlib()
    with waiting("reading rows"):
        found = reading.read_all(runs)
    for line in found.skipped:
        print(f"warning: {line}", file=sys.stderr)
    grouped = groups.groups_of(found.points)
    lines = groups.lines_of(grouped)
    files.write_text(out, page.page(found, grouped, lines, title))
    if figure is not None:
        from experiments.reporting import figure as figures

        with waiting("drawing the figure"):
            plotting.save(figures.draw(grouped, lines, title), figure)
    counts = f"{len(found.points)} rows shown, {len(found.failed)} that failed listed"
    print(f"{out}: {counts}, {len(found.skipped)} skipped" + (f"; {figure}" if figure else ""))


if __name__ == "__main__":
    main(report)
