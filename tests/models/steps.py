"""The Transformer's loss and gradients as entries that worker processes import."""

import jax
import jax.numpy as jnp

from jaxckpt.models import Transformer, TransformerConfig, next_token_loss, resolve

TOKENS = (2, 1025)


def config(**changes) -> TransformerConfig:
    """Returns four blocks whose heads every kernel takes."""
    sizes = {"num_blocks": 4, "d_model": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128}
    return TransformerConfig(**sizes | {"d_ff": 512} | changes)


def gradients(plan: str, packed: bool = False, **changes):
    """Returns `(step, args, donated)` of the model's loss and gradients."""
    model = Transformer(config(**changes), remat=plan)

    def step(params, tokens_BS):
        def loss(params):
            ids_BS = jnp.cumsum(tokens_BS[:, :-1] == 0, axis=1) if packed else None
            x_BSD = model.apply({"params": params}, tokens_BS[:, :-1], ids_BS, method="features")
            return next_token_loss(x_BSD, params, tokens_BS[:, 1:], model.config)

        return jax.value_and_grad(loss)(params)

    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return step, (params, tokens), ()


def resolved_gradients(plan: str, target: str, packed: bool = False):
    """Returns the step of the kernel and dtype that `auto` is on a target."""
    found = resolve(config(), target, seq_len=TOKENS[1] - 1, packed=packed).config
    return gradients(plan, packed, dtype=found.dtype, attention=found.attention)
