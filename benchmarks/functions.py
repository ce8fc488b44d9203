"""Any function under a byte budget: seven models that are no stack, planned, compiled and timed.

    python -m benchmarks.functions --target v5e-1 --target h100 --output FILE   # absent chips
    python -m benchmarks.functions --limit 60 --output FILE                     # the present chip

For each model (U-Net, graph network, ResNet-50, MLP-Mixer, Fourier neural operator,
encoder-decoder, a plain loop of GPT's layers) and target: budgets spread evenly from what `none`
needs to the least that works, and for each what the planner answers, beside what an owner would
place by hand. Time is real on an accelerator of this process, the roofline's elsewhere. A model is
one process with a time limit. Rows are written as they finish, and a run cut short goes on by the
same command.

Exits with 1 if a bound fails.
"""

from pathlib import Path

from benchmarks.functions_parts.bounds import check, table
from benchmarks.record import Record, finish, kept, rows_of
from experiments.cli import main
from experiments.config import ConfigError
from jaxckpt.absent import launch
from jaxckpt.compiled import cache
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
      output: JSON file to write, and to go on with.
      model: A model by its name; may be given several times. All by default.
      target: A chip; may be given several times.
      budgets: Budgets of each model, at least 2.
      limit: Seconds for each model and target.
      tiny: Small models, to try the script.
    """
    for name in model:
        if name not in MODELS:
            raise ConfigError(f"model {name!r} is not known; valid: {', '.join(MODELS)}")
    if budgets < 2 or limit < 1:
        raise ConfigError(f"--budgets is {budgets}, --limit {limit}; the least are 2 and 1")
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
