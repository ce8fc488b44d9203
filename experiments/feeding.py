"""The batches of a run: windows of its corpus, or packed rows."""

import jax

from experiments.config import TrainConfig
from experiments.data import (
    Batches,
    Corpus,
    PackedBatches,
    PackedRows,
    packed_validation_batches,
    validation_batches,
)


def training_batches(config: TrainConfig, corpus: Corpus) -> Batches | PackedBatches:
    """Returns what has the batch of every step; packed, it is tokens and segment ids."""
    sizes = {"batch_size": config.batch_size, "seed": config.seed}
    if not config.pack:
        return Batches(tokens=corpus.train, seq_len=config.seq_len, **sizes)
    rows = PackedRows(tokens=corpus.train, starts=corpus.train_starts, seq_len=config.seq_len)
    shards = {"shard": jax.process_index(), "num_shards": jax.process_count()}
    return PackedBatches(rows=rows, **sizes, **shards)


def held_out_batches(config: TrainConfig, corpus: Corpus) -> tuple:
    """Returns the validation batches, the same in every run."""
    sizes = {"batch_size": config.batch_size, "max_batches": config.validation_batches}
    if not config.pack:
        return validation_batches(corpus.validation, seq_len=config.seq_len, **sizes)
    rows = PackedRows(
        tokens=corpus.validation, starts=corpus.validation_starts, seq_len=config.seq_len
    )
    return packed_validation_batches(rows, **sizes)
