"""Rows of a sweep as the tests of the report need them."""

import json
from pathlib import Path

MIB = 1 << 20
# plan -> MiB at 8 blocks, milliseconds, growth of temporaries with depth
PLANS = {
    "none": (400, 50.0, 1.0),
    "dots": (250, 52.0, 1.0),
    "uniform:4": (260, 66.0, 1.0),
    "full": (120, 60.0, 1.0),
    "sqrt": (80, 70.0, 0.5),
}


def row(plan: str, depth: int = 8, **changes) -> dict:
    """Returns a row whose temporaries are half of its peak."""
    size, milliseconds, growth = PLANS.get(plan, (100, 65.0, 1.0))
    peak = int(size * MIB * (depth / 8) ** growth)
    buffer = {"size_bytes": MIB, "shape": "f32[256,1024]", "operation": "a/b/c/d", "source": ""}
    found = {
        "key": f"{plan}-{depth}",
        "plan": plan,
        "depth": depth,
        "target": "local",
        "device": "cpu",
        "settings": "",
        "peak_bytes": peak,
        "temp_bytes": peak // 2,
        "runtime_peak_bytes": None,
        "step_seconds": milliseconds / 1e3 * depth / 8,
        "step_seconds_spread": None,
        "about": "a Transformer of width 64, batches of 16 x 128 tokens, adamw",
        "date": "2026-01-02",
        "step_seconds_source": "measured",
        "losses": [5.0, 4.5, 4.0],
        "flops": 125,
        "recomputed_flops": 0 if plan == "none" else 25,
        "buffers": [buffer, buffer | {"size_bytes": 2 * MIB, "source": "/a/b/model.py:7"}],
        "train_command": f"python -m experiments.train --remat={plan} --num-blocks={depth}",
        "versions": {"jax": "0.10.2", "jaxckpt": "0.1.0"},
        "commit": "0123456789abcdef",
    }
    return found | changes


def write(folder: Path, rows: list[dict | str]) -> Path:
    """Writes a sweep's folder; a row that is text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder
