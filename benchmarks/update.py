"""The optimizer's step inside the backward pass beside a separate step: memory and time, in pairs.

    python -m benchmarks.update --output docs/measured/update_h200.json

There are two cases, each in a fresh process: a stack of 24 blocks 2048 x 8192 in float32, and
Qwen3-0.6B's shape at 8 x 1024. A process compiles every variant and runs the variants in turn, so
that both times of a ratio are measured in one process. Weights after the first steps are compared.
Takes less than five minutes on an H200.
"""

import sys
from pathlib import Path

from benchmarks.record import Record, rows_of
from benchmarks.result import Result, Row, console
from experiments.cli import main

CASES = ("stack", "qwen3")
_LIMIT = 140  # seconds for each process


def update(*, tiny: bool = False, output: Path | None = None):
    """Compare the step inside the backward pass with the separate step, and print a table.

    Args:
      tiny: Small shapes, to try the benchmark.
      output: JSON file to write.
    """
    rows: list[Row] = []
    record = Record("update", output, rows)
    for case in CASES:
        for row in rows_of("update_parts.process", _LIMIT, case, tiny):
            rows.append({"case": case, **row})
            print(rows[-1], flush=True)
            record.save()
    Result(title="update in backward", rows=rows, table=shown(rows)).print(console(140))
    sys.exit(any("error" in row for row in rows))


def shown(rows: list[Row]) -> list[Row]:
    """Returns the table: each variant beside the separate step of its case."""
    found = []
    for row in rows:
        if "error" in row:
            found.append({"case": row["case"], "variant": row["error"][:60]})
            continue
        first = next(one for one in rows if one["case"] == row["case"])
        found.append(
            {
                "case": row["case"],
                "variant": row["variant"],
                "peak MiB": row["peak_bytes"] / 2**20,
                "of separate": row["peak_bytes"] / first["peak_bytes"],
                "ms": row["milliseconds"],
                "time of separate": row["milliseconds"] / first["milliseconds"],
                "weights off by": row["weights_off_by"],
                "compile s": row["compile_seconds"],
            }
        )
    return found


if __name__ == "__main__":
    main(update, package="benchmarks")
