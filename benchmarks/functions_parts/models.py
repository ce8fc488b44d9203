"""The models of `benchmarks.functions`: seven models in plain JAX without a stack of equal blocks.

A model is a function `run(params, inputs, key, wrap)`. The model applies `wrap` to each stage. The
function `wrap` is the identity or `jax.checkpoint`, as a user would write it by hand. Convolutions
and products run in the dtype of the inputs. `MODELS` has two sizes of each model: the size of the
benchmark, and a small size for a CPU.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Size = dict[str, Any]
_NHWC = ("NHWC", "HWIO", "NHWC")


def _draw(key, *shape, scale: float | None = None):
    fan = 1
    for size in shape[:-1]:
        fan *= size
    return jax.random.normal(key, shape) * (fan**-0.5 if scale is None else scale)


def _keys(key, count: int):
    return list(jax.random.split(key, count))


def _conv(x, weight, stride: int = 1):
    return lax.conv_general_dilated(
        x, weight.astype(x.dtype), (stride, stride), "SAME", dimension_numbers=_NHWC
    )


def _normed(x, axes, scale, bias):
    y = x.astype(jnp.float32)
    y = (y - y.mean(axes, keepdims=True)) * lax.rsqrt(y.var(axes, keepdims=True) + 1e-5)
    return (y * scale + bias).astype(x.dtype)


def _group_norm(x, p, groups: int = 8):
    y = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    shape = (groups, x.shape[-1] // groups)
    return _normed(y, axes, p["scale"].reshape(shape), p["bias"].reshape(shape)).reshape(x.shape)


def _layer_norm(x, p):
    return _normed(x, (-1,), p["scale"], p["bias"])


def _norm(width: int):
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def _dot(x, weight):
    return x @ weight.astype(x.dtype)


def _dropped(x, key, rate: float):
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


# --- U-Net: its skips are alive over all stages between them -------------------------------------


def unet_params(key, size: Size):
    """Returns two convolutions, their norms and a skip for each stage down and up."""
    widths, made = size["widths"], {"down": [], "up": []}
    keys = iter(_keys(key, 8 * len(widths) + 2))

    def stage(i: int, o: int):
        return {
            "norms": [_norm(i), _norm(o)],
            "convs": [_draw(next(keys), 3, 3, i, o), _draw(next(keys), 3, 3, o, o)],
            "skip": _draw(next(keys), 1, 1, i, o),
        }

    before = widths[0]
    for width in widths:
        made["down"].append(stage(before, width))
        before = width
    for width in reversed(widths):
        made["up"].append(stage(before + width, width))
        before = width
    return made | {"in": _draw(next(keys), 3, 3, 3, widths[0])}


def unet(params, inputs, key, wrap):
    """Returns an image from an image; each stage up reads the result of one stage down."""

    def stage(p, x):
        h = _conv(jax.nn.silu(_group_norm(x, p["norms"][0])), p["convs"][0])
        h = _conv(jax.nn.silu(_group_norm(h, p["norms"][1])), p["convs"][1])
        return h + _conv(x, p["skip"])

    x, skips = _conv(inputs["image"], params["in"]), []
    for p in params["down"]:
        x = wrap(stage)(p, x)
        skips.append(x)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    for p in params["up"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = wrap(stage)(p, jnp.concatenate([x, skips.pop()], axis=-1))
    return x


def image(size: Size, dtype):
    """Returns a batch of images."""
    shape = (size["batch"], size["side"], size["side"], 3)
    return {"image": jnp.ones(shape, dtype)}


# --- An encoder-processor-decoder graph network, rolled out -------------------------------------


def _mlp_params(key, i: int, width: int):
    keys = _keys(key, 2)
    return {"a": _draw(keys[0], i, width), "b": _draw(keys[1], width, width), "norm": _norm(width)}


def _mlp(p, x):
    return _layer_norm(_dot(jax.nn.silu(_dot(x, p["a"])), p["b"]), p["norm"])


def graph_params(key, size: Size):
    """Returns the weights of the encoder, the processor's rounds and the decoder."""
    width, channels = size["width"], size["channels"]
    keys = _keys(key, 2 * size["rounds"] + 7)
    layer = lambda a, b: {
        "edge": _mlp_params(a, 3 * width, width),
        "node": _mlp_params(b, 2 * width, width),
    }
    return {
        "grid": _mlp_params(keys[0], channels, width),
        "edges": _draw(keys[1], 4, width),
        "up": layer(keys[2], keys[3]),
        "down": layer(keys[4], keys[5]),
        "out": _draw(keys[6], width, channels),
        "rounds": [layer(*keys[7 + 2 * n : 9 + 2 * n]) for n in range(size["rounds"])],
    }


def graph_network(params, inputs, key, wrap):
    """Returns the grid's values after two steps of encoder, message passing and decoder."""

    def passed(p, nodes, others, edges, senders, receivers):
        sent = jnp.concatenate([edges, nodes[senders], others[receivers]], axis=-1)
        edges = edges + _mlp(p["edge"], sent)
        summed = jax.ops.segment_sum(edges, receivers, others.shape[0])
        return edges, others + _mlp(p["node"], jnp.concatenate([others, summed], axis=-1))

    count, dtype = inputs["mesh"].shape[0], inputs["grid"].dtype
    passing = wrap(passed)
    state = inputs["grid"]
    for _ in range(2):  # the rollout
        grid = wrap(_mlp)(params["grid"], state)
        mesh = jnp.zeros((count, grid.shape[-1]), dtype)
        up = _dot(inputs["up_features"], params["edges"])
        _, mesh = passing(params["up"], grid, mesh, up, inputs["up_from"], inputs["up_to"])
        edges = _dot(inputs["mesh_features"], params["edges"])
        for p in params["rounds"]:
            edges, mesh = passing(p, mesh, mesh, edges, inputs["mesh_from"], inputs["mesh_to"])
        _, grid = passing(params["down"], mesh, grid, up, inputs["up_to"], inputs["up_from"])
        state = state + _dot(grid, params["out"])
    return state


def mesh_graph(size: Size, dtype):
    """Returns values on a grid, and the edges from grid to mesh and inside the mesh."""
    grid, mesh = size["grid"], size["mesh"]
    place = jnp.arange(grid)
    near = jnp.concatenate([jnp.arange(mesh)] * 6)
    return {
        "grid": jnp.ones((grid, size["channels"]), dtype),
        "mesh": jnp.zeros((mesh, 1), dtype),
        "up_from": place,
        "up_to": place * mesh // grid,
        "up_features": jnp.ones((grid, 4), dtype),
        "mesh_from": near,
        "mesh_to": (near * 7 + jnp.arange(len(near)) + 1) % mesh,
        "mesh_features": jnp.ones((len(near), 4), dtype),
    }


# --- ResNet-50 with BatchNorm's statistics passed from stage to stage ----------------------------


def resnet_params(key, size: Size):
    """Returns bottlenecks of three convolutions."""
    keys = iter(_keys(key, 4 * sum(size["depths"]) + 2))
    width, made, before = size["width"], [], size["width"]
    for level, depth in enumerate(size["depths"]):
        inner = width * 2**level
        for place in range(depth):
            block = {
                "convs": [
                    _draw(next(keys), 1, 1, before, inner),
                    _draw(next(keys), 3, 3, inner, inner),
                    _draw(next(keys), 1, 1, inner, 4 * inner),
                ],
                "norms": [_norm(inner), _norm(inner), _norm(4 * inner)],
            }
            if place == 0:
                block["skip"] = _draw(next(keys), 1, 1, before, 4 * inner)
            made.append(block)
            before = 4 * inner
    return {"in": _draw(next(keys), 7, 7, 3, width), "norm": _norm(width), "blocks": made}


def resnet(params, inputs, key, wrap):
    """Returns features and the running statistics of every BatchNorm."""

    def batch_norm(x, p, running):
        y = x.astype(jnp.float32)
        found = (y.mean((0, 1, 2)), y.var((0, 1, 2)))
        running = [0.9 * old + 0.1 * new for old, new in zip(running, found, strict=True)]
        return _normed(x, (0, 1, 2), p["scale"], p["bias"]), running

    def block(p, x, running, stride: int):
        y, made = x, []
        for n, (weight, norm) in enumerate(zip(p["convs"], p["norms"], strict=True)):
            y = _conv(y, weight, stride if n == 1 else 1)
            y, statistics = batch_norm(y, norm, running[n])
            made.append(statistics)
            y = jax.nn.relu(y) if n < 2 else y
        skip = _conv(x, p["skip"], stride) if "skip" in p else x
        return jax.nn.relu(y + skip), made

    x = _normed(_conv(inputs["image"], params["in"], 2), (0, 1, 2), **params["norm"])
    x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    statistics = []
    for n, p in enumerate(params["blocks"]):
        stride = 2 if n and "skip" in p else 1
        running = [[jnp.zeros(norm["scale"].shape)] * 2 for norm in p["norms"]]
        x, made = wrap(functools.partial(block, stride=stride))(p, x, running)
        statistics.append(made)
    return x, statistics


# --- MLP-Mixer ------------------------------------------------------------------------------------


def mixer_params(key, size: Size):
    """Returns the weights of token and channel mixing for each layer."""
    width, tokens = size["width"], (size["side"] // size["patch"]) ** 2
    keys = iter(_keys(key, 4 * size["depth"] + 1))
    layer = lambda: {
        "norms": [_norm(width), _norm(width)],
        "tokens": [_draw(next(keys), tokens, width // 2), _draw(next(keys), width // 2, tokens)],
        "channels": [_draw(next(keys), width, 4 * width), _draw(next(keys), 4 * width, width)],
    }
    layers = [layer() for _ in range(size["depth"])]
    return {"in": _draw(next(keys), size["patch"] ** 2 * 3, width), "layers": layers}


def mixer(params, inputs, key, wrap):
    """Returns the features of each patch."""

    def mlp(x, weights):
        return _dot(jax.nn.gelu(_dot(x, weights[0])), weights[1])

    def layer(p, x):
        x = x + mlp(_layer_norm(x, p["norms"][0]).swapaxes(1, 2), p["tokens"]).swapaxes(1, 2)
        return x + mlp(_layer_norm(x, p["norms"][1]), p["channels"])

    x = inputs["image"]
    batch, side, patch = x.shape[0], x.shape[1], int((params["in"].shape[0] // 3) ** 0.5)
    x = x.reshape(batch, side // patch, patch, side // patch, patch, 3).swapaxes(2, 3)
    x = _dot(x.reshape(batch, (side // patch) ** 2, -1), params["in"])
    for p in params["layers"]:
        x = wrap(layer)(p, x)
    return x


# --- A Fourier neural operator: complex values, and products are not the largest cost ------------


def fourier_params(key, size: Size):
    """Returns complex weights as pairs of real weights, and a skip for each layer."""
    width, modes = size["width"], size["modes"]
    keys = iter(_keys(key, 3 * size["depth"] + 1))
    layers = [
        {
            "real": _draw(next(keys), modes, modes, width, width, scale=1 / width),
            "imaginary": _draw(next(keys), modes, modes, width, width, scale=1 / width),
            "skip": _draw(next(keys), width, width),
        }
        for _ in range(size["depth"])
    ]
    return {"in": _draw(next(keys), 3, width), "layers": layers}


def fourier(params, inputs, key, wrap):
    """Returns a field from a field; each layer multiplies its lowest modes."""

    def layer(p, x):
        side, modes = x.shape[1], p["real"].shape[0]
        waves = jnp.fft.rfft2(x.astype(jnp.float32), axes=(1, 2))[:, :modes, :modes]
        mixed = jnp.einsum("bxyi,xyio->bxyo", waves, p["real"] + 1j * p["imaginary"])
        rows, columns = side - modes, side // 2 + 1 - modes
        mixed = jnp.pad(mixed, ((0, 0), (0, rows), (0, columns), (0, 0)))
        back = jnp.fft.irfft2(mixed, s=(side, side), axes=(1, 2)).astype(x.dtype)
        return jax.nn.gelu(back + _dot(x, p["skip"]))

    x = _dot(inputs["image"], params["in"])
    for p in params["layers"]:
        x = wrap(layer)(p, x)
    return x


# --- Transformers: encoder-decoder, and a plain loop of a decoder's layers -----------------------


def _attention_params(keys, width: int):
    return {name: _draw(next(keys), width, width) for name in ("q", "k", "v", "out")}


def _attention(p, x, other, heads: int, is_causal: bool):
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    q, k, v = (split(_dot(y, p[name])) for y, name in ((x, "q"), (other, "k"), (other, "v")))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -1e9)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
    return _dot(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape), p["out"])


def _layer_params(keys, width: int, has_other: bool):
    made = {"self": _attention_params(keys, width), "norms": [_norm(width) for _ in range(3)]}
    if has_other:
        made["cross"] = _attention_params(keys, width)
    made["up"] = _draw(next(keys), width, 4 * width)
    made["down"] = _draw(next(keys), 4 * width, width)
    return made


def _layer(p, x, other, key, heads: int, is_causal: bool, rate: float):
    keys = jax.random.split(key, 3)
    y = _layer_norm(x, p["norms"][0])
    x = x + _dropped(_attention(p["self"], y, y, heads, is_causal), keys[0], rate)
    if "cross" in p:
        y = _layer_norm(x, p["norms"][1])
        x = x + _dropped(_attention(p["cross"], y, other, heads, False), keys[1], rate)
    y = _layer_norm(x, p["norms"][2])
    return x + _dropped(_dot(jax.nn.gelu(_dot(y, p["up"])), p["down"]), keys[2], rate)


def t5_params(key, size: Size):
    """Returns the layers of an encoder and of a decoder."""
    keys = iter(_keys(key, 32 * size["depth"]))
    width = size["width"]
    encoder = [_layer_params(keys, width, False) for _ in range(size["depth"])]
    return {"encoder": encoder, "decoder": [_layer_params(keys, width, True) for _ in encoder]}


def t5(params, inputs, key, wrap, heads: int):
    """Returns the decoder's features; every layer of the decoder reads the encoder's result."""
    x, y = inputs["source"], inputs["made"]
    for n, p in enumerate(params["encoder"]):
        layer = functools.partial(_layer, heads=heads, is_causal=False, rate=0.1)
        x = wrap(layer)(p, x, None, jax.random.fold_in(key, n))
    for n, p in enumerate(params["decoder"], len(params["encoder"])):
        layer = functools.partial(_layer, heads=heads, is_causal=True, rate=0.1)
        y = wrap(layer)(p, y, x, jax.random.fold_in(key, n))
    return y


def tokens(size: Size, dtype):
    """Returns embedded tokens."""
    shape = (size["batch"], size["length"], size["width"])
    return {"source": jnp.ones(shape, dtype), "made": jnp.ones(shape, dtype)}


def gpt_params(key, size: Size):
    """Returns the layers of a decoder."""
    keys = iter(_keys(key, 16 * size["depth"]))
    return {"layers": [_layer_params(keys, size["width"], False) for _ in range(size["depth"])]}


def gpt(params, inputs, key, wrap, heads: int):
    """Returns a decoder's features."""
    x = inputs["made"]
    for n, p in enumerate(params["layers"]):
        layer = functools.partial(_layer, heads=heads, is_causal=True, rate=0.1)
        x = wrap(layer)(p, x, None, jax.random.fold_in(key, n))
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the benchmark.

    Attributes:
      run: `run(params, inputs, key, wrap)` returns the model's result.
      params: `params(key, size)` returns the parameters, in float32.
      inputs: `inputs(size, dtype)` returns the inputs.
      size: The model's size in the benchmark.
      small: A size for a CPU.
    """

    run: Callable
    params: Callable
    inputs: Callable
    size: Size
    small: Size


MODELS = {
    "unet": Model(
        run=unet,
        params=unet_params,
        inputs=image,
        size={"batch": 16, "side": 256, "widths": (32, 64, 128, 256)},
        small={"batch": 2, "side": 32, "widths": (8, 16)},
    ),
    "graph": Model(
        run=graph_network,
        params=graph_params,
        inputs=mesh_graph,
        size={"grid": 65536, "mesh": 10242, "channels": 64, "width": 256, "rounds": 8},
        small={"grid": 256, "mesh": 40, "channels": 4, "width": 16, "rounds": 2},
    ),
    "resnet": Model(
        run=resnet,
        params=resnet_params,
        inputs=image,
        size={"batch": 64, "side": 224, "width": 64, "depths": (3, 4, 6, 3)},
        small={"batch": 2, "side": 32, "width": 8, "depths": (1, 1)},
    ),
    "mixer": Model(
        run=mixer,
        params=mixer_params,
        inputs=image,
        size={"batch": 64, "side": 224, "patch": 16, "width": 768, "depth": 12},
        small={"batch": 2, "side": 32, "patch": 8, "width": 16, "depth": 3},
    ),
    "fourier": Model(
        run=fourier,
        params=fourier_params,
        inputs=image,
        size={"batch": 16, "side": 256, "modes": 16, "width": 64, "depth": 4},
        small={"batch": 2, "side": 32, "modes": 4, "width": 8, "depth": 3},
    ),
    "t5": Model(
        run=functools.partial(t5, heads=12),
        params=t5_params,
        inputs=tokens,
        size={"batch": 16, "length": 512, "width": 768, "depth": 6},
        small={"batch": 2, "length": 16, "width": 24, "depth": 2},
    ),
    "gpt": Model(
        run=functools.partial(gpt, heads=12),
        params=gpt_params,
        inputs=tokens,
        size={"batch": 8, "length": 1024, "width": 768, "depth": 12},
        small={"batch": 2, "length": 16, "width": 24, "depth": 3},
    ),
}
