"""The loss head: next-token cross entropy of the features, without all logits at once."""

from jaxckpt.losses import linear_cross_entropy
from jaxckpt.models.config import TransformerConfig
from jaxckpt.models.sharding import Layout


def next_token_loss(
    x_BSD, params, targets_BS, config: TransformerConfig, layout: Layout | None = None, **options
):
    """Returns the mean cross entropy in nats per token, a float32 scalar.

    Logits are products in the dtype of `x_BSD`, summed in float32. They are made, and turned into
    gradients, a chunk of tokens at a time.

    Args:
      x_BSD: The features that the Transformer's method `features` returns.
      params: The Transformer's parameters, with the head.
      targets_BS: The token id that follows each position.
      config: The Transformer's configuration.
      layout: The Transformer's layout on a mesh; None on one device.
      **options: Options of `jaxckpt.losses.linear_cross_entropy`, such as `chunk_tokens`.

    Raises:
      ValueError: Shapes, dtypes or options do not match.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxckpt.models import Transformer, TransformerConfig, next_token_loss
      >>> config = TransformerConfig(num_blocks=2)
      >>> model, tokens = Transformer(config), jnp.zeros([1, 9], int)
      >>> params = model.init(jax.random.key(0), tokens[:, :-1])["params"]
      >>> x = model.apply({"params": params}, tokens[:, :-1], method="features")
      >>> next_token_loss(x, params, tokens[:, 1:], config).dtype
      dtype('float32')
    """
    if layout is not None:
        options["placement"] = layout.head()
    if config.tied_embeddings:
        table_VD = params["embed_tokens"]["embedding"]
        return linear_cross_entropy(x_BSD, table_VD, targets_BS, layout="VD", **options)
    return linear_cross_entropy(x_BSD, params["lm_head"]["kernel"], targets_BS, **options)
