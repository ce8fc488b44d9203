"""Which parameters learn: patterns over their paths, the rest frozen.

`--trainable 'layers/self_attn/*'` trains the attention of every block and nothing else. A frozen
parameter has no gradient and no optimizer state. Paths are those of the parameter tree, joined by
slashes; a block's parameters are stacked, so a pattern holds for all blocks.
"""

import fnmatch
from collections.abc import Sequence

from flax import traverse_util

from experiments.config import ConfigError
from jaxckpt.plans.errors import nearest


def split(params, patterns: Sequence[str]):
    """Returns `(trainable, frozen)`, two trees that `merge` puts together again.

    Args:
      params: The model's parameters, a tree of dictionaries.
      patterns: Globs over paths (`*` goes over slashes too); none trains everything.

    Raises:
      ConfigError: A pattern that matches nothing.
    """
    if not patterns:
        return params, {}
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in flat):
            raise ConfigError(
                f"trainable {pattern!r} matches no parameter{nearest(pattern, flat)}; "
                f"valid: globs over {', '.join(sorted(flat))}"
            )
    learns = lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    part = lambda chosen: traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if learns(path) == chosen}, sep="/"
    )
    return part(True), part(False)


def merge(trainable, frozen):
    """Returns the parameters that `split` cut in two."""
    if not frozen:
        return trainable
    flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)
