"""The longest sequence of a full fine-tune on one absent GPU, without offloads to the host.

    python -m benchmarks.longest --output docs/measured/longest_h100.json

The optimizer's step is included and runs in the backward pass. Parameters of blocks are bfloat16,
and the MLP runs in tiles. Every answer is compiled, and the next longer sequence does not fit. The
budget is the GPU's memory under XLA_PYTHON_CLIENT_MEM_FRACTION=0.95.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from benchmarks.cases import QWEN3
from benchmarks.record import Record
from benchmarks.result import Result, Row, console
from experiments.cli import main
from experiments.config import ConfigError, OptimizerConfig, TrainConfig
from experiments.fitting.measuring import check_targets, measure_all
from jaxckpt.plans.errors import check_word
from jaxckpt.targets.target import parse_target

_4B = dataclasses.replace(QWEN3, num_blocks=36, d_model=2560, num_heads=32, d_ff=9728)
_8B = dataclasses.replace(_4B, d_model=4096, d_ff=12288, tied_embeddings=False)
# Each model, and a sequence length that is likely to fit.
MODELS = {"Qwen3-0.6B": (QWEN3, 1_000_000), "Qwen3-4B": (_4B, 400_000), "Qwen3-8B": (_8B, 200_000)}
_FRACTION, _TILE = 0.95, 4096


def longest(
    *,
    model: Annotated[tuple[str, ...], Parameter(negative=())] = tuple(MODELS),
    plan: Annotated[tuple[str, ...], Parameter(negative=())] = ("log",),
    target: str = "h100",
    parallel: int = 2,
    output: Path | None = None,
):
    """Find the longest sequence of a full fine-tune for each model and plan.

    Args:
      model: A model's name; may be given several times.
      plan: A plan; may be given several times.
      target: The GPU, which need not be present.
      parallel: Number of compilations at once.
      output: JSON file to write.
    """
    for name in model:
        check_word("model", name, tuple(MODELS), ConfigError)
    check_targets([target])
    budget = str(int(_FRACTION * parse_target(target).known_chip.memory_bytes))
    cases = [(_config(name, one, budget), target) for name in model for one in plan]
    names = [(name, one) for name in model for one in plan]
    rows: list[Row] = []
    record = Record("longest", output, rows)
    for (name, one), row in zip(
        names, measure_all(cases, largest="seq-len", parallel=parallel), strict=True
    ):
        rows.append({"model": name, "state_bytes_a_parameter": _state_bytes(row.config)})
        rows[-1] |= row.as_json() | {"device": target, "plan": one}
        record.save()
    table = [_shown(row) for row in rows]
    Result(title="longest sequence", rows=rows, table=table).print(console(120))


def _config(name: str, plan: str, budget: str) -> TrainConfig:
    shape, length = MODELS[name]
    tiles = max(1, length // _TILE)
    return TrainConfig(
        model=dataclasses.replace(shape, dtype="bfloat16", mlp_tiles=tiles),
        optimizer=OptimizerConfig(kind="adafactor"),
        remat=plan,
        batch_size=1,
        seq_len=length,
        update_in_backward=True,
        param_dtype="bfloat16",
        budget=budget,
    )


def _state_bytes(config: TrainConfig) -> float:
    """Returns the bytes of weights and optimizer state per parameter."""
    import jax

    from experiments.training.step import init_state, state_bytes

    short = dataclasses.replace(config, seq_len=128)
    return sum(state_bytes(jax.eval_shape(lambda: init_state(short))))


def _shown(row: Row) -> Row:
    if "peak_bytes" not in row:
        return {"model": row["model"], "plan": row["plan"], "tokens": row["error"][:60]}
    return {
        "model": row["model"],
        "plan": row["plan"],
        "tokens": row["largest"],
        "peak GiB": row["peak_bytes"] / 2**30,
        "state bytes a parameter": row["state_bytes_a_parameter"],
        "estimated s a step": row["step_seconds"],
    }


if __name__ == "__main__":
    main(longest, package="benchmarks")
