"""Train a Transformer on text under a checkpointing plan.

python -m experiments.train --remat=sqrt
python -m experiments.train --config configs/small.toml --steps 50 --remat=uniform:4+dots
python -m experiments.train --init Qwen3-0.6B --data notes/ --remat=attention --steps 50
"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments.cli import main
from experiments.config import TrainConfig
from experiments.processes.flags import ProcessFlags
from experiments.processes.join import joined


def train(
    settings: TrainConfig = TrainConfig(),
    processes: ProcessFlags = ProcessFlags(),
    *,
    config: Annotated[
        Path | None, Parameter(help="TOML file of settings; flags win over it.")
    ] = None,
):
    """Train a Transformer under a checkpointing plan, and say what memory a step takes."""
    from experiments.training.choose_plan import check_calibrated
    from experiments.training.corpus import corpus_of
    from experiments.training.display import waiting
    from experiments.training.record import check_tensorboard, run_folder

    if settings.tensorboard:
        check_tensorboard()
    check_calibrated(settings, [settings.plan], ["local"])
    processes.check(settings)
    del config  # read before the other flags were parsed; see experiments.cli
    with run_folder(settings, is_first=not processes.process_id) as folder:
        with waiting("reading the data"):
            corpus = corpus_of(settings)
        with joined(processes, settings, corpus.sha256):
            with waiting("starting JAX"):
                from experiments.training.loop import run  # only now is JAX imported

            stopped_by = run(settings, corpus, folder)
    if stopped_by is not None:
        raise SystemExit(128 + stopped_by)  # it is not done, and what comes after it shall know


if __name__ == "__main__":
    main(train)
