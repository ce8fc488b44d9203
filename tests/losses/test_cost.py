"""What the loss costs: products, bytes, arrays of tokens times vocabulary, compilations."""

import logging
import math

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import count_flops
from jaxckpt.losses import chunks, linear_cross_entropy, plain_linear_cross_entropy
from jaxckpt.transforms.jaxprs import COPIES, equations
from tests.losses.cases import inputs

TOKENS, WIDTH, VOCAB = (4, 128), 32, 4096
ARGS = (
    jax.ShapeDtypeStruct((*TOKENS, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((WIDTH, VOCAB), jnp.float32),
    jax.ShapeDtypeStruct(TOKENS, jnp.int32),
)
LOGIT_BYTES = 4 * math.prod(TOKENS) * VOCAB
ONE_PRODUCT = 2 * math.prod(TOKENS) * WIDTH * VOCAB


def chunked(chunk_tokens=None, **options):
    return lambda x, w, targets: linear_cross_entropy(
        x, w, targets, chunk_tokens=chunk_tokens, **options
    )


def both(loss):
    return jax.value_and_grad(loss, (0, 1))


def flops(fn) -> int:
    return count_flops(jax.make_jaxpr(fn)(*ARGS))


def temp(fn, args=ARGS) -> int:
    return jaxckpt.measure(fn, *args).temp_bytes


@pytest.mark.parametrize("options", [{}, {"token_shards": 2, "z_loss": 0.1, "ignore_index": 0}])
@pytest.mark.parametrize("chunk_tokens", [None, 512, 64, 4])
def test_three_products_and_one_without_gradient(chunk_tokens, options):
    loss = chunked(chunk_tokens, **options)
    assert flops(loss) == ONE_PRODUCT
    assert flops(both(loss)) == 3 * ONE_PRODUCT
    # The twin: a recomputed loss has the fourth.
    assert flops(both(jax.checkpoint(plain_linear_cross_entropy))) == 4 * ONE_PRODUCT


def test_a_smaller_last_chunk_costs_no_padding(monkeypatch):
    monkeypatch.setattr(chunks, "_SMALL_BYTES", 4 * VOCAB * 200)
    cut = chunks.choose_chunks(TOKENS, WIDTH, VOCAB, 1)
    assert 128 % cut.size and cut.size == 43
    assert flops(both(chunked())) == 3 * ONE_PRODUCT


def largest_array(fn) -> int:
    made = [e for e in equations(jax.make_jaxpr(fn)(*ARGS)) if e.primitive.name not in COPIES]
    return max(math.prod(var.aval.shape) for equation in made for var in equation.outvars)


def test_no_array_of_tokens_times_vocabulary_but_in_a_chunk():
    whole = math.prod(TOKENS) * VOCAB
    for chunk_tokens in (128, 64):
        assert largest_array(both(chunked(chunk_tokens))) == chunk_tokens * VOCAB
        assert largest_array(chunked(chunk_tokens)) == chunk_tokens * VOCAB
    assert largest_array(both(plain_linear_cross_entropy)) == whole


def test_temp_is_below_the_logits_and_falls_with_the_chunk():
    """Two arrays of a chunk's logits and the sums of the weights, whatever the tokens are."""
    sums = 4 * WIDTH * VOCAB
    assert temp(both(plain_linear_cross_entropy)) > 1.9 * LOGIT_BYTES
    previous = temp(both(chunked(256)))
    for chunk_tokens in (128, 64, 32):
        now = temp(both(chunked(chunk_tokens)))
        logits = 4 * chunk_tokens * VOCAB
        assert now < 2 * logits + 2 * sums < LOGIT_BYTES
        # Twice the chunk is two more arrays of logits, if all of it is logits.
        assert 1.8 * logits < previous - now < 2.2 * logits
        previous = now


def test_temp_does_not_grow_with_the_tokens():
    x, w, targets = ARGS
    longer = (
        jax.ShapeDtypeStruct((4, 512, WIDTH), x.dtype),
        w,
        jax.ShapeDtypeStruct((4, 512), targets.dtype),
    )
    extra = temp(both(chunked(64)), longer) - temp(both(chunked(64)))
    assert extra < 3 * 4 * 512 * WIDTH * 4  # arrays as x, not logits: a fortieth of these
    plain = both(plain_linear_cross_entropy)
    assert temp(plain, longer) > 3.9 * temp(plain)


@pytest.mark.parametrize("is_read_again", [False, True])
def test_gradients_take_the_place_of_the_tokens(is_read_again):
    """Where nobody reads the tokens after the loss, they and their gradient are one array."""
    tokens, width = 4096, 256
    shapes = ((tokens, width), jnp.float32), ((width, 64), jnp.float32), ((tokens,), jnp.int32)

    def step(x, w, targets):
        def loss(x, w):
            x = jnp.sin(x)
            found = linear_cross_entropy(x, w, targets, chunk_tokens=64)
            return found, x if is_read_again else ()

        return jax.grad(loss, (0, 1), has_aux=True)(x, w)

    report = jaxckpt.measure(step, *(jax.ShapeDtypeStruct(*one) for one in shapes))
    held = report.peak_bytes - report.argument_bytes
    assert (held < 1.5 * 4 * tokens * width) == (not is_read_again)


def test_undifferentiated_holds_no_gradient():
    sums = 4 * WIDTH * VOCAB
    assert temp(chunked(4)) < sums
    assert largest_array(chunked(4)) == 4 * VOCAB < WIDTH * VOCAB
    names = [e.primitive.name for e in equations(jax.make_jaxpr(chunked(4))(*ARGS))]
    assert names.count("dot_general") == 1
    names = [e.primitive.name for e in equations(jax.make_jaxpr(both(chunked(4)))(*ARGS))]
    assert names.count("dot_general") == 3


def test_a_gradient_nobody_asks_for_is_removed():
    """Frozen weights: the sums of their gradient, and its product, are not in the program."""
    sums = 4 * WIDTH * VOCAB
    only_x = jax.grad(chunked(4))
    assert temp(only_x) < sums
    dots = lambda fn: jax.jit(fn).lower(*ARGS).compile().as_text().count(" dot(")
    assert dots(only_x) < dots(jax.grad(chunked(4), (0, 1)))


@pytest.mark.slow
def test_a_hessian_vector_product_holds_one_chunk():
    def product(x, w, targets):
        gradient = lambda x, w: jax.grad(chunked(32), (0, 1))(x, w, targets)
        return jax.jvp(gradient, (x, w), (x, w))

    assert temp(product) < 0.6 * LOGIT_BYTES


@pytest.mark.slow
def test_nothing_compiles_on_a_second_call(caplog):
    x, w, targets = inputs()
    traced = chex.assert_max_traces(lambda x, w: linear_cross_entropy(x, w, targets), n=1)
    step = jax.jit(jax.value_and_grad(traced, (0, 1)))
    eager = lambda x: (
        linear_cross_entropy(x, w, targets, chunk_tokens=8),
        jax.grad(lambda x: linear_cross_entropy(x, w, targets, chunk_tokens=8))(x),
    )
    counts = []
    for shift in (0.0, 1.0):
        moved = x + shift
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            step(moved, w)
            eager(moved)
        counts.append(sum("Compiling" in record.getMessage() for record in caplog.records))
    assert counts[0] > 0 == counts[1]
