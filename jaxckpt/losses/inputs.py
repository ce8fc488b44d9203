"""Arguments of a linear cross entropy: shapes, dtypes, options, checked before anything runs."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from jaxckpt.plans.errors import check_word
from jaxckpt.transforms.traced_block import vary, varying_axes

LAYOUTS = ("DV", "VD")
REDUCTIONS = ("mean", "sum")
_COMPUTE_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a linear cross entropy; see `linear.linear_cross_entropy`.

    Raises:
      ValueError: A word is unknown, the weight is negative or no Python number, or the index is no
        Python integer.
    """

    layout: str
    ignore_index: int | None
    z_loss: float
    reduction: str

    def __post_init__(self):
        check_word("layout", self.layout, LAYOUTS)
        check_word("reduction", self.reduction, REDUCTIONS)
        if not isinstance(self.z_loss, numbers.Real) or not self.z_loss >= 0:
            raise ValueError(f"z_loss is {self.z_loss!r}; valid: a Python number, 0 or more")
        if self.ignore_index is not None:
            if not isinstance(self.ignore_index, numbers.Integral):
                raise ValueError(
                    f"ignore_index is {self.ignore_index!r}; valid: a Python integer or None"
                )
            object.__setattr__(self, "ignore_index", int(self.ignore_index))
        object.__setattr__(self, "z_loss", float(self.z_loss))

    @property
    def width_axis(self) -> int:
        """The axis of the weights that is contracted with the hidden state."""
        return self.layout.index("D")


def check_arrays(x, w, targets, options: Options):
    """Raises `ValueError` unless shapes and dtypes match."""
    if x.ndim < 2:
        raise ValueError(f"x is {list(x.shape)}; valid: [..., tokens, D], two axes or more")
    if x.dtype.name not in _COMPUTE_DTYPES:
        raise ValueError(f"x is {x.dtype.name}; valid: {', '.join(_COMPUTE_DTYPES)}")
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"w is {w.dtype.name}{list(w.shape)}; valid: floating, two axes, layout "
            f"{options.layout}"
        )
    width = x.shape[-1]
    if w.shape[options.width_axis] != width:
        other = LAYOUTS[1 - LAYOUTS.index(options.layout)]
        fits = w.shape[1 - options.width_axis] == width
        raise ValueError(
            f"w is {list(w.shape)} with layout {options.layout!r}, but D is {width}, the last axis "
            f"of x{f' (did you mean layout={other!r}?)' if fits else ''}"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets are {list(targets.shape)}; valid: {list(x.shape[:-1])}, as x")
    dtype, ignore_index = targets.dtype, options.ignore_index
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"targets are {dtype.name}; valid: an integer dtype")
    limits = jnp.iinfo(dtype)
    if ignore_index is not None and not limits.min <= ignore_index <= limits.max:
        raise ValueError(
            f"ignore_index {ignore_index} is no {dtype.name}, the targets' dtype; valid: "
            f"{limits.min} to {limits.max}"
        )


def counted_tokens(targets, options: Options):
    """Returns booleans in the shape of the targets, true for targets that are counted."""
    if options.ignore_index is None:
        return jnp.ones(targets.shape, bool)
    return targets != jnp.asarray(options.ignore_index, targets.dtype)


def in_vocabulary(targets, vocab_size: int):
    """Returns booleans, true for targets in 0..V-1; compares in the targets' own dtype."""
    largest = min(vocab_size - 1, jnp.iinfo(targets.dtype).max)
    return (targets >= 0) & (targets <= jnp.asarray(largest, targets.dtype))


def accumulator_dtype(x) -> jnp.dtype:
    """Returns the dtype of logits, losses and summed gradients: float64 if `x` is, else float32."""
    return jnp.promote_types(jax.typeof(x).dtype, jnp.float32)


def varying_alike(*arrays) -> list[jax.Array]:
    """Returns the arrays, made to vary over the same axes inside a `jax.shard_map`."""
    found = [varying_axes(jax.typeof(array)) for array in arrays]
    axes = set().union(*found)
    missing = [tuple(sorted(axes.difference(of_array))) for of_array in found]
    pairs = zip(arrays, missing, strict=True)
    return [vary(array, names) if names else array for array, names in pairs]
