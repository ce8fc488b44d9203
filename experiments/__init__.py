"""Command-line experiments over jaxckpt: thin programs that print one line for what is wrong."""

import sys

try:
    import jaxckpt as _  # refuses a JAX and a Flax that do not work together
except ImportError as error:
    if error.name is not None:  # Python's own names a module: that is no pair of versions
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
