"""FLOPs of a function, counted from its jaxpr.

XLA's own cost analysis counts a loop's body once; here a `scan` counts its body times its length,
so recomputed blocks are counted. Matrix products, convolutions and attention kernels count, two
operations per multiply-add, as the kernels run them. A causal kernel that skips masked blocks
counts half, or all with `masked=True`. The backward pass of flash attention counts the product that
it recomputes. Elementwise work is left out, as in the usual model-FLOPs figures. So is a step whose
result nobody reads: XLA leaves it out of the program.

`_TABLE` has a counting function for each primitive; a new kernel is one entry and one function.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxckpt.costs.flat import Flat, Step, bodies, flatten
from jaxckpt.transforms import jaxprs
from jaxckpt.transforms.jaxprs import mean_trips


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, *, masked: bool = False) -> int:
    """Returns the FLOPs of all matrix products, convolutions and attention kernels in a jaxpr.

    A `cond` counts its most expensive branch. A `while` counts its mean trips if the executor made
    it, and once otherwise, because a jaxpr has no trips. A Pallas kernel counts its
    `cost_estimate`, or else its body for each point of its grid. Of splash attention's grid only
    the unmasked blocks count, if the mask is a constant.

    Args:
      jaxpr: The jaxpr of the function.
      masked: Whether blocks that an attention kernel skips because of its mask count too.
    """
    return int(_total(flatten(jaxpr), masked))


def step_flops(step: Step, *, masked: bool = False) -> Fraction | int:
    """Returns the FLOPs of one step; all trips of a loop or kernel count."""
    count = _TABLE.get(step.name)
    if count is not None:
        return count(step, masked)
    inner = [_total(body, masked) for body in bodies(step)]
    return max(inner, default=0) if step.name == jaxprs.COND else sum(inner) * trips(step)


def trips(step: Step) -> Fraction | int:
    """Returns how often a step runs its body, on average; 1 if it is neither a loop nor a map.

    A map over the devices of a mesh runs its body on each device.
    """
    if step.name == jaxprs.SCAN:
        return step.params["length"]
    if step.name == jaxprs.SHARD_MAP:
        return step.params["mesh"].size
    return mean_trips(step.equation) if step.name == jaxprs.WHILE else 1


def is_kernel(step: Step) -> bool:
    """Returns whether a step is one product or one kernel, with FLOPs of its own."""
    return step.name in _TABLE


class AttentionShape(NamedTuple):
    """Sizes of an attention kernel: each head has `rows` queries and `columns` keys."""

    batch: int
    heads: int
    rows: int
    columns: int
    head_dim: int


def attention_shape(step: Step) -> AttentionShape | None:
    """Returns the sizes of a cuDNN attention kernel; None for any other step."""
    if step.name not in jaxprs.CUDNN:
        return None
    query, key = step.inputs[0].aval.shape, step.inputs[1].aval.shape
    if int(step.params["layout"]) == 1:  # [B, H, S, N]; else [B, S, H, N]
        batch, heads, rows, head_dim = query
        return AttentionShape(batch, heads, rows, key[2], head_dim)
    batch, rows, heads, head_dim = query
    return AttentionShape(batch, heads, rows, key[1], head_dim)


def _total(flat: Flat, masked: bool) -> Fraction | int:
    return sum(step_flops(step, masked=masked) for step in flat.live_steps())


def _dot(step: Step, _) -> int:
    (contracted, _), _ = step.params["dimension_numbers"]
    return _product_flops(step, contracted)


def _ragged_dot(step: Step, _) -> int:
    """Returns the FLOPs of a ragged product, which do not depend on the sizes of its groups."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    flops = _product_flops(step, contracted)
    if set(numbers.lhs_ragged_dimensions) <= set(contracted):
        # The gradient of the groups: the output has all groups, but each row counts for one.
        flops //= step.inputs[2].aval.shape[-1]
    return flops


def _product_flops(step: Step, contracted) -> int:
    depth = math.prod(step.inputs[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(step.outputs[0].aval.shape)


def _conv(step: Step, _) -> int:
    kernel = step.inputs[1].aval.shape
    out_features = kernel[step.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(step.outputs[0].aval.shape) * math.prod(kernel) // out_features


def _attention(products: int):
    """Returns the count of a cuDNN attention kernel that runs `products` [S, T] products.

    Forward: q k^T and p v. Backward: q k^T again, then the gradients of p, v, q and k (Dao et al.
    2022, FlashAttention, algorithm 4).
    """

    def count(step: Step, masked: bool) -> int:
        shape = attention_shape(step)
        assert shape is not None, step.name
        pairs, mask = shape.rows * shape.columns, step.params["mask_type"]
        if not masked and "CAUSAL" in getattr(mask, "name", str(mask)):
            pairs //= 2
        window = step.params.get("sliding_window_length")
        if window and not masked:
            pairs = min(pairs, shape.rows * window)
        return products * 2 * shape.batch * shape.heads * pairs * shape.head_dim

    return count


def _pallas(step: Step, masked: bool) -> Fraction | int:
    estimate = step.params.get("cost_estimate")
    if estimate is not None:
        return int(estimate.flops)
    grid = [size for size in step.params["grid_mapping"].grid if isinstance(size, int)]
    body = sum(_total(inner, masked) for inner in bodies(step))
    return int(body * math.prod(grid) * (1 if masked else _splash_fraction(step)))


def _splash_fraction(step: Step) -> Fraction:
    """Returns the unmasked share of splash attention's grid; 1 for other kernels."""
    if "splash_m" not in str(step.equation.source_info.name_stack):
        return Fraction(1)
    block_mask = step.inputs[1].constant  # [heads or 1, rows, columns]; 0 is skipped
    if block_mask is None or isinstance(block_mask, Tracer):
        return Fraction(1)
    block_mask = np.asarray(block_mask)
    return Fraction(int(np.count_nonzero(block_mask)), block_mask.size)


# Primitive -> function from a step to its FLOPs.
_TABLE = {
    jaxprs.DOT: _dot,
    jaxprs.RAGGED_DOT: _ragged_dot,
    jaxprs.CONV: _conv,
    jaxprs.CUDNN_FORWARD: _attention(2),
    jaxprs.CUDNN_BACKWARD: _attention(5),
    jaxprs.CUDNN_FP8_FORWARD: _attention(2),
    jaxprs.CUDNN_FP8_BACKWARD: _attention(5),
    jaxprs.PALLAS: _pallas,
}
