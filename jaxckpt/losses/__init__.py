"""Loss heads whose memory does not grow with tokens times vocabulary."""

from jaxckpt.losses.linear import linear_cross_entropy
from jaxckpt.losses.plain import plain_linear_cross_entropy

__all__ = ["linear_cross_entropy", "plain_linear_cross_entropy"]
