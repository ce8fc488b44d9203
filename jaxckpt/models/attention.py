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
from jaxckpt.plans.errors import nearest


def causal_attention(q_BSHN, k_BSKN, v_BSKN, segment_ids_BS=None, *, kind: str = "plain"):
    """Returns softmax(q k^T / sqrt(N), causal) v.

    Args:
      q_BSHN: Queries; H is a multiple of K.
      k_BSKN: Keys.
      v_BSKN: Values.
      segment_ids_BS: Integers: the document of each token in a packed row; a token attends only to
        its own document. None for one document per row.
      kind: `"auto"`, `"cudnn"`, `"splash"`, `"chunked"` or `"plain"`.

    Returns:
      `[B, S, H, N]` in the dtype of `q_BSHN`; the softmax is computed in float32.

    Raises:
      ValueError: The kind is unknown, the kernel does not take the dtype or a size, ids are no
        `[B, S]` integers, or cuDNN is missing in the tracing process.
    """
    size, head_dim = q_BSHN.shape[1], q_BSHN.shape[-1]
    if segment_ids_BS is not None:
        _check_segment_ids(segment_ids_BS, q_BSHN.shape[:2])
    sizes = {"dtype": q_BSHN.dtype.name, "head_dim": head_dim, "seq_len": size}
    packed = segment_ids_BS is not None
    if kind == "auto":
        kind, _ = device_choice.choose_attention(
            device_choice.local_device(), packed=packed, **sizes
        )
    if kind not in _KERNELS:
        valid = ("auto", *_KERNELS)
        raise ModelError(f"attention is {kind!r}; valid: {', '.join(valid)}{nearest(kind, valid)}")
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


def _check_segment_ids(segment_ids, shape: tuple[int, ...]):
    if segment_ids.shape != shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids are {segment_ids.dtype.name}{list(segment_ids.shape)}; valid: integers "
            f"{list(shape)}, one a token"
        )
