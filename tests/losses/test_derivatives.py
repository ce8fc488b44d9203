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


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.jvp(f, (X, W), (X, W)),
        lambda f: jax.jacfwd(f)(X, W),
    ],
)
def test_forward_mode_names_what_has_it(transform):
    with pytest.raises(NotImplementedError, match="plain_linear_cross_entropy has forward mode"):
        transform(chunked)
    transform(plain)


def test_forward_mode_under_jit_is_refused_by_jax():
    """It is found when the program is lowered, outside of this library's functions."""
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jit(lambda x, w: jax.jvp(chunked, (x, w), (x, w)))(X, W)


def test_other_type_errors_are_not_swallowed():
    with pytest.raises(TypeError):
        linear_cross_entropy(X, "w", TARGETS)


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
