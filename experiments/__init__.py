"""Command-line experiments over jaxckpt: thin programs that print one line for what is wrong."""

import importlib.util
import sys

try:
    import jaxckpt as _  # refuses a JAX and a Flax that do not work together
except ImportError as error:
    if error.name is not None:  # a module is missing; the versions are not the fault
        raise
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from None

from jaxckpt.compatibility import install

# The packages of the extra `experiments` that every command needs.
if not all(map(importlib.util.find_spec, ("cyclopts", "rich", "tomli_w"))):
    print(f"error: experiments need: {install('experiments')}", file=sys.stderr)
    raise SystemExit(2)
