"""The memory per device and the time of a step, from one chip to many: made by compiling.

    python -m benchmarks.scaling --target v5e-16 --target h100-8 --plan auto
    python -m benchmarks.scaling --write                 # the table in docs/scaling.md

Weak scaling of Qwen3's shapes: one sequence of 4096 tokens per device, AdamW on all parameters. Up
to 64 TPUs, or the eight GPUs of a host, are one `fsdp` axis; more devices add the axis `data`. Each
answer is written to `docs/measured/scaling.json` at once, and is not computed again.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.cases import QWEN3
from benchmarks.record import HOST, origin, write_section
from benchmarks.record import write as write_record
from benchmarks.result import Result
from experiments.cli import main
from experiments.config import TrainConfig
from experiments.files import ROOT
from experiments.fitting.measuring import measure_all
from jaxckpt.models.config import TransformerConfig
from jaxckpt.targets.target import parse_target

OUTPUT = ROOT / "docs" / "measured" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"
V5E = tuple(f"v5e-{n}" for n in (1, 4, 8, 16, 32, 64, 128, 256))
H100 = ("h100", *(f"h100-{n}" for n in (2, 4, 8, 16, 32, 64)))
SEQ_LEN = 4096
_FSDP = {"tpu": 64, "cuda": 8}
_SHAPES = {  # blocks, width, heads, width of the MLP, tied embeddings
    "0.6B": (28, 1024, 16, 3072, True),
    "1.7B": (28, 2048, 16, 6144, True),
    "4B": (36, 2560, 32, 9728, True),
    "8B": (36, 4096, 32, 12288, False),
}


def model_of(size: str) -> TransformerConfig:
    """Returns Qwen3's published shape of a size, such as `"8B"`."""
    num_blocks, d_model, num_heads, d_ff, tied = _SHAPES[size]
    return dataclasses.replace(
        QWEN3,
        num_blocks=num_blocks,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
        tied_embeddings=tied,
    )


def mesh_of(target: str) -> str | None:
    """Returns the mesh of a target; None for one device."""
    chips = parse_target(target)
    fsdp = min(chips.num_devices, _FSDP[chips.backend])
    return None if fsdp == 1 else f"data={chips.num_devices // fsdp},fsdp={fsdp}"


def config_of(size: str, target: str, plan: str) -> TrainConfig:
    """Returns the configuration of a row."""
    return TrainConfig(
        model=model_of(size),
        mesh=mesh_of(target),
        seq_len=SEQ_LEN,
        batch_size=parse_target(target).num_devices,
        remat=plan,
        budget="auto",
    )


def scaling(
    *,
    target: tuple[str, ...] = V5E + H100,
    model: tuple[str, ...] = tuple(_SHAPES),
    plan: tuple[str, ...] = ("auto",),
    output: Path = OUTPUT,
    write: bool = False,
):
    """Compile the missing rows; with several plans, the table has the fastest one that fits."""
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"rows": []}
    if write:
        write_section(_table(record["rows"]), record, PAGE)
        return
    for size, place, one in [(m, t, p) for m in model for t in target for p in plan]:
        asked = {"model": size, "target": place, "asked": one}
        if any(asked.items() <= row.items() for row in record["rows"]):
            continue
        found = measure_all([(config_of(size, place, one), place)])[0].as_json()
        found.pop("auto", None)
        row = asked | {"mesh": mesh_of(place)} | found
        if "error" in row and "least_bytes" not in row:
            print(f"{size} on {place} under {one}: {row['error']}")
            continue  # a failure that is not about memory is tried again next time
        record["rows"].append(row)
        # The record has rows of many calls, so that its command is without options.
        about = {"command": "python -m benchmarks.scaling", "device": "no chip"}
        record |= origin("scaling", HOST) | about
        write_record(record, output)
        print(json.dumps(row), flush=True)


def _table(rows: list[dict]) -> Result:
    shown, missing = [], []
    for size in _SHAPES:
        for place in V5E + H100:
            mine = [row for row in rows if (row["model"], row["target"]) == (size, place)]
            shown += [_best(mine)] if mine else []
            missing += [] if mine else [f"{size} on {place}"]
    notes = [", ".join(missing)] if missing else []
    return Result(title="weak scaling", rows=shown, notes=notes)


def _best(rows: list[dict]) -> dict:
    """Returns the table's row of one model and target: the fastest plan that fits."""
    fitting = [row for row in rows if row.get("fits")]
    row = min(fitting, key=lambda row: row["step_seconds"]) if fitting else None
    gib = 2**30
    first = {"model": rows[0]["model"], "target": rows[0]["target"], "mesh": rows[0]["mesh"] or "-"}
    if row is None:
        least = min(row.get("least_bytes") or row["peak_bytes"] for row in rows)
        return first | {"plan": "none fits", "peak GiB": f"{least / gib:.2f}"}
    seconds, sending = row["step_seconds"], row["collective_seconds"]
    return first | {
        "plan": f"`{row['plan']}`",
        "peak GiB": f"{row['peak_bytes'] / gib:.2f}",
        "estimated ms": f"{1e3 * seconds:.0f}",
        "of it sending": "-" if sending is None else f"{1e3 * sending:.0f}",
        "tokens/s a device": f"{SEQ_LEN / seconds:,.0f}",
        "plans tried": len(rows) if row["asked"] != "auto" else "auto",
    }


if __name__ == "__main__":
    main(scaling, package="benchmarks")
