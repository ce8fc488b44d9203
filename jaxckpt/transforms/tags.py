"""Tags: names for values inside a block, so that policies can speak of them.

    q = jaxckpt.tag(q, "q")     # then remat="names:q" keeps it, remat="offload:q" moves it

A tag is JAX's own `checkpoint_name`, so a model's existing tags work as well.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax.ad_checkpoint import checkpoint_name

from jaxckpt.plans import PlanError, words
from jaxckpt.plans.errors import shown
from jaxckpt.plans.plan import NAME
from jaxckpt.transforms import jaxprs

# jaxckpt's own tags. The prefix keeps them apart from users' tags and out of every glob.
_RESERVED = "jaxckpt."
CARRY = _RESERVED + "carry"
ATTENTION = _RESERVED + "attention"
_VALUE = _RESERVED + "value."  # the prefix of invented names' tags

# The values that have no invented name, for error texts.
NAMELESS = "what only the derivative of a primitive or of a jax.custom_jvp makes"

# Attention kernels whose backward pass needs their outputs. Values inside a kernel's custom VJP
# carry no tag, but a policy sees the primitive.
ATTENTION_PRIMITIVES = frozenset({jaxprs.CUDNN_FORWARD})


def tag(x, name: str):
    """Names `x` for the policies `names:` and `offload:`.

    Args:
      x: An array or a pytree of arrays.
      name: Letters, digits, `_`, `.` and `-`; not `carry`, which means a block's input.

    Returns:
      `x` unchanged, under the tag.

    Raises:
      PlanError: The plan grammar cannot spell the name, or the name is reserved.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> block = lambda x, w: jnp.sin(jaxckpt.tag(x @ w, "hidden"))
      >>> loss = lambda w: jaxckpt.scan_blocks(
      ...     block, w, jnp.ones([4, 8]), remat="names:hidden").sum()
      >>> jax.grad(loss)(jnp.zeros([3, 8, 8])).shape
      (3, 8, 8)
    """
    if not isinstance(name, str):
        raise PlanError(f"tag takes an array and then its name, not {shown(name)} as the name")
    if not NAME.fullmatch(name):
        raise PlanError(f"tag {name!r} is not valid; tags are letters, digits, '_', '.' and '-'")
    if name == words.CARRY or is_reserved(name):
        raise PlanError(f"tag {name!r} is reserved; 'carry' means a block's input and needs no tag")
    return checkpoint_name(x, name)


def tag_reserved(x, name: str):
    """Returns `x` under one of this module's own tags (`CARRY`, `ATTENTION`)."""
    return checkpoint_name(x, name)


def is_reserved(name: str) -> bool:
    """Returns whether `name` is one of this module's own tags."""
    return name.startswith(_RESERVED)


def is_of_attention(primitive, *_, **params) -> bool:
    """Returns whether an equation's outputs are residuals of an attention kernel."""
    if primitive.name == jaxprs.TAG:
        return params["name"] == ATTENTION
    return primitive.name in ATTENTION_PRIMITIVES


def of_invented(name: str) -> str:
    """Returns the tag of an invented name, such as `@dot.2`."""
    return _VALUE + name.removeprefix(words.INVENTED)


def invented_name(tag: str) -> str | None:
    """Returns the invented name of a tag; None if it is the tag of a user or of jaxckpt."""
    return words.INVENTED + tag.removeprefix(_VALUE) if tag.startswith(_VALUE) else None


class Tags(NamedTuple):
    """The names of a block that policies can speak of.

    Attributes:
      names: The users' tags, sorted.
      attention: Whether the block runs an attention kernel whose residuals can be kept.
      invented: The invented names that were asked for, in the order of the block's steps.
    """

    names: tuple[str, ...]
    attention: bool
    invented: tuple[str, ...] = ()


def tags_of(fn: Callable, *args) -> Tags:
    """Returns the tags in `fn`'s forward pass, also inside calls, loops and custom VJPs.

    Args:
      fn: A function of pytrees of arrays.
      *args: Its arguments, arrays or abstract ones.
    """
    jaxpr = jaxprs.linearized(fn, *args)
    named = [e for e in jaxprs.equations(jaxpr) if e.primitive.name == jaxprs.TAG]
    names = dict.fromkeys(e.params["name"] for e in named)
    return Tags(
        names=tuple(sorted(name for name in names if not is_reserved(name))),
        attention=has_attention(jaxpr),
        invented=tuple(filter(None, map(invented_name, names))),
    )


def has_attention(jaxpr) -> bool:
    """Returns whether a linearized jaxpr runs an attention kernel that policies know."""
    return any(is_of_attention(e.primitive, **e.params) for e in jaxprs.equations(jaxpr))
