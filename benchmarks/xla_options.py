"""What XLA's options are worth for a step on the GPU that is present, one at a time.

    python -m benchmarks.xla_options --output docs/measured/xla_options_h200.json

Qwen3-0.6B's step at 8 x 1024 under a plan (that of `benchmarks.step`), each option in a fresh
process on top of what a run gets anyway (`experiments/training/compilation.py`). The step without
one is timed again after every few options: its spread is what a gain has to exceed. An option that
this XLA does not know is a row with an error. A row that the output has of the same GPU is not run
again.
"""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from benchmarks.record import ChildError, values_of, write
from benchmarks.step import KEPT, gpu
from experiments.cli import fail
from jaxckpt.plans import Plan, PlanError

_ENVIRONMENT = dict(os.environ)
_BASE = ""
_BASE_EVERY = 4
_CASE = {"batch_size": 8, "seq_len": 1024}
_TINY = {"batch_size": 2, "seq_len": 64, "tiny": True}
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

Row = dict[str, Any]


def xla_options(
    *,
    option: Annotated[tuple[str, ...], Parameter(negative=(), allow_leading_hyphen=True)] = OPTIONS,
    plan: str = KEPT,
    output: Path | None = None,
    tiny: Annotated[bool, Parameter(negative=())] = False,
):
    """Time the step under each option; exit with 1 if none could be timed.

    Args:
      option: As in `XLA_FLAGS`; may be given several times.
      plan: Of the blocks.
      output: JSON file to write, and to go on with.
      tiny: A small model, on any device, to try the script.
    """
    try:
        Plan.parse(plan)
    except PlanError as error:
        fail(error)
    about = {"case": (_TINY if tiny else _CASE) | {"plan": plan}, "gpu": gpu()}
    rows: list[Row] = []
    if output is not None and output.exists():
        kept = json.loads(output.read_text())["rows"]
        rows = [row for row in kept if about.items() <= row.items()]
    known = {one["options"] for one in rows} - {_BASE}
    command = _command(option, plan, output, tiny)
    for options in _turns([one for one in option if one not in known]):
        rows.append(about | _row(options, about["case"]))
        _write(output, command, rows)
        print(_line(rows[-1]), flush=True)
    print("\n".join(compared(rows)))
    sys.exit(all("error" in row for row in rows))


def _turns(options: list[str]) -> Iterator[str]:
    """Yields the options, and none before the first, after every few and after the last."""
    for place, one in enumerate(options):
        if place % _BASE_EVERY == 0:
            yield _BASE
        yield one
    if options:
        yield _BASE


def _row(options: str, case: Row) -> Row:
    flags = f"{_ENVIRONMENT.get('XLA_FLAGS', '')} {options}".strip()
    environment = _ENVIRONMENT | {"XLA_FLAGS": flags}
    try:
        (found,) = values_of("step_jax", case, environment=environment, name=options)
    except ChildError as error:
        return {"options": options, "error": str(error), "traceback": error.text}
    names = ("seconds", "peak_bytes", "compile_seconds", "device", "versions")
    return {"options": options} | {name: found[name] for name in names}


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


def _command(option: Sequence[str], plan: str, output: Path | None, tiny: bool) -> str:
    """Returns the command line that asks for the same."""
    flags = [] if tuple(option) == OPTIONS else [f"--option={shlex.quote(one)}" for one in option]
    flags += [] if plan == KEPT else [f"--plan={plan}"]
    flags += ["--tiny"] * tiny + ([] if output is None else [f"--output {output}"])
    return " ".join(["python -m benchmarks.xla_options", *flags])


def _write(output: Path | None, command: str, rows: list[Row]):
    if output is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process must hold nothing of the GPU
    from benchmarks.record import origin

    devices = [row["device"] for row in rows if "device" in row]
    record = origin(command) | {"rows": rows}
    record |= {"device": devices[0] if devices else None}
    write(record, output)


def main(tokens: Sequence[str] | None = None):
    """Runs the command; a refused command line is one line on stderr and exit code 2."""
    app = App(name="python -m benchmarks.xla_options", help_format="plaintext", version_flags=())
    app.default(xla_options)
    try:
        tokens = sys.argv[1:] if tokens is None else tokens
        function, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        fail(error)
    function(*bound.args, **bound.kwargs)


if __name__ == "__main__":
    main()
