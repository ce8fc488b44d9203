"""Derivatives beyond the gradient: right, or an error that says what has them."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.losses import linear_cross_entropy, plain_linear_cross_entropy
from tests.losses.cases import inputs
from tests.transforms.cases import relative_error

X, W, TARGETS = inputs((2, 6))


def chunked(x, w):
    return linear_cross_entropy(x, w, TARGETS, chunk_tokens=4, z_loss=0.01)


def plain(x, w):
    return plain_linear_cross_entropy(x, w, TARGETS, z_loss=0.01)


ON = lambda f: lambda x, w: f(x, w)  # of its own, so that nothing traced before is found


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jvp(f, (X, W), (X, W)),
        lambda f: jax.jvp(jax.jit(f), (X, W), (X, W)),
        lambda f: jax.jit(lambda x, w: jax.jvp(f, (x, w), (x, w)))(X, W),
        lambda f: jax.jvp(lambda w: f(X, w), (W,), (W,)),
        lambda f: jax.linearize(f, X, W)[1](X, W),
        lambda f: jax.linearize(jax.jit(f), X, W)[1](X, W),
        lambda f: jax.jacfwd(f)(X, W),
        lambda f: jax.jacfwd(jax.jit(f), 1)(X, W),
        lambda f: jax.jvp(lambda w: jax.vmap(f, (0, None))(X[None], w).sum(), (W,), (W,)),
        lambda f: jax.jvp(
            lambda w: jax.lax.scan(lambda c, x: (c + f(x, w), None), 0.0, X[None])[0], (W,), (W,)
        ),
        lambda f: jax.jvp(jax.checkpoint(f), (X, W), (X, W)),
        lambda f: jax.jvp(lambda x: jax.jvp(f, (x, W), (x, W))[1], (X,), (X,)),
        lambda f: jax.grad(lambda x: jax.jvp(f, (x, W), (x, W))[1])(X),
    ],
)
def test_forward_mode_names_what_has_it(transform):
    with pytest.raises(NotImplementedError, match="plain_linear_cross_entropy has forward mode"):
        jax.block_until_ready(transform(ON(chunked)))
    jax.block_until_ready(transform(ON(plain)))


def test_other_type_errors_are_not_swallowed():
    with pytest.raises(TypeError):
        linear_cross_entropy(X, "w", TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jvp(jax.grad(f, (0, 1)), (X, W), (W.sum() * X, W))[1],
        lambda f: jax.grad(lambda x, w: jnp.sin(jax.grad(f)(x, w)).sum(), (0, 1))(X, W),
        lambda f: jax.hessian(f)(X, W),
    ],
)
def test_second_derivatives(transform):
    assert relative_error(jax.jit(transform, static_argnums=0)(chunked), transform(plain)) < 1e-5
