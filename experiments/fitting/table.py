"""The table that `experiments.fit` prints: a row for each plan, the fastest first."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.config import TrainConfig
from experiments.fitting.row import FitRow
from experiments.training.choose_plan import excess
from jaxckpt.memory.findings import peak_not_below_none
from jaxckpt.units import iec

_NEVER, _WIDTH = float("inf"), 140
_BESIDE_PLAN = 100  # columns


def show(rows: Sequence[FitRow], settings: TrainConfig, largest: str | None = None):
    """Prints a table for each target, then what was found and what went wrong."""
    # A narrow terminal folds lines; columns are never cut.
    longest = max(len(row.config.remat) for row in rows)
    width = max(Console().width, _WIDTH, longest + _BESIDE_PLAN)
    console = Console(highlight=False, soft_wrap=True, width=width)
    for target in dict.fromkeys(row.target for row in rows):
        mine = [row for row in rows if row.target == target]
        measured = [row for row in mine if row.report is not None]
        if measured:
            console.print(_title(measured[0], settings, largest))
            console.print(_table(ranked(measured), largest))
        for row in measured:
            if row.auto is not None:
                text = str(row.auto) if settings.explain else row.auto.summary
                console.print(text, markup=False)
        too_much = excess(mine[0].budget_bytes, target)
        if too_much is not None:
            console.print(f"warning: {too_much}", markup=False)
        for row, finding in _findings(measured, largest):
            console.print(f"warning: {row.config.remat} on {target}: {finding}", markup=False)
        for row in mine:
            if row.error is not None:
                where = "" if row.infeasible else f"{row.config.remat} on {target}: "
                console.print(f"error: {where}{row.error}", markup=False)


def ranked(rows: Sequence[FitRow]) -> list[FitRow]:
    """Returns the rows by estimated time, where that is not known by what is run again."""

    def cost(row: FitRow):
        report = row.measured
        seconds = _NEVER if report.estimated_seconds is None else report.estimated_seconds
        return seconds, row.recomputed or 0.0, report.peak_bytes

    return sorted(rows, key=cost)


def best(rows: Sequence[FitRow]) -> FitRow | None:
    """Returns the first of ranked rows that fits, if any does."""
    return next((row for row in rows if row.fits), None)


def _title(row: FitRow, settings: TrainConfig, largest: str | None) -> str:
    report, model = row.measured, settings.model
    batch, size = (
        "?" if name == largest else getattr(settings, name.replace("-", "_"))
        for name in ("batch-size", "seq-len")
    )
    usable = "" if report.usable_bytes is None else f", {iec(report.usable_bytes)} usable a device"
    mesh = "" if settings.mesh is None else f", mesh {settings.mesh_shape}"
    if row.budget_bytes is not None:
        usable += f", a budget of {iec(row.budget_bytes)}"
    if row.host_budget_bytes is not None:
        usable += f", of the host {iec(row.host_budget_bytes)}"
    return (
        f"{report.target}{mesh}{usable}: {model.num_blocks} blocks of width {model.d_model}, "
        f"batch {batch} x {size} tokens, {settings.optimizer.kind}, jax {report.jax_version}"
    )


def _table(rows: Sequence[FitRow], largest: str | None) -> Table:
    chosen = None if largest else best(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("plan", no_wrap=True)
    columns = ("peak GiB", "host GiB", "left GiB", "run again", "est. ms", "compiled s")
    if any(row.measured.collective_seconds is not None for row in rows):
        columns = (*columns[:5], "sending ms", *columns[5:])
    for name in ([largest] if largest else []) + list(columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        report = row.measured
        size = [str(row.size) if row.size else "none fits"] if largest else []
        verdict = "fastest that fits" if row is chosen else "does not fit" * (row.fits is False)
        verdicts = [text for text in ("auto" * (row.auto is not None), verdict) if text]
        table.add_row(
            row.config.remat,
            *size,
            _number(report.peak_bytes, 2**30),
            _number(report.host_bytes or None, 2**30),
            _number(row.left_bytes, 2**30),
            _number(row.recomputed, 0.01, "{:.1f} %"),
            _number(report.estimated_seconds, 1e-3, "{:.1f}"),
            *([_number(report.collective_seconds, 1e-3, "{:.1f}")] * ("sending ms" in columns)),
            _number(report.compile_seconds, 1, "{:.1f}"),
            ", ".join(verdicts),
            style="bold" if row is chosen else None,
        )
    return table


def _number(value: float | None, unit: float, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value / unit)


def _findings(rows: Sequence[FitRow], largest: str | None):
    """Yields each row with each of its findings, the comparison with `none` included.

    What was not understood of the compiler's texts is one of them.
    """
    is_none = lambda row: all(stage.schedule == "none" for stage in row.config.plan.stages)
    nones = [row.measured for row in rows if is_none(row)]
    for row in rows:
        yield from ((row, finding) for finding in row.measured.findings)
        if not row.measured.understood.is_all:
            yield row, str(row.measured.understood)
        if nones and not largest:
            found = peak_not_below_none(row.config.remat, row.measured, nones[0])
            yield from ((row, str(finding)) for finding in found)
