"""Any function under a byte budget: plans, compiles and times seven models without a stack.

    python -m benchmarks.functions --target v5e-1 --target h100 --output FILE   # absent chips
    python -m benchmarks.functions --limit 60 --output FILE                     # the present chip

The models are a U-Net, a graph network, ResNet-50, MLP-Mixer, a Fourier neural operator, an
encoder-decoder and a plain loop of GPT's layers. For each model and target, budgets are spread
evenly from the peak of `none` to the least budget that works. The planner's answer to each budget
is compared with checkpoints placed by hand. Seconds are measured if this process has an
accelerator, and otherwise estimated by the roofline. Each model has its own process with a time
limit. Each row is written as soon as it is finished. The same command continues an interrupted run.

Exits with 1 if a bound fails.
"""

from pathlib import Path

from benchmarks.functions_parts.bounds import check, table
from benchmarks.record import Record, finish, kept, rows_of
from experiments.cli import main
from experiments.config import ConfigError, check_least
from jaxckpt.absent import launch
from jaxckpt.compiled import cache
from jaxckpt.plans.errors import check_word
from jaxckpt.targets.target import parse_target

MODELS = ("unet", "graph", "resnet", "mixer", "fourier", "t5", "gpt")


def functions(
    *,
    output: Path | None = None,
    model: tuple[str, ...] = (),
    target: tuple[str, ...] = ("local",),
    budgets: int = 5,
    limit: int = 3600,
    tiny: bool = False,
):
    """Plan any function for many budgets and check what is promised; exit with 1 if a bound fails.

    Args:
      output: JSON file to write; an interrupted run continues from it.
      model: A model's name; may be given several times. All models by default.
      target: A chip; may be given several times.
      budgets: Number of budgets for each model, at least 2.
      limit: Seconds for each model and target.
      tiny: Small models, to try the script.
    """
    for name in model:
        check_word("model", name, MODELS, ConfigError)
    check_least(2, budgets=budgets)
    check_least(1, limit=limit)
    targets = [parse_target(name) for name in target]
    for one in targets:
        if one.chip is not None:
            launch.check_available(one)
    sources = cache.digest_of_sources({"benchmarks"})[:16]
    record = Record("functions", output, [r for r in kept(output) or [] if r["sources"] == sources])
    failures = []
    for one in targets:
        for name in model or MODELS:
            case = {"model": name, "target": one.name, "budgets": budgets, "tiny": tiny}
            made = case | {"sources": sources, "name": f"{name} {one.name}"}
            mine = [row for row in record.rows if made.items() <= row.items()]
            done = [row["place"] for row in mine]
            if len(done) > budgets:
                continue
            asked = ("functions_parts.process", case | {"limit": limit}, done)
            environment = None if one.backend == "local" else launch.environment(one)
            for row in rows_of(*asked, environment=environment):
                if "error" in row:
                    failures.append(f"{name} on {one}: {row['error']}")
                    continue
                if row["place"] not in done:
                    record.rows.append(made | row)
                    record.save()
                    print(f"{name} on {one}: {len(record.rows)} rows", flush=True)
    print("\n".join(table(record.rows)))
    finish(failures + check(record.rows))


if __name__ == "__main__":
    main(functions, package="benchmarks")
