"""The batches of a run: windows of its corpus, or packed sequences, sharded over its mesh."""

import functools
from typing import Any

import jax
import numpy as np

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
    """Returns the batches of a run: tokens, or with `pack` pairs of tokens and segment ids."""
    sizes = {"batch_size": config.batch_size, "seed": config.seed}
    if not config.pack:
        return Batches(tokens=corpus.train, seq_len=config.seq_len, **sizes)
    rows = _packed_rows(corpus.train, corpus.train_starts, config)
    return PackedBatches(rows=rows, **sizes)


def put_batch(batches: Batches | PackedBatches, step: int, where: jax.sharding.Sharding | None):
    """Returns the batch of a step on its devices; each process reads the rows of its own devices.

    It does not wait for the devices. A batch does not depend on the number of processes.

    Args:
      batches: From `training_batches`.
      step: The number of steps done before.
      where: The batch's sharding; None without a mesh.
    """
    if where is None:
        return jax.device_put(batches.at(step))
    is_packed = isinstance(batches, PackedBatches)
    rows: Any = functools.cache(lambda start, stop: batches.at(step, start, stop))
    shape = (batches.batch_size, (batches.rows if is_packed else batches).seq_len + 1)

    def part(place: int | None):
        def read(index) -> Any:
            start, stop, _ = index[0].indices(batches.batch_size)
            found = rows(start, stop)
            return found if place is None else found[place]

        return jax.make_array_from_callback(shape, where, read)

    return (part(0), part(1)) if is_packed else part(None)


def _packed_rows(tokens: np.ndarray, starts: np.ndarray | None, config: TrainConfig) -> PackedRows:
    assert starts is not None  # a corpus for packing has them
    return PackedRows(tokens=tokens, starts=starts, seq_len=config.seq_len)


def held_out_batches(config: TrainConfig, corpus: Corpus) -> tuple:
    """Returns the validation batches, equal in every run."""
    sizes = {"batch_size": config.batch_size, "max_batches": config.validation_batches}
    if not config.pack:
        return validation_batches(corpus.validation, seq_len=config.seq_len, **sizes)
    rows = _packed_rows(corpus.validation, corpus.validation_starts, config)
    return packed_validation_batches(rows, **sizes)
