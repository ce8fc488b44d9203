"""Where training text comes from: a corpus of token ids, and batches of rows over it."""

from experiments.data.batches import Batches, validation_batches
from experiments.data.corpus import Corpus, DataError, check_corpus, load_corpus
from experiments.data.packed import (
    PackedBatches,
    PackedRows,
    check_grain,
    packed_validation_batches,
)
