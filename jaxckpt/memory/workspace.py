"""Reserves the working memory of cuDNN's attention in a step for an absent GPU.

    reserve(lowered.compiler_ir())          # before lowered.compile()

The backward kernel needs a buffer of its own. With a GPU, XLA asks cuDNN for its size. Without one,
XLA keeps the 0 bytes that JAX writes, so the compiled peak of a long sequence is too low. The size
here is computed from the kernel's shapes. Qwen3-8B over 250,880 tokens took 62.15 GiB on an H200;
compiled for an absent h100, it takes 56.06 GiB without this buffer and 61.86 GiB with it.
"""

import math

from jaxlib.mlir import ir

# `fmhaSoftmaxBackward`, also with a bias or dropout. Kernels in float8 have other buffers.
_BACKWARD = ("SoftmaxBackward", "SoftmaxDropoutBackward")
_SUM_BYTES = 4  # of a float32, in which a query's gradient and its row's sum are accumulated


def reserve(module: ir.Module):
    """Gives each backward attention kernel of a StableHLO module the buffer that cuDNN asks for.

    Args:
      module: The module, which is changed. A kernel that JAX splits over a mesh keeps 0 bytes.
    """
    with module.context, ir.Location.unknown():
        module.operation.walk(_resize)


def _resize(operation: ir.Operation) -> ir.WalkResult:
    if operation.name == "stablehlo.custom_call":
        name = ir.StringAttr(operation.attributes["call_target_name"]).value
        if name.startswith("__cudnn$fmha") and name.endswith(_BACKWARD):
            queries, keys = (ir.RankedTensorType(operation.results[n].type) for n in (0, 1))
            byte = ir.IntegerType.get_unsigned(8)
            size = workspace_bytes(tuple(queries.shape), tuple(keys.shape))
            operation.results[len(operation.results) - 1].set_type(
                ir.RankedTensorType.get([size], byte)
            )
    return ir.WalkResult.ADVANCE


def workspace_bytes(queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
    """Returns the bytes of the buffer of a backward attention kernel in 16-bit floats.

    The kernel accumulates the queries' gradient and a sum for each query in float32. If several
    query heads share a key head, it first writes the keys' and values' gradients for each query
    head.

    Args:
      queries: The shape of the queries, `[batch, heads, tokens, size of a head]`.
      keys: The shape of the keys; heads and tokens may differ.
    """
    batch, heads, tokens, size = queries
    # Two arrays of two-byte floats.
    shared = 2 * 2 * batch * heads * keys[2] * size if keys[1] < heads else 0
    return _SUM_BYTES * (math.prod(queries) + batch * heads * tokens) + shared
