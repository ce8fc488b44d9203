"""SwiGLU's elementwise half and the projection after it, with a backward pass of its own.

Shapes: F d_ff, D d_model. The product silu(gate) * up is not a residual. The backward pass
recomputes it from `gate` and `up` in the pass over memory that makes their gradients, where it is
free. So under remat it is recomputed once rather than twice.

Limits: only reverse mode, like every attention kernel.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu_down(gate, up, kernel_FD):
    """Returns `(silu(gate) * up) @ kernel` (Shazeer 2020, GLU variants improve Transformer).

    Args:
      gate: `[..., F]`, any floating dtype; the product has the same dtype.
      up: `[..., F]`.
      kernel_FD: The projection, cast to the dtype of `gate`.
    """
    return _hidden(gate, up) @ kernel_FD.astype(gate.dtype)


def _forward(gate, up, kernel_FD):
    return swiglu_down(gate, up, kernel_FD), (gate, up, kernel_FD)


def _backward(residuals, grad):
    gate, up, kernel_FD = residuals
    hidden, of_inputs = jax.vjp(_hidden, gate, up)
    grad_hidden = grad @ kernel_FD.T.astype(gate.dtype)
    of_kernel_FD = jnp.einsum("...F,...D->FD", hidden, grad)
    return *of_inputs(grad_hidden), of_kernel_FD.astype(kernel_FD.dtype)


swiglu_down.defvjp(_forward, _backward)


def _hidden(gate, up):
    """Returns silu(gate) * up, computed in float32 and rounded once."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)
