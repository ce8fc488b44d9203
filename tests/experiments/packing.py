"""Documents laid one after another, for tests of packed rows."""

import numpy as np


def join(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents one after another, and where each begins."""
    lengths = [len(document) for document in documents]
    return np.concatenate(documents), np.cumsum([0, *lengths[:-1]], dtype=np.int64)
