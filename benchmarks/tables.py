"""Tables of the documentation, made from docs/measured/ and from the library's own data.

    print(TABLES["targets"]())

Each is a function without arguments that returns Markdown; `pages.py` puts them into their pages.
No JAX import, so that a page's build needs no accelerator's library.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.planner_parts.bounds import figures
from benchmarks.rivals_parts.bounds import compared
from jaxckpt.targets.chips import CHIPS, Chip

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs" / "measured"
_GIB = 2**30

# Sides of the step benchmark that are not ours, in the words of docs/speed.md.
_PEERS = {
    "short: torch.compile": "torch.compile",
    "short: torch.compile, budget 0.5": "torch.compile, activation memory budget 0.5",
    "short: torch.compile, budget 0.1": "torch.compile, activation memory budget 0.1",
    "short: torch.compile + checkpoint": "torch.compile and Hugging Face's checkpointing",
    "long: torch + checkpoint": "eager PyTorch and Hugging Face's checkpointing",
}
_OURS = ("short: fastest", "short: kept", "short: none", "short: attention", "short: full")
_STEPS = (*_OURS, *list(_PEERS)[:4], "long: attention")


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table."""
    header = tuple(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def load(name: str) -> dict:
    """Returns a record of docs/measured/."""
    return json.loads((MEASURED / name).read_text())


def peaks() -> str:
    """Compiled peaks beside the runtime's, and estimated times beside measured ones."""
    header = ("plan", "batch", "absent, GiB", "present, GiB", "runtime, GiB", "ms a step")
    rows = [
        (
            *(f"`{row['plan']}`", _batch(row)),
            *(gib(row[f"{whose}_bytes"]) for whose in ("absent", "present", "runtime")),
            *(ms(row["seconds"]), ms(row["estimated"])),
        )
        for row in load("peaks_h100.json")["rows"]
    ]
    return markdown((*header, "estimated ms"), rows)


def plans() -> str:
    """Each plan of one model on one H100: what it needs and what it takes, fastest first."""
    rows = load("peaks_h100.json")["rows"]
    found = []
    for batch in dict.fromkeys(map(_batch, rows)):
        mine = [row for row in rows if _batch(row) == batch]
        fastest = min(row["seconds"] for row in mine)
        found += [
            (
                *(batch, f"`{row['plan']}`", gib(row["runtime_bytes"]), ms(row["seconds"])),
                f"{row['seconds'] / fastest:.2f}",
            )
            for row in sorted(mine, key=lambda row: row["seconds"])
        ]
    return markdown(("batch", "plan", "peak, GiB", "ms a step", "to the fastest here"), found)


def long_steps() -> str:
    """Plans at 16384 tokens a row, where attention is most of the work."""
    rows = load("step_plans_h200.json")["rows"].items()
    mine = [row for name, row in rows if name.startswith("long: ") and "plan" in row["case"]]
    header = ("batch", "plan", "peak, GiB", "ms a step", "FLOPs recomputed")
    return markdown(
        header,
        [
            (
                *(_batch(row["case"]), f"`{row['case']['plan']}`"),
                *(gib(row["peak_bytes"]), ms(row["seconds"])),
                f"{row['recomputed_flops'] / row['step_flops']:.0%}",
            )
            for row in mine
        ],
    )


def steps() -> str:
    """Whole steps beside PyTorch's."""
    rows = load("step_h200.json")["rows"]
    names = (*_STEPS, *list(_PEERS)[4:])
    return markdown(
        ("batch x tokens", "step", "ms", "peak, GiB"),
        [
            (
                *(_batch(rows[name]["case"]), _PEERS.get(name) or _ours(rows[name])),
                *(ms(rows[name]["seconds"]), gib(rows[name]["peak_bytes"])),
            )
            for name in names
        ],
    )


_GAIN = {
    "gain: none, in a loop": "`none`, in a loop",
    "gain: none": "`none`, unrolled",
    "gain: kept": "`full+attention+names:q,k,v,mid,gate,up`",
    "gain: attention": "`attention`",
    "gain: full": "`full`",
    "gain: torch.compile": "PyTorch, torch.compile",
}


def gain() -> str:
    """What plans gain over keeping everything."""
    rows = load("gain_h200.json")["rows"]
    found = [(gib(rows[name]["peak_bytes"]), ms(rows[name]["seconds"])) for name in _GAIN]
    return markdown(
        ("plan", "peak, GiB", "ms a step"),
        [(text, *row) for text, row in zip(_GAIN.values(), found, strict=True)],
    )


def t4() -> str:
    """A step for a T4 that is compiled without one."""
    rows = []
    for row in load("t4_absent.json")["rows"]:
        again = row["recomputed_flops"] / (row["flops"] - row["recomputed_flops"])
        fits = "yes" if row["fits"] else "no"
        cells = f"`{row['plan']}`", gib(row["peak_bytes"]), fits, f"{again:.0%}"
        rows.append((*cells, ms(row["step_seconds"])))
    return markdown(("plan", "peak, GiB", "fits", "FLOPs recomputed", "estimated ms a step"), rows)


def measured() -> str:
    """Every record, the command that made it and the device it ran on."""
    rows = []
    for path in sorted(MEASURED.glob("*.json")):
        found = load(path.name)
        versions = ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())
        rows.append(
            (f"`{path.name}`", f"`{found.get('command', '?')}`", found.get("device", ""), versions)
        )
    return markdown(("record", "command", "device", "versions"), rows)


def targets() -> str:
    """Every chip that a step can be compiled for, with the sources of its figures."""
    header = ("chip", "memory, GiB", "usable, GiB", "bf16, TFLOP/s", "memory, GB/s", "host, GB/s")
    return markdown((*header, "figures from"), [_chip_row(chip) for chip in CHIPS.values()])


def slices() -> str:
    """The targets of each chip: TPU slices by their Google Cloud names, GPUs of one host."""
    return markdown(
        ("chip", "JAX devices a chip", "targets"),
        [(f"`{chip.name}`", chip.devices_per_chip, _targets_of(chip)) for chip in CHIPS.values()],
    )


def _chip_row(chip: Chip) -> tuple[str, ...]:
    return (
        *(f"`{chip.name}`", gib(chip.memory_bytes), gib(chip.usable_bytes)),
        f"{chip.bf16_flops_per_second / 1e12:g}",
        f"{chip.memory_bytes_per_second / 1e9:g}",
        f"{chip.host_bytes_per_second / 1e9:g}",
        chip.source,
    )


def _targets_of(chip: Chip) -> str:
    if not chip.slices:
        return f"`{chip.name}`, `{chip.name}-2` to `{chip.name}-8`"
    return ", ".join(f"`{chip.name}-{one.number}`" for one in chip.slices)


def _ours(row: dict) -> str:
    return f"ours, `{row['case']['plan']}`"


def _batch(row: dict) -> str:
    return f"{row['batch_size']} x {row['seq_len']}"


def gib(size: int) -> str:
    """Returns bytes in GiB."""
    return f"{size / _GIB:.2f}"


def ms(seconds: float) -> str:
    """Returns seconds in milliseconds."""
    return f"{1e3 * seconds:.1f}"


def loops() -> str:
    """Gradients of loops over time on a GPU, with XLA's graphs for loops and without."""
    found = load("loops_h200.json")["rows"] + load("loops_grid_h200.json")["rows"]
    found = [row for row in found if row["length"] >= 1000]
    graphs = {(row["model"], row["length"], row["method"]): row for row in found if row["options"]}
    mib = lambda row: f"{row['temp_bytes'] / 2**20:.2f}"
    rows = []
    for row in found:
        key = row["model"], row["length"], row["method"]
        if not row["options"]:
            steps = row["evaluations"] or "not counted"
            with_graphs = ms(graphs[key]["seconds"]) if key in graphs else ""
            rows.append((*key, steps, mib(row), ms(row["seconds"]), with_graphs))
    header = ("loop", "T", "method", "steps run", "temporaries, MiB", "ms", "ms with graphs")
    return markdown(header, rows)


def rivals() -> str:
    """The answers beside fixed plans, timed in turns."""
    header = ("GPU", "batch x tokens", "budget, GiB", "the planner's answer", "ms")
    rows = [
        (
            *(gpu.upper(), shape.replace("x", " x "), f"{one['budget GiB']:.2f}"),
            *(f"`{one['plan']}`", f"{one['ms']:.1f}"),
            *(f"`{one['best fixed']}`", f"{one['its ms']:.1f}"),
            *(f"`{one['best of MaxText']}`", f"{one['MaxText ms']:.1f}"),
        )
        for gpu, name in (("h200", "h200"), ("h200", "h200_16k"), ("h100", "h100"))
        for shape, found in load(f"rivals_{name}.json")["rows"].items()
        for one in compared(found)
    ]
    return markdown((*header, "best fixed plan", "ms", "best of MaxText's", "ms"), rows)


def answers() -> str:
    """The answers for absent chips, budget by budget, the smallest last."""
    header = ("part", "budget, GiB", "compiled, GiB", "predicted", "FLOPs recomputed", "plan")
    rows = [
        (
            *(row["part"], gib(row["budget_bytes"]), gib(row["compiled_bytes"])),
            f"{row['predicted_bytes'] / row['compiled_bytes'] - 1:+.2%}",
            *(_tera(row["recomputed_flops"]), f"`{row['plan']}`"),
            "-" if row["fixed_plan"] is None else f"`{row['fixed_plan']}`",
            _tera(row["fixed_recomputed_flops"]),
        )
        for row in load("planner_absent.json")["rows"]
    ]
    return markdown((*header, "cheapest fixed plan", "its FLOPs recomputed"), rows)


def planner_bounds_table() -> str:
    """How the same answers keep what is promised, a row a part."""
    header = {
        "part": "part",
        "budgets": "budgets",
        "median": "off in the median",
        "worst": "off at worst",
        "compiles": "compilations at most",
        "planned": "planned beside them in",
        "failures": "bounds that do not hold",
    }
    found = figures(load("planner_absent.json")["rows"])
    rows = [tuple((one[name] or "none") for name in header) for one in found]
    return markdown(tuple(header.values()), rows)


def _tera(flops: Any) -> str:
    return "-" if flops is None else f"{flops / 1e12:.2f} T"


TABLES: dict[str, Callable[[], str]] = {
    "gain": gain,
    "long-steps": long_steps,
    "loops": loops,
    "measured": measured,
    "peaks": peaks,
    "plans": plans,
    "slices": slices,
    "steps": steps,
    "t4": t4,
    "targets": targets,
    "planner-answers": answers,
    "planner-bounds": planner_bounds_table,
    "planner-rivals": rivals,
}
