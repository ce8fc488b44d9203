"""Train a Transformer on text under a checkpointing plan.

python -m experiments.train --remat=sqrt
python -m experiments.train --config configs/small.toml --steps 50 --remat=uniform:4+dots
python -m experiments.train --init Qwen3-0.6B --data notes/ --remat=attention --steps 50
"""

from experiments.cli import ConfigFile, main
from experiments.config import TrainConfig
from experiments.data import check_corpus, check_grain, load_corpus
from experiments.processes.flags import ProcessFlags
from experiments.processes.join import joined
from experiments.weights.load import check_init, end_token


def train(
    settings: TrainConfig = TrainConfig(),
    processes: ProcessFlags = ProcessFlags(),
    *,
    config: ConfigFile = None,
):
    """Train a Transformer under a checkpointing plan, and say what memory a step takes."""
    from experiments.training.choose_plan import check_calibrated
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
        raise SystemExit(128 + stopped_by)  # not done: a script that goes on after it has to know


def corpus_of(config: TrainConfig):
    """Returns a run's corpus, read with the tokenizer of its weights, and checked.

    Raises:
      ConfigError: Weights are missing or do not fit the model.
      DataError: A corpus is missing, too short, or has tokens that the model lacks; or packing
        lacks grain.
    """
    tokenizer = check_init(config)
    if config.pack:
        check_grain()
    corpus = load_corpus(
        config.data,
        token_dtype=config.token_dtype,
        tokenizer=tokenizer,
        pack=config.pack,
        end_token=end_token(config),
        vocab_size=config.model.vocab_size,
    )
    check_corpus(corpus, seq_len=config.seq_len, vocab_size=config.model.vocab_size)
    return corpus


if __name__ == "__main__":
    main(train)
