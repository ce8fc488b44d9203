"""Tables of the documentation, made from docs/measured/ and from the library's own data.

    print(TABLES["targets"]())

Each table is a function that yields rows: dicts from a column's name to a cell's text. `pages.py`
puts the table into its page as Markdown. JAX is not imported, so that the pages can be built
without it.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.planner_parts.bounds import figures
from benchmarks.result import grid, markdown
from benchmarks.rivals_parts.bounds import compared
from jaxckpt.targets.chips import CHIPS

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "docs" / "measured"
TABLES: dict[str, Callable[[], str]] = {}

# The step benchmark's cases of other libraries, and their names in docs/speed.md.
_PEERS = {
    "short: torch.compile": "torch.compile",
    "short: torch.compile, budget 0.5": "torch.compile, activation memory budget 0.5",
    "short: torch.compile, budget 0.1": "torch.compile, activation memory budget 0.1",
    "short: torch.compile + checkpoint": "torch.compile and Hugging Face's checkpointing",
    "long: torch + checkpoint": "eager PyTorch and Hugging Face's checkpointing",
}
_OURS = ("short: fastest", "short: kept", "short: none", "short: attention", "short: full")
_STEPS = (*_OURS, *list(_PEERS)[:4], "long: attention", *list(_PEERS)[4:])
_GAIN = {
    "gain: none, in a loop": "`none`, in a loop",
    "gain: none": "`none`, unrolled",
    "gain: kept": "`full+attention+names:q,k,v,mid,gate,up`",
    "gain: attention": "`attention`",
    "gain: full": "`full`",
    "gain: torch.compile": "PyTorch, torch.compile",
}


def load(name: str) -> dict:
    """Returns a record of docs/measured/."""
    return json.loads((MEASURED / name).read_text())


def gib(size: int) -> str:
    """Returns bytes in GiB."""
    return f"{size / 2**30:.2f}"


def ms(seconds: float) -> str:
    """Returns seconds in milliseconds."""
    return f"{1e3 * seconds:.1f}"


def _code(text: str) -> str:
    return f"`{text}`"


def _batch(row: dict) -> str:
    return f"{row['batch_size']} x {row['seq_len']}"


def _table(name: str):
    """Returns a decorator that puts a function's rows into `TABLES`, as a Markdown table."""

    def decorate(rows: Callable[[], Iterator[dict[str, Any]]]) -> Callable[[], str]:
        TABLES[name] = functools.wraps(rows)(lambda: markdown(list(rows())))
        return TABLES[name]

    return decorate


@_table("peaks")
def peaks():
    """Compiled peaks beside the runtime's, and estimated times beside measured ones."""
    for row in load("peaks_h100.json")["rows"]:
        yield {
            "plan": _code(row["plan"]),
            "batch": _batch(row),
            "absent, GiB": gib(row["absent_bytes"]),
            "present, GiB": gib(row["present_bytes"]),
            "runtime, GiB": gib(row["runtime_bytes"]),
            "ms a step": ms(row["seconds"]),
            "estimated ms": ms(row["estimated"]),
        }


@_table("plans")
def plans():
    """Each plan of one model on one H100: its peak and its time, fastest first."""
    rows = load("peaks_h100.json")["rows"]
    for batch in dict.fromkeys(map(_batch, rows)):
        mine = sorted((row for row in rows if _batch(row) == batch), key=lambda row: row["seconds"])
        for row in mine:
            yield {
                "batch": batch,
                "plan": _code(row["plan"]),
                "peak, GiB": gib(row["runtime_bytes"]),
                "ms a step": ms(row["seconds"]),
                "to the fastest here": f"{row['seconds'] / mine[0]['seconds']:.2f}",
            }


@_table("long-steps")
def long_steps():
    """Plans at sequences of 16384 tokens, where attention is most of the work."""
    for name, row in load("step_plans_h200.json")["rows"].items():
        if name.startswith("long: ") and "plan" in row["case"]:
            yield {
                "batch": _batch(row["case"]),
                "plan": _code(row["case"]["plan"]),
                "peak, GiB": gib(row["peak_bytes"]),
                "ms a step": ms(row["seconds"]),
                "FLOPs recomputed": f"{row['recomputed_flops'] / row['step_flops']:.0%}",
            }


@_table("steps")
def steps():
    """Whole steps beside PyTorch's."""
    rows = load("step_h200.json")["rows"]
    for name in _STEPS:
        row = rows[name]
        yield {
            "batch x tokens": _batch(row["case"]),
            "step": _PEERS.get(name) or f"ours, {_code(row['case']['plan'])}",
            "ms": ms(row["seconds"]),
            "peak, GiB": gib(row["peak_bytes"]),
        }


@_table("gain")
def gain():
    """Peak and time of plans beside `none`, which keeps everything."""
    rows = load("gain_h200.json")["rows"]
    for name, text in _GAIN.items():
        peak, seconds = rows[name]["peak_bytes"], rows[name]["seconds"]
        yield {"plan": text, "peak, GiB": gib(peak), "ms a step": ms(seconds)}


@_table("t4")
def t4():
    """A step for a T4, compiled on a machine without a T4."""
    for row in load("t4_absent.json")["rows"]:
        again = row["recomputed_flops"] / (row["flops"] - row["recomputed_flops"])
        yield {
            "plan": _code(row["plan"]),
            "peak, GiB": gib(row["peak_bytes"]),
            "fits": "yes" if row["fits"] else "no",
            "FLOPs recomputed": f"{again:.0%}",
            "estimated ms a step": ms(row["step_seconds"]),
        }


@_table("measured")
def measured():
    """Every record, the command that made it and the device it ran on."""
    for path in sorted(MEASURED.glob("*.json")):
        found = load(path.name)
        yield {
            "record": _code(path.name),
            "command": _code(found.get("command", "?")),
            "device": found.get("device", ""),
            "versions": ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items()),
        }


@_table("targets")
def targets():
    """Every chip that a step can be compiled for, with the sources of its figures."""
    for chip in CHIPS.values():
        yield {
            "chip": _code(chip.name),
            "memory, GiB": gib(chip.memory_bytes),
            "usable, GiB": gib(chip.usable_bytes),
            "bf16, TFLOP/s": f"{chip.bf16_flops_per_second / 1e12:g}",
            "memory, GB/s": f"{chip.memory_bytes_per_second / 1e9:g}",
            "host, GB/s": f"{chip.host_bytes_per_second / 1e9:g}",
            "figures from": chip.source,
        }


@_table("slices")
def slices():
    """The targets of each chip: TPU slices by their Google Cloud names, GPUs of one host."""
    for chip in CHIPS.values():
        of_tpu = ", ".join(f"`{chip.name}-{one.number}`" for one in chip.slices)
        yield {
            "chip": _code(chip.name),
            "JAX devices a chip": chip.devices_per_chip,
            "targets": of_tpu or f"`{chip.name}`, `{chip.name}-2` to `{chip.name}-8`",
        }


@_table("loops")
def loops():
    """Gradients of loops over time on a GPU, with XLA's CUDA graphs for loops and without."""
    found = load("loops_h200.json")["rows"] + load("loops_grid_h200.json")["rows"]
    key_of = lambda row: (row["model"], row["length"], row["method"])
    graphs = {key_of(row): ms(row["seconds"]) for row in found if row["options"]}
    for row in found:
        if row["length"] >= 1000 and not row["options"]:
            yield {
                "loop": row["model"],
                "T": row["length"],
                "method": row["method"],
                "steps run": row["evaluations"] or "not counted",
                "temporaries, MiB": f"{row['temp_bytes'] / 2**20:.2f}",
                "ms": ms(row["seconds"]),
                "ms with graphs": graphs.get(key_of(row), ""),
            }


def rivals() -> str:
    """The planner's answers beside fixed plans, timed in turns; three columns are named `ms`."""
    header = ("GPU", "batch x tokens", "budget, GiB", "the planner's answer", "ms")
    header += ("best fixed plan", "ms", "best of MaxText's", "ms")
    rows = []
    for gpu, name in (("H200", "h200"), ("H200", "h200_16k"), ("H100", "h100")):
        for shape, found in load(f"rivals_{name}.json")["rows"].items():
            for one in compared(found):
                row = [gpu, shape.replace("x", " x "), f"{one['budget GiB']:.2f}"]
                row += [_code(one["plan"]), f"{one['ms']:.1f}"]
                row += [_code(one["best fixed"]), f"{one['its ms']:.1f}"]
                rows.append([*row, _code(one["best of MaxText"]), f"{one['MaxText ms']:.1f}"])
    return grid(header, rows)


TABLES["planner-rivals"] = rivals


@_table("planner-answers")
def answers():
    """The planner's answers for absent chips, budget by budget, the smallest last."""
    tera = lambda flops: "-" if flops is None else f"{flops / 1e12:.2f} T"
    for row in load("planner_absent.json")["rows"]:
        yield {
            "part": row["part"],
            "budget, GiB": gib(row["budget_bytes"]),
            "compiled, GiB": gib(row["compiled_bytes"]),
            "predicted": f"{row['predicted_bytes'] / row['compiled_bytes'] - 1:+.2%}",
            "FLOPs recomputed": tera(row["recomputed_flops"]),
            "plan": _code(row["plan"]),
            "cheapest fixed plan": _code(row["fixed_plan"]) if row["fixed_plan"] else "-",
            "its FLOPs recomputed": tera(row["fixed_recomputed_flops"]),
        }


@_table("planner-bounds")
def planner_bounds():
    """The planner's bounds for absent chips, a row for each part."""
    for one in figures(load("planner_absent.json")["rows"]):
        yield {
            "part": one["part"],
            "budgets": one["budgets"],
            "off in the median": one["median"],
            "off at worst": one["worst"],
            "compilations at most": one["compiles"],
            "planned beside them in": one["planned"],
            "bounds that do not hold": one["failures"] or "none",
        }
