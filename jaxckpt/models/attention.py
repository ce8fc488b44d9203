"""Causal grouped-query attention, by the kernel that suits the chip best.

    out = causal_attention(q, k, v, kind="splash")

Shapes: B batch, S sequence, H query heads, K key/value heads, N head size. Kinds: `cudnn` (NVIDIA's
flash attention), `splash` (Pallas, for TPUs), `chunked` and `plain` (einsums, anywhere) and `auto`,
one of these by the chip of this process. A step for an absent chip names its kind, which
`device_choice.py` chooses.

For every kind, the policy `attention` keeps the residuals of the kernel: its output, and the
logarithm of each row's softmax sum.
"""

import functools

import jax
import jax.numpy as jnp

from jaxckpt.models import device_choice
from jaxckpt.models.chunked_attention import chunked_attention
from jaxckpt.models.config import ModelError
from jaxckpt.models.plain_attention import plain_attention, same_document
from jaxckpt.models.splash import splash_attention
from jaxckpt.plans.errors import check_word


def causal_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS=None, *, kind: str = "plain"):
    """Returns softmax(q k^T / sqrt(N), causal) v.

    Args:
      q_BSHN: Queries; H is a multiple of K.
      k_BSKN: Keys.
      v_BSKN: Values.
      segment_ids_BS: Integers: the document of each token in a packed sequence; a token attends
        only to its own document. None for one document per sequence.
      kind: `"auto"`, `"cudnn"`, `"splash"`, `"chunked"` or `"plain"`.

    Returns:
      `[B, S, H, N]` in the dtype of `q_BSHN`; the softmax is computed in float32.

    Raises:
      ValueError: The kind is unknown, the kernel does not take the dtype or a size, ids are no
        `[B, S]` integers, or cuDNN is missing in the tracing process.

    Example:
      >>> import jax.numpy as jnp
      >>> causal_attention(jnp.ones([2, 8, 4, 16]), *2 * [jnp.ones([2, 8, 2, 16])]).shape
      (2, 8, 4, 16)
    """
    size, head_dim = q_BSHN.shape[1], q_BSHN.shape[-1]
    packed = segment_ids_BS is not None
    if packed:
        ids, shape = segment_ids_BS, q_BSHN.shape[:2]
        if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids are {ids.dtype.name}{list(ids.shape)}; valid: integers "
                f"{list(shape)}, one a token"
            )
    sizes = {"dtype": q_BSHN.dtype.name, "head_dim": head_dim, "seq_len": size}
    if kind == "auto":
        device = device_choice.local_device()
        kind, _ = device_choice.choose_attention(device, packed=packed, **sizes)
    check_word("attention", kind, ("auto", *_KERNELS), ModelError)
    refusal = device_choice.refused_sizes(kind, packed=packed, **sizes)
    if refusal:
        raise ModelError(f"attention {kind!r} {refusal}; 'plain' takes any")
    return _KERNELS[kind](q_BSHN, k_BSKN, v_BSKN, segment_ids_BS)


def _cudnn(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS):
    """Returns cuDNN's attention; packed documents become a `[B, 1, S, S]` mask in q's dtype."""
    ids = segment_ids_BS
    mask = None if ids is None else same_document(ids, ids)[:, None]
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation="cudnn"
    )
    try:
        return attend(q_BSHN, k_BSKN, v_BSKN)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ModelError(
            f"attention 'cudnn' needs cuDNN where it is traced, and this process has none "
            f"({error}); use 'auto' or 'plain', or build a step for an absent GPU by "
            "jaxckpt.absent.jobs.Entry"
        ) from None


_KERNELS = {
    "cudnn": _cudnn,
    "splash": splash_attention,
    "chunked": chunked_attention,
    "plain": plain_attention,
}
