"""The table that `experiments.fit` prints: a row for each plan, the fastest first."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.config import TrainConfig
from experiments.fitting.row import FitRow
from experiments.training.choose_plan import excess
from jaxckpt.memory.finding import peak_not_below_none
from jaxckpt.targets.target import parse_target
from jaxckpt.units import iec

_NEVER, _WIDTH = float("inf"), 140
_BESIDE_PLAN = 100  # columns


def show(rows: Sequence[FitRow], settings: TrainConfig, largest: str | None = None):
    """Prints a table for each target, with its findings and errors."""
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
                if flags := _more_flags(row.config, settings):
                    console.print(f"  flags      {flags}", markup=False)
        too_much = excess(mine[0].budget_bytes, target)
        if too_much is not None:
            console.print(f"warning: {too_much}", markup=False)
        for row, finding in _findings(measured, largest):
            console.print(f"warning: {row.config.remat} on {target}: {finding}", markup=False)
        for row in mine:
            if row.error is not None:
                where = "" if row.infeasible else f"{row.config.remat} on {target}: "
                console.print(f"error: {where}{row.error}", markup=False)


def _more_flags(config: TrainConfig, settings: TrainConfig) -> str:
    """Returns the flags that the step needs in addition to its plan and the given settings."""
    flags = []
    if config.model.mlp_tiles != settings.model.mlp_tiles:
        flags.append(f"--mlp-tiles={config.model.mlp_tiles}")
    if config.update_in_backward and not settings.update_in_backward:
        flags.append("--update-in-backward")
    return " ".join(flags)


def ranked(rows: Sequence[FitRow]) -> list[FitRow]:
    """Returns the rows by estimated time; without an estimate by recomputed FLOPs."""

    def cost(row: FitRow):
        report = row.measured
        seconds = _NEVER if report.estimated_seconds is None else report.estimated_seconds
        return seconds, report.recomputed_share or 0.0, report.peak_bytes

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
    usable = "" if report.usable_bytes is None else f", {_usable(row)}"
    mesh = "" if settings.mesh is None else f", mesh {settings.mesh_shape}"
    if row.budget_bytes is not None:
        usable += f", a budget of {iec(row.budget_bytes)}"
    if row.host_budget_bytes is not None:
        usable += f", and {iec(row.host_budget_bytes)} of the host"
    return (
        f"{report.target}{mesh}{usable}: {model.num_blocks} blocks of width {model.d_model}, "
        f"batch {batch} x {size} tokens, {settings.optimizer.kind}, jax {report.jax_version}"
    )


def _usable(row: FitRow) -> str:
    target = parse_target(row.target)
    text = f"{iec(row.measured.usable_bytes or 0)} usable per device"
    if target.chip is None or target.backend != "cuda":
        return text
    share = target.chip.usable_bytes / target.chip.memory_bytes
    return f"{text} ({100 * share:.0f} % of {iec(target.chip.memory_bytes)}, what JAX preallocates)"


def _table(rows: Sequence[FitRow], largest: str | None) -> Table:
    """Returns the table; a column that is empty in every row is left out."""
    chosen = None if largest else best(rows)
    fastest = chosen or rows[0]
    columns: dict[str, list[str]] = {
        "plan": [row.config.remat for row in rows],
        "": [_verdict(row, is_chosen=row is chosen) for row in rows],
        largest or "size": [_number(row.size or None, "{:d}") for row in rows],
        "peak": [iec(row.measured.peak_bytes) for row in rows],
        "on the host": [
            iec(row.measured.host_bytes) * bool(row.measured.host_bytes) for row in rows
        ],
        "left": [_bytes(row.left_bytes) for row in rows],
        "recomputed": [_number(row.measured.recomputed_share, "{:.1f} %", 100) for row in rows],
        "est. ms": [_number(row.measured.estimated_seconds, "{:,.4g}", 1e3) for row in rows],
        "against fastest": [_beside(row, fastest) * (not largest) for row in rows],
        "sending ms": [_number(row.measured.collective_seconds, "{:,.1f}", 1e3) for row in rows],
    }
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown = {name: texts for name, texts in columns.items() if any(texts)}
    for name in shown:
        table.add_column(name, justify="left" if name in ("plan", "") else "right", no_wrap=True)
    for row, *texts in zip(rows, *shown.values(), strict=True):
        table.add_row(*texts, style="bold" if row is chosen else None)
    return table


def _verdict(row: FitRow, *, is_chosen: bool) -> str:
    """Returns whether a row fits, in green or red where there are colours."""
    if row.size == 0:
        return "[red]none fits[/]"
    if row.fits is None:
        return ""
    text = "fastest" if is_chosen else "fits" if row.fits else "too large"
    text += " (auto)" * (row.auto is not None)
    return f"[{'green' if row.fits else 'red'}]{text}[/]"


def _beside(row: FitRow, fastest: FitRow) -> str:
    """Returns how much longer a step takes than the fastest step that fits; empty if unknown."""
    seconds, least = row.measured.estimated_seconds, fastest.measured.estimated_seconds
    if not seconds or not least or row is fastest:
        return ""
    return f"{100 * (seconds / least - 1):+.1f} %"


def _bytes(size: int | None) -> str:
    return "" if size is None else iec(size)


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)


def _findings(rows: Sequence[FitRow], largest: str | None):
    """Yields each row with each of its findings, and with a count of lines that XLA's reader skips.

    The comparison with `none` comes last, as one finding for all plans that save nothing.
    """
    is_none = lambda row: all(stage.schedule == "none" for stage in row.config.plan.stages)
    nones = [row.measured for row in rows if is_none(row)]
    for row in rows:
        yield from ((row, finding) for finding in row.measured.findings)
        if not row.measured.understood.is_enough:
            yield row, str(row.measured.understood)
    if nones and not largest:
        compared = (
            (row, peak_not_below_none(row.config.remat, row.measured, nones[0])) for row in rows
        )
        idle = [(row, *found) for row, found in compared if found]
        for row, finding in idle[:1]:
            others = ", ".join(other.config.remat for other, _ in idle[1:])
            yield row, f"{finding}{others and f'; the same holds for {others}'}"
