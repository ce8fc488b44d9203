"""Inputs and comparisons that the tests of losses share."""

import jax
import jax.numpy as jnp

from jaxckpt.losses import linear_cross_entropy, plain_linear_cross_entropy

WIDTH, VOCAB = 8, 50


def inputs(tokens=(2, 12), dtype="float32", layout="DV", seed=0):
    """Returns `(x, w, targets)`; weights are large enough for a peaked softmax."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*tokens, WIDTH)).astype(dtype)
    w = jax.random.normal(keys[1], (WIDTH, VOCAB)).astype(dtype)
    targets = jax.random.randint(keys[2], tokens, 0, VOCAB)
    return x, w if layout == "DV" else w.T, targets


def gradients(loss, x, w, targets, **options):
    """Returns the jitted loss and its gradients of `x` and `w`."""
    run = jax.value_and_grad(lambda x, w: loss(x, w, targets, **options), (0, 1))
    return jax.jit(run)(x, w)


def pair(x, w, targets, chunk_tokens=None, **options):
    """Returns loss and gradients, chunked and plain."""
    got = gradients(linear_cross_entropy, x, w, targets, chunk_tokens=chunk_tokens, **options)
    return got, gradients(plain_linear_cross_entropy, x, w, targets, **options)


def all_finite(tree) -> bool:
    """Returns whether no leaf holds NaN or infinity."""
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
