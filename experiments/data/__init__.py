"""Where training text comes from: a corpus of token ids, and batches of windows over it."""

from experiments.data.batches import Batches, validation_batches
from experiments.data.corpus import Corpus, DataError, check_corpus, load_corpus

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "check_corpus",
    "load_corpus",
    "validation_batches",
]
