"""The corpus that a configuration names, read with its tokenizer and checked. No JAX import."""

from experiments.config import TrainConfig
from experiments.data import check_corpus, check_grain, load_corpus
from experiments.weights.load import check_init, end_token


def corpus_of(config: TrainConfig):
    """Returns a run's corpus.

    Raises:
      ConfigError: Weights are missing or do not fit the model, packing without grain.
      DataError: A corpus is missing, too short, or has tokens that the model lacks.
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
