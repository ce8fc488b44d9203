"""The chunk that is chosen, and one clear line for what does not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.losses import linear_cross_entropy, plain_linear_cross_entropy
from jaxckpt.losses.chunks import Chunks, choose_chunks, given_chunks
from tests.losses.cases import VOCAB, WIDTH, inputs


@pytest.mark.parametrize(
    "tokens, width, vocab, shards, size",
    [
        ((8, 1024), 1024, 151936, 1, 128),  # Qwen3-0.6B: D tokens are 128 of each of 8 rows
        ((8, 1024), 1024, 151936, 8, 1024),  # D tokens a device are all of them
        ((2, 16384), 1024, 151936, 1, 512),
        ((8192,), 1024, 151936, 1, 1024),
        ((8, 1000), 1024, 151936, 1, 125),  # as even as may be: 8 chunks
        ((64, 512), 64, 256, 1, 512),  # bytes: 64 MiB are 65536 tokens, all of them
        ((64, 2048), 64, 256, 1, 1024),
        ((5000, 3), 1024, 151936, 1, 1),  # a position of every row is the least
        ((8, 0), 64, 256, 1, 1),
        ((0, 8), 64, 256, 1, 8),
    ],
)
def test_chosen_chunk(tokens, width, vocab, shards, size):
    assert choose_chunks(tokens, width, vocab, shards) == Chunks(length=tokens[-1], size=size)


def test_chunks_cover_every_position_once():
    step = lambda seen, start, size: seen.at[start + jnp.arange(size)].add(1)
    for length, size in ((0, 1), (1, 1), (3, 1), (4, 2), (5, 2), (6, 6), (7, 6), (13, 4)):
        sweep = jax.jit(Chunks(length=length, size=size).sweep, static_argnums=0)
        assert sweep(step, jnp.zeros(length, int)).tolist() == [1] * length


def test_given_chunk():
    assert given_chunks((8, 1024), 512) == Chunks(length=1024, size=64)
    assert given_chunks((2, 4, 6), 16) == Chunks(length=6, size=2)


@pytest.mark.parametrize(
    "chunk_tokens, message",
    [
        (100, "100 does not cut 2 rows of 12 positions evenly; nearest valid: 24; "),
        (10, "10 does not cut .* nearest valid: 8, 12; a chunk takes a divisor of 12"),
        (0, "0 does not cut .* nearest valid: 2; "),
        (8.0, "chunk_tokens is 8.0; valid: an integer or None"),
    ],
)
def test_chunk_that_does_not_divide(chunk_tokens, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs(), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(
    "shards, message",
    [
        (3, r"token_shards 3 does not divide 2, .* \[2, 12, 8\] \(did you mean 2\?\)"),
        (0, "token_shards is 0; valid: an integer, 1 or more"),
        (True, "token_shards is True"),
    ],
)
def test_shards_that_do_not_divide(shards, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs(), token_shards=shards)


@pytest.mark.parametrize("loss", [linear_cross_entropy, plain_linear_cross_entropy])
@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {"layout": "VD"}, r"layout 'VD', but D is 8.*did you mean layout='DV'\?"),
        ({}, {"layout": "dv"}, r"layout is 'dv'; valid: DV, VD"),
        (
            {},
            {"reduction": "means"},
            r"reduction is 'means'; valid: mean, sum \(did you mean 'mean",
        ),
        ({}, {"z_loss": -1.0}, "z_loss is -1.0; valid: a Python number, 0 or more"),
        ({}, {"z_loss": float("nan")}, "z_loss is nan"),
        ({}, {"z_loss": jnp.float32(1)}, "z_loss is .*; valid: a Python number"),
        ({}, {"ignore_index": 1.0}, "ignore_index is 1.0; valid: a Python integer or None"),
        ({"targets": "uint8"}, {"ignore_index": -100}, "-100 is no uint8, .* valid: 0 to 255"),
        ({"targets": "float32"}, {}, "targets are float32; valid: an integer dtype"),
        ({"targets": (3,)}, {}, r"targets are \[3\]; valid: \[2, 12\], as x"),
        ({"x": "int32"}, {}, "x is int32; valid: float16, bfloat16, float32, float64"),
        ({"x": (8,)}, {}, r"x is \[8\]; valid: \[..., tokens, D\]"),
        ({"w": "int32"}, {}, r"w is int32\[8, 50\]; valid: floating, two axes, layout DV"),
        ({"w": (9, 50)}, {}, r"w is \[9, 50\] with layout 'DV', but D is 8, the last axis of x$"),
    ],
)
def test_what_does_not_go_together(loss, change, options, message):
    arrays = dict(zip(("x", "w", "targets"), inputs(), strict=True))
    for name, new in change.items():
        same = arrays[name]
        arrays[name] = same.astype(new) if isinstance(new, str) else jnp.zeros(new, same.dtype)
    with pytest.raises(ValueError, match=message):
        loss(**arrays, **options)


def test_numpy_and_negative_ignored_targets():
    x, w, targets = map(np.array, inputs())
    targets[0, :6] = -100
    loss, count = linear_cross_entropy(x, w, targets, ignore_index=-100, return_count=True)
    assert count == 18 and count.dtype == jnp.int32
    assert loss.shape == () and x.shape[-1] == WIDTH and w.shape[-1] == VOCAB
