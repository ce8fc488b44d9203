"""Packed sequences: documents one after another, cut into rows, with the document of every token.

No position is padding, and only the few tokens after the last complete row are left out. The step's
number alone decides which rows a step sees, as for windows (`batches.py`): Grain's shuffle is a
permutation that can be evaluated at any place, so a run's position in the data is its step.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.data.batches import in_batches, mix_seed, spread
from experiments.data.sources import DataError
from jaxckpt.compatibility import install


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Rows over documents: `rows[r]` is the tokens and the segment ids of row r.

    Both are int32 `[seq_len + 1]`. A row's last token is only a target, and is the first token of
    the next row. Segment ids count the documents of a row from 0.

    Attributes:
      tokens: One-dimensional integers, perhaps a memory map.
      starts: The first token of each document, sorted, from 0.
      seq_len: Tokens that a row is trained on.

    Raises:
      DataError: The tokens do not fill a row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    seq_len: int

    def __post_init__(self):
        if not len(self):
            raise DataError(
                f"{len(self.tokens)} tokens fill no row: seq_len {self.seq_len} needs "
                f"{self.seq_len + 1}"
            )

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        begin = int(row) * self.seq_len
        end = begin + self.seq_len + 1
        first, last = np.searchsorted(self.starts, [begin, end - 1], side="right")
        ids = np.zeros(self.seq_len + 1, np.int32)
        ids[self.starts[first:last] - begin] = 1
        return self.tokens[begin:end].astype(np.int32), np.cumsum(ids, dtype=np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatches:
    """Packed rows in an order that differs in every epoch; `seed` is any whole number.

    Raises:
      DataError: Grain is not installed.
    """

    rows: PackedRows
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        check_grain()

    def at(
        self, step: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and segment ids of a step, or of its rows `start..stop` alone.

        Both are int32 `[rows, seq_len + 1]`.
        """
        stop = self.batch_size if stop is None else stop
        rows = [self._order[step * self.batch_size + row] for row in range(start, stop)]
        return _stacked(rows)

    @functools.cached_property
    def _order(self):
        import grain

        # Grain adds the epoch to its seed, so neighboring seeds would share orders. Mixed seeds do
        # not.
        rows: Any = self.rows  # it has the methods of Grain's sources, but not their base class
        return grain.MapDataset.source(rows).shuffle(mix_seed(self.seed)).repeat()


def packed_validation_batches(
    rows: PackedRows, *, batch_size: int, max_batches: int
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Returns fixed, evenly spaced rows, each once, equal in every run.

    The last batch is filled up with rows of -1.
    """
    chosen = spread(len(rows) - 1, min(max_batches * batch_size, len(rows)))
    found = _stacked(rows[row] for row in chosen)
    tokens, segment_ids = (in_batches(part, batch_size) for part in found)
    return tuple(zip(tokens, segment_ids, strict=True))


def check_grain():
    """Raises `DataError` unless Grain is installed. It is not imported here: it imports JAX."""
    if importlib.util.find_spec("grain") is None:
        raise DataError(f"--pack needs the package grain: {install('train')}")


def _stacked(rows: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    tokens, segment_ids = zip(*rows, strict=True)
    return np.stack(tokens), np.stack(segment_ids)
