"""What XLA's options are worth for a step on the GPU that is present, one at a time.

    python -m benchmarks.xla_options --output docs/measured/xla_options_h200.json

The step is Qwen3-0.6B's at 8 x 1024 under a plan. Each option is tried in a fresh process, and
added to the options of every run (`experiments/training/compilation.py`). The step without an
option is timed again after every few options: a gain has to be larger than the spread of these
times. An option that this XLA does not know is a row with an error. A row that the output already
has from this GPU is not run again.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from benchmarks import cases
from benchmarks.cases import KEPT, SHORT
from benchmarks.record import Record, kept, rows_of, with_flags
from benchmarks.result import Row
from benchmarks.step import gpu
from experiments.cli import main
from jaxckpt.plans import Plan

_BASE = ""
_BASE_EVERY = 4
_NAMES = ("seconds", "peak_bytes", "compile_seconds", "device", "versions", "error", "traceback")
OPTIONS = (
    "--xla_gpu_enable_command_buffer=",
    "--xla_gpu_command_buffer_scheduling_mode=SERIALIZE",
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "--xla_gpu_enable_pdl=true --xla_gpu_enable_pdl_launch=true",
    "--xla_gpu_enable_dynamic_slice_fusion=true",
    "--xla_gpu_experimental_enable_tiling_propagation=true",
    "--xla_gpu_experimental_enable_same_shape_multi_output_fusion=true",
    "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
    "--xla_gpu_native_emitter_tune_unroll_factor_for_loops=true",
    "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "--xla_gpu_experimental_enable_fusion_block_level_rewriter=true",
    "--xla_gpu_experimental_enable_triton_warp_specialization=true",
    "--xla_gpu_experimental_gemm_fusion_v2=true",
    "--xla_gpu_cudnn_gemm_fusion_level=1",
    "--xla_gpu_enable_cublaslt=false",
)


def xla_options(
    *,
    option: Annotated[tuple[str, ...], Parameter(allow_leading_hyphen=True)] = OPTIONS,
    plan: str = KEPT,
    output: Path | None = None,
    tiny: bool = False,
):
    """Time the step under each option; exit with 1 if none could be timed.

    Args:
      option: One or more options, written as in `XLA_FLAGS`; may be given several times.
      plan: The plan of the blocks.
      output: JSON file to write; an interrupted run continues from it.
      tiny: A small model, on any device, to try the script.
    """
    Plan.parse(plan)
    about = {"case": (cases.tiny(SHORT) if tiny else SHORT) | {"plan": plan}, "gpu": gpu()}
    rows = [row for row in kept(output) or [] if about.items() <= row.items()]
    record = Record("xla_options", output, rows)
    known = {one["options"] for one in rows} - {_BASE}
    for options in _turns([one for one in option if one not in known]):
        *_, found = rows_of("step_jax", about["case"], environment=with_flags(options))
        row = {name: found[name] for name in _NAMES if name in found}
        rows.append(about | {"options": options} | row)
        print(_line(rows[-1]), flush=True)
        record.save()
    print("\n".join(compared(rows)))
    raise SystemExit(all("error" in row for row in rows))


def _turns(options: list[str]) -> Iterator[str]:
    """Yields the options, and none before the first, after every few and after the last."""
    for place, one in enumerate(options):
        if place % _BASE_EVERY == 0:
            yield _BASE
        yield one
    if options:
        yield _BASE


def compared(rows: list[Row]) -> Iterator[str]:
    """Yields a line for each option: its time as a share of the step's without one."""
    base = [row["seconds"] for row in rows if row["options"] == _BASE and "error" not in row]
    if not base:
        return
    middle = statistics.median(base)
    spread = f"{min(base) / middle - 1:+.1%} to {max(base) / middle - 1:+.1%}"
    yield f"without options: {1e3 * middle:.1f} ms, {spread} in {len(base)} runs"
    for row in rows:
        if row["options"] != _BASE and "error" not in row:
            yield f"{row['seconds'] / middle - 1:+.1%} {row['options']}"


def _line(row: Row) -> str:
    name = row["options"] or "without options"
    if "error" in row:
        return f"{name}: {row['error']}"
    return f"{1e3 * row['seconds']:7.1f} ms {row['peak_bytes'] / 2**30:6.2f} GiB  {name}"


if __name__ == "__main__":
    main(xla_options, package="benchmarks")
