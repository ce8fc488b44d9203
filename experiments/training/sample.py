"""Sampling text from a trained model, to show what it has learned."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import TrainConfig
from experiments.data.tokenizer import Tokenizer
from jaxckpt.models import Transformer

_TEMPERATURE = 0.8


def sample_text(
    config: TrainConfig,
    params,
    prompt: np.ndarray,
    length: int,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Returns the end of a prompt and `length` sampled tokens as text.

    Each token runs the whole window again: simple, and fast enough for a few lines. Without a
    tokenizer, tokens below 256 are bytes.
    """
    model = Transformer(config.model, remat="none")

    @jax.jit
    def draw(window_S, key):
        logits_V = model.apply({"params": params}, window_S[None])[0, -1].astype(jnp.float32)
        token = jax.random.categorical(key, logits_V / _TEMPERATURE)
        return jnp.append(window_S[1:], token.astype(window_S.dtype))

    window_S = jnp.asarray(prompt[: config.seq_len], jnp.int32)
    drawn = []
    for key in jax.random.split(jax.random.key(config.seed), length):
        window_S = draw(window_S, key)
        drawn.append(int(window_S[-1]))
    return "|".join(_text(part, config, tokenizer) for part in (prompt[-40:], np.array(drawn)))


def _text(tokens: np.ndarray, config: TrainConfig, tokenizer: Tokenizer | None) -> str:
    if tokenizer is not None:
        return _printable(tokenizer.decode(tokens))
    if config.model.vocab_size > 256:
        return " ".join(str(token) for token in tokens)  # no tokenizer to turn them into text
    return _printable(bytes(tokens.astype(np.uint8)).decode("utf-8", errors="replace"))


def _printable(text: str) -> str:
    is_shown = lambda c: c.isprintable() or c in "\n\t"
    return "".join(c if is_shown(c) else "\N{REPLACEMENT CHARACTER}" for c in text)
