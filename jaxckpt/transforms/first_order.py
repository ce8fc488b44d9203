"""What the executors do not differentiate, said in one line: forward mode and second order."""

import contextlib
from collections.abc import Sequence

import jax

_MESSAGE = (
    "the schedule executor has gradients (reverse mode, first order) alone; "
    "remat='full' or nested=True has forward-mode and higher derivatives"
)


@jax.custom_jvp
def _identity(x):
    """Returns `x`; whoever differentiates it is told what to do instead."""
    return x


@_identity.defjvp
def _(primals, tangents):
    raise NotImplementedError(_MESSAGE)


def guard(leaves: Sequence, places: Sequence[int]) -> list:
    """Returns the leaves, those at `places` such that a second derivative is refused."""
    return [_identity(leaf) if i in places else leaf for i, leaf in enumerate(leaves)]


@contextlib.contextmanager
def explained():
    """A context in which forward mode through a `jax.custom_vjp` is refused in our words.

    Raises:
      NotImplementedError: Naming the plans that have it.
    """
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(_MESSAGE) from None
