"""Linear cross entropy that makes its gradients in the forward pass, a chunk of tokens at a time.

    loss = jaxckpt.losses.linear_cross_entropy(hidden_BSD, lm_head_DV, targets_BS)

Logits of a large vocabulary are the largest array of many training steps: 8 x 1024 tokens and
151936 ids are 4.6 GiB in float32, and their gradient as much again. The loss ends the forward pass,
so its gradient can be made at once, up to a factor from the backward pass: a chunk's logits become
its part of both gradients and are freed. Nothing is recomputed, and the residuals are as large as
the inputs.

Derivatives: `jax.grad` and `jax.vjp`, and any derivative of a gradient. A Hessian-vector product as
`jax.jvp` of the gradient holds one chunk's logits; `jax.grad` of the gradient holds all logits.
Forward mode of the loss itself is refused; `plain_linear_cross_entropy` supports it. Leave the loss
outside of `jax.checkpoint`, which would run it twice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.losses import inputs
from jaxckpt.losses.chunks import Chunks, choose_chunks, given_chunks, row_statistics
from jaxckpt.losses.placement import Placement, explicit_as_auto
from jaxckpt.transforms.custom_gradient import reverse_only

_NO_FORWARD_MODE = (
    "linear_cross_entropy has reverse-mode gradients (jax.grad, jax.vjp) alone; "
    "plain_linear_cross_entropy has forward mode too"
)


def linear_cross_entropy(
    x,
    w,
    targets,
    *,
    layout: str = "DV",
    chunk_tokens: int | None = None,
    token_shards: int = 1,
    placement: Placement | None = None,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_count: bool = False,
):
    """Computes the cross entropy of `softmax(x @ w)` and integer targets, in nats.

    A token's loss is `lse - logit[target] + z_loss * lse**2`, with `lse` the logsumexp of its
    logits. Products are computed in the dtype of `x` (to which `w` is cast) and summed in float32,
    as is the gradient of `w` over all chunks. Each gradient has its input's dtype. Without
    differentiation no gradient is computed.

    Chunks are cut along the last axis of tokens, at the same positions of every row. So with
    `[B, S, D]` a batch that is sharded over B stays sharded. Do not shard S, which an SPMD program
    would gather for every chunk: pass a sequence in n shards as `[B, n, S / n, D]`.

    Under SPMD, on meshes of `Auto` or `Explicit` axes, `w` may be sharded too. Sharded over V, each
    chunk takes three reductions of one float per token and one of the `[tokens, D]` gradient of
    `x`; logits are not moved. If it is sharded over D (FSDP), use a `placement`, which spreads the
    vocabulary instead, or gather `w` first by `with_sharding_constraint`. If several devices share
    the tokens, the gradient of `w` is reduced over them, by some compilers for every chunk (TPU's
    does it once). With `token_shards` each device sums its own gradient and there is one reduction
    after the loop; then a flattened `[tokens, D]` stays sharded as well.

    Args:
      x: Hidden states `[..., S, D]`, float16, bfloat16, float32 or float64.
      w: The head's weights, floating: `[D, V]`, or `[V, D]` with `layout="VD"`.
      targets: Token ids `[..., S]`, any integer dtype. A target outside 0..V-1 that is not ignored
        makes loss and gradients NaN.
      layout: The axes of `w`: `"DV"`, a dense kernel, or `"VD"`, an embedding table (tied weights).
      chunk_tokens: The number of tokens of one chunk over all devices; it takes a divisor of S from
        every row. By default a chunk's logits are as large as the float32 gradient of `w` (D tokens
        per device) and at least 64 MiB, and the last chunk may be smaller.
      token_shards: The number of devices that the first axis of `x` is sharded over; it divides
        that axis.
      placement: The mesh axes of arrays on a mesh that shards tokens and weights over one axis. It
        sets `token_shards`.
      ignore_index: A target that is not counted, such as padding.
      z_loss: The weight of the squared log-partition function, a Python number (PaLM, Chowdhery et
        al. 2022, section 5: 1e-4).
      reduction: `"mean"` over the counted tokens (0 if no token is counted) or `"sum"`.
      return_count: Whether the number of counted tokens, an int32 scalar, is returned as well.

    Returns:
      The loss, a float32 scalar (float64 if `x` is), or `(loss, count)`.

    Raises:
      ValueError: Shapes, dtypes or options do not match, or a chunk does not divide its rows.
      NotImplementedError: Forward-mode differentiation.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt
      >>> x, w = jnp.ones([2, 8, 4]), jnp.zeros([4, 16])
      >>> loss = jaxckpt.losses.linear_cross_entropy(x, w, jnp.zeros([2, 8], int), chunk_tokens=4)
      >>> print(f"{loss:.4f}")  # log 16
      2.7726
    """
    options = inputs.Options(
        layout=layout, ignore_index=ignore_index, z_loss=z_loss, reduction=reduction
    )
    x, w, targets = jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets)
    inputs.check_arrays(x, w, targets, options)
    if placement is not None:
        if token_shards != 1:
            raise ValueError(f"a placement has its token_shards; {token_shards} are given as well")
        token_shards = placement.num_shards
    # This makes JAX sum the gradient of weights that every device holds whole.
    x, w, targets = inputs.varying_alike(x, w, targets)
    x, targets = _split_shards(x, targets, token_shards)
    vocab_size = w.shape[1 - options.width_axis]
    if chunk_tokens is None:
        chunks = choose_chunks(targets.shape, x.shape[-1], vocab_size, token_shards)
    else:
        chunks = given_chunks(targets.shape, chunk_tokens)
    head = _Head(options=options, chunks=chunks, sharded=token_shards > 1, placement=placement)
    x, w = (reverse_only(array, _NO_FORWARD_MODE) for array in (x, w))
    loss = _jitted(head, x, w, targets)
    if return_count:
        return loss, inputs.counted_tokens(targets, options).sum(dtype=jnp.int32)
    return loss


def _split_shards(x, targets, token_shards: int):
    """Returns both arrays with their first axis split into `[token_shards, rest]` if it is > 1."""
    first = x.shape[0]
    if isinstance(token_shards, bool) or not isinstance(token_shards, int) or token_shards < 1:
        raise ValueError(f"token_shards is {token_shards!r}; valid: an integer, 1 or more")
    if first % token_shards:
        valid = max(n for n in range(1, token_shards) if first % n == 0)
        raise ValueError(
            f"token_shards {token_shards} does not divide {first}, the first axis of x "
            f"{list(x.shape)} (did you mean {valid}?)"
        )
    if token_shards == 1:
        return x, targets
    split = lambda array: array.reshape(token_shards, first // token_shards, *array.shape[1:])
    return split(x), split(targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Head:
    """A loss head without its arrays: hashable, so that equal calls compile once.

    If it is `sharded`, the first axis of `x` is the axis of shards, each with sums of its own.
    """

    options: inputs.Options
    chunks: Chunks
    sharded: bool
    placement: Placement | None = None

    def run(self, x, w, targets, *, differentiated: bool):
        """Returns the loss, and the gradients of `x` and `w`; `()` if not differentiated."""
        call = functools.partial(self._run, differentiated=differentiated)
        return explicit_as_auto(call, (x, w, targets), (x, w) if differentiated else ())

    def _run(self, x, w, targets, *, differentiated: bool):
        ids, weights = self._weigh(targets, w.shape[1 - self.options.width_axis], x)
        kernel = self._spread(w.astype(x.dtype))  # once, not in every chunk
        x = self._tokens(x)
        sums, axis = inputs.accumulator_dtype(x), x.ndim - 2
        shards = x.shape[:1] if self.sharded else ()
        _, total = inputs.varying_alike(x, jnp.zeros(shards, sums))
        state = (total,)
        if differentiated:
            # A chunk's tokens are read only once, so their gradients can overwrite them.
            _, grad_w = inputs.varying_alike(x, jnp.zeros((*shards, *w.shape), sums))
            state += x, self._spread(grad_w)

        def step(state, start, size):
            total, *grads = state
            cut = lambda array: lax.dynamic_slice_in_dim(array, start, size, axis)
            tokens = grads[0] if grads else x
            # Sharded, then gathered: else all tokens would be gathered before a chunk is cut.
            gather = lambda array: self._tokens(self._tokens(array), gathered=True)
            part, *labels = (gather(cut(array)) for array in (tokens, ids, weights))
            loss, grad_logits = self._chunk(part, kernel, *labels)
            if not grads:
                return (total + loss,)
            width_axis = self.options.width_axis
            part_grad = self._dot(grad_logits, kernel, [grad_logits.ndim - 1], [1 - width_axis])
            part_grad = self._tokens(part_grad.astype(x.dtype))
            grad_x = lax.dynamic_update_slice_in_dim(tokens, part_grad, start, axis)
            grad_w = self._spread(grads[1] + self._grad_w(part, grad_logits))
            return total + loss, grad_x, grad_w

        loss, *grads = self.chunks.sweep(step, state)
        if grads:
            grad_w = grads[1].sum(axis=0) if self.sharded else grads[1]
            grads[1] = grad_w.astype(w.dtype)
        return loss.sum(), tuple(grads)

    def _spread(self, w):
        if self.placement is None:
            return w
        lead = (self.placement.shards,) * (w.ndim - 2)
        return self.placement.weights(w, self.options.width_axis, lead)

    def _tokens(self, x, gathered: bool = False):
        if self.placement is None:
            return x
        return self.placement.tokens(x, sharded=self.sharded, gathered=gathered)

    def _weigh(self, targets, vocab_size: int, x):
        """Returns int32 ids, and weights: 0 for ignored tokens, NaN for ids that do not exist."""
        dtype = inputs.accumulator_dtype(x)
        counted = inputs.counted_tokens(targets, self.options)
        known = inputs.in_vocabulary(targets, vocab_size)
        weight = jnp.ones([], dtype)
        if self.options.reduction == "mean":
            weight /= jnp.maximum(counted.sum(dtype=jnp.int32), 1).astype(dtype)
        weights = jnp.where(counted, jnp.where(known, weight, jnp.nan), 0)
        return jnp.where(known, targets, 0).astype(jnp.int32), weights

    def _chunk(self, x, kernel, ids, weights):
        """Returns the loss of a chunk, one per shard, and its logits' gradient in `x`'s dtype.

        The target's logit is picked by comparison, not by index. Comparison is elementwise, so it
        fuses with its neighbors, and a vocabulary over several devices is not gathered.
        """
        logits = self._dot(x, kernel, [x.ndim - 1], [self.options.width_axis])
        is_target = lax.broadcasted_iota(jnp.int32, logits.shape, ids.ndim) == ids[..., None]
        lse, picked = row_statistics(logits, is_target)
        z_loss = self.options.z_loss
        losses = weights * (lse - picked + z_loss * jnp.square(lse))
        loss = losses.sum(axis=range(int(self.sharded), losses.ndim))
        # d lse / d logits is the softmax, and lse has the factor 1 + 2 z lse.
        softmax = jnp.exp(logits - lse[..., None])
        factor = (weights * (1 + 2 * z_loss * lse))[..., None]
        grad = factor * softmax - jnp.where(is_target, weights[..., None], 0)
        return loss, grad.astype(x.dtype)

    def _grad_w(self, x, grad_logits):
        """Returns the gradient of the weights in their layout, one per shard."""
        pair = (x, grad_logits) if self.options.layout == "DV" else (grad_logits, x)
        batch = [0] if self.sharded else []
        tokens = list(range(len(batch), x.ndim - 1))
        return self._dot(*pair, tokens, tokens, batch)

    @staticmethod
    def _dot(a, b, contract_a, contract_b, batch=()):
        numbers = ((contract_a, contract_b), (batch, batch))
        dtype = inputs.accumulator_dtype(a)
        return lax.dot_general(a, b, numbers, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(head: _Head, x, w, targets):
    return head.run(x, w, targets, differentiated=False)[0]


def _forward(head: _Head, x, w, targets):
    # If a gradient is not asked for, XLA removes it from the loop as dead code.
    return head.run(x, w, targets, differentiated=True)


def _backward(head: _Head, grads, cotangent):
    """Returns both gradients times the cotangent, in float32; XLA drops the product if it is 1."""
    scale = lambda grad: (cotangent * grad.astype(cotangent.dtype)).astype(grad.dtype)
    return *map(scale, grads), None


_loss.defvjp(_forward, _backward)
# So that calls outside of `jax.jit` compile only once, too.
_jitted = jax.jit(_loss, static_argnums=0)
