"""Windows over a corpus. The step's number alone decides which tokens a step sees."""

import dataclasses

import numpy as np

from experiments.data.sources import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Random windows of a token array.

    The window of row r at step s depends on the seed and on `s * batch_size + r` alone. So a
    run's position in the data is its step, and microbatches see the rows of the whole batch.

    Attributes:
      tokens: One-dimensional integers, perhaps a memory map.
      batch_size: Sequences per batch.
      seq_len: Tokens that a sequence is trained on; a row has one more, the last target.
      seed: The seed of the order, any whole number (seeds 2^64 apart give one order).

    Raises:
      DataError: The tokens do not hold a single window.
    """

    tokens: np.ndarray
    batch_size: int
    seq_len: int
    seed: int = 0

    def __post_init__(self):
        _check_window(self.tokens, self.seq_len)

    def at(self, step: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the batch of a step, or its rows `start..stop`, int32 `[rows, seq_len + 1]`."""
        stop = self.batch_size if stop is None else stop
        rows = np.arange(start, stop, dtype=np.uint64) + np.uint64(step * self.batch_size)
        starts = _mix(rows, self.seed) % np.uint64(len(self.tokens) - self.seq_len)
        return _windows(self.tokens, starts.astype(np.int64), self.seq_len)


def validation_batches(
    tokens: np.ndarray, *, batch_size: int, seq_len: int, max_batches: int
) -> tuple[np.ndarray, ...]:
    """Returns fixed, evenly spaced windows that do not overlap, equal in every run.

    Args:
      tokens: One-dimensional integers with at least `seq_len + 1` entries.
      batch_size: Sequences per batch.
      seq_len: Tokens that a sequence is trained on.
      max_batches: The most batches; fewer if the text has fewer separate windows.

    Returns:
      At least one int32 array `[batch_size, seq_len + 1]`. Rows of -1 fill up the last batch.

    Raises:
      DataError: The tokens do not hold a single window.
    """
    _check_window(tokens, seq_len)
    count = min(max_batches * batch_size, len(tokens) // (seq_len + 1))
    starts = spread(len(tokens) - seq_len - 1, count)
    return in_batches(_windows(tokens, starts, seq_len), batch_size)


def spread(last: int, count: int) -> np.ndarray:
    """Returns `count` whole numbers from 0 to `last`, as even as possible; 0 for a count of 1."""
    return np.arange(count) * last // max(1, count - 1)


def in_batches(rows: np.ndarray, batch_size: int) -> tuple[np.ndarray, ...]:
    """Returns rows in batches of one size, the last filled up with rows of -1."""
    short = -len(rows) % batch_size
    rows = np.concatenate([rows, np.full_like(rows, -1, shape=(short, *rows.shape[1:]))])
    return tuple(rows.reshape(-1, batch_size, *rows.shape[1:]))


def _check_window(tokens: np.ndarray, seq_len: int):
    if len(tokens) < seq_len + 1:
        given, needed = len(tokens), seq_len + 1
        raise DataError(f"{given} tokens hold no window: seq_len {seq_len} needs {needed}")


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def _mix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Returns a well-mixed uint64 of each number and the seed (SplitMix64, Steele et al. 2014).

    The seed is mixed by itself first, so that neighboring seeds give unrelated orders.
    """
    return _finalize((numbers + _offset(seed)) * _GOLDEN)


def mix_seed(seed: int) -> int:
    """Returns a seed below 2^32 that is unrelated to those of neighboring seeds."""
    return int(_offset(seed)[0] >> np.uint64(32))


def _offset(seed: int) -> np.ndarray:
    return _finalize(np.array([(seed + 1) % 2**64], np.uint64) * _GOLDEN)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _finalize(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
