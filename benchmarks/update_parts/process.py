"""The process of one case: `python -m benchmarks.update_parts.process LIMIT CASE TINY`."""

import dataclasses
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxckpt
from benchmarks.cases import SHORT, config_of, tiny
from benchmarks.record import device
from benchmarks.result import Row
from experiments.training.build import build
from experiments.training.step import init_state, resolve_model
from jaxckpt.memory.built_step import BuiltStep
from jaxckpt.memory.measure import compile_step

_ROUNDS, _STEPS = 5, 4  # of each variant in turn, and steps of one


def _stack(is_tiny: bool):
    """Returns `(variants, first state, batch)` of a deep stack with AdamW."""
    blocks, width, hidden, tokens = (3, 64, 128, 32) if is_tiny else (24, 2048, 8192, 2048)

    def block(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"]

    def loss(params, x):
        return jnp.square(jaxckpt.scan_blocks(block, params, x, remat="full")).mean()

    optimizer = optax.adamw(1e-3)

    def separate(state, x):
        params, optimizer_state = state
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    step = jaxckpt.update_in_backward(loss, optimizer, blocks=lambda params: params)

    def inside(state, x):
        done = step(*state, x)
        return (done.params, done.state), done.value

    def first():
        draw = lambda n, shape: jax.random.normal(jax.random.key(n), shape) / shape[1] ** 0.5
        params = {"up": draw(0, (blocks, width, hidden)), "down": draw(1, (blocks, hidden, width))}
        return params, optimizer.init(params)

    x = jnp.ones([tokens, width])
    args = (jax.eval_shape(first), x)
    built = lambda fn: BuiltStep(fn=fn, args=args, donate_argnums=0)
    return {"separate": built(separate), "inside": built(inside)}, {None: first}, x


def _qwen3(is_tiny: bool):
    """Returns `(variants, first states, batch)` of the trainer's step."""
    case = tiny(SHORT) if is_tiny else SHORT
    apart = config_of(case, "full")
    variants = {"separate": apart, "separate, in a loop": dataclasses.replace(apart, unroll=1)}
    variants["inside"] = dataclasses.replace(apart, update_in_backward=True)
    resolved = {name: resolve_model(config)[0] for name, config in variants.items()}
    first = {name: lambda config=config: init_state(config) for name, config in resolved.items()}
    shape = (apart.batch_size, apart.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, apart.model.vocab_size, shape, np.int32)
    built = {name: build(config, "local") for name, config in resolved.items()}
    # Without `plan` and `baseline` the report does not trace a second program, which takes time.
    built = {n: dataclasses.replace(b, plan=None, baseline=None) for n, b in built.items()}
    return built, first, jnp.asarray(tokens)


def rows(case: str, is_tiny: bool) -> Iterator[Row]:
    """Yields a row for each variant, the separate step first."""
    variants, first, batch = {"stack": _stack, "qwen3": _qwen3}[case](is_tiny)
    compiled, found, weights, states = {}, {}, {}, {}
    for name, built in variants.items():
        started = time.perf_counter()
        compiled[name], report = compile_step(built)
        seconds = time.perf_counter() - started
        found[name] = {"variant": name, "peak_bytes": report.peak_bytes, "device": device()}
        found[name] |= {"temp_bytes": report.temp_bytes, "compile_seconds": seconds}
    for name, step in compiled.items():
        state = jax.jit(first.get(name) or first[None])()
        for _ in range(3):
            state, _ = step(state, batch)
        states[name] = state
        weights[name] = [jnp.copy(x) for x in jax.tree.leaves(state[0])]
        if hasattr(state, "params"):
            weights[name] = [jnp.copy(x) for x in jax.tree.leaves(state.params)]
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(_ROUNDS):
        for name, step in compiled.items():
            state = jax.block_until_ready(states.pop(name))
            started = time.perf_counter()
            for _ in range(_STEPS):
                state, _ = step(state, batch)
            states[name] = jax.block_until_ready(state)
            times[name].append(1e3 * (time.perf_counter() - started) / _STEPS)
    for name, row in found.items():
        pairs = zip(weights[name], weights["separate"], strict=True)
        off = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
        yield row | {"milliseconds": statistics.median(times[name]), "weights_off_by": off}


if __name__ == "__main__":
    limit, *asked = map(json.loads, sys.argv[1:])
    signal.alarm(limit)
    for one in rows(*asked):
        print(json.dumps(one), flush=True)
