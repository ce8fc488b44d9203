"""Command-line experiments over jaxckpt: thin programs that print one line for what is wrong."""

import sys

try:
    import jaxckpt as _  # refuses a JAX and a Flax that do not work together
except ImportError as error:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None
