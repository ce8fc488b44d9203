"""The least time that a step's kernels can take on a GPU: the kernels that must run, alone.

    python -m benchmarks.floor '{"batch_size": 8, "seq_len": 1024}'

The floor is a sum of three times. Matrix products of the step under `none`, which recomputes
nothing, run at the rate of one large product. Attention's forward and backward pass take what they
take alone. AdamW runs at the rate at which memory is copied. Norms, rotary positions, casts and the
softmax of the head are left out, so that no step reaches the floor. Prints one JSON line.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case, config_of
from benchmarks.record import device
from experiments.training.step import init_state, make_train_step, resolve_model
from jaxckpt.costs.flops import count_flops
from jaxckpt.models.attention import causal_attention

_SIDE = 8192
_COPIED = 2**28  # float32 numbers, 1 GiB
# AdamW reads parameter, gradient and two moments, and writes all but the gradient.
_ADAMW_ACCESSES = 7


def seconds_of(fn: Callable, *args) -> float:
    """Returns the seconds of one call: the median of five groups of ten calls."""
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            out = fn(*args)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - started) / 10)
    return statistics.median(found)


def run(case: Case) -> dict[str, Any]:
    """Returns the floor in seconds and its parts."""
    config, _ = resolve_model(config_of(case, "none"))
    model, rows = config.model, (config.batch_size, config.seq_len)
    key = jax.random.key(0)
    side = jax.random.normal(key, [_SIDE, _SIDE], jnp.bfloat16)
    rate = 2 * _SIDE**3 / seconds_of(jax.jit(jnp.matmul), side, side)
    copied = jnp.ones(_COPIED, jnp.float32)
    bandwidth = 8 * _COPIED / seconds_of(jax.jit(lambda x: x + 1), copied)
    q, k, v = (
        jax.random.normal(key, [*rows, heads, model.head_dim], model.dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    )
    attend = lambda q, k, v: causal_attention(q, k, v, kind=model.attention)
    loss = lambda *args: attend(*args).astype(jnp.float32).sum()
    attention = seconds_of(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), q, k, v)
    state = jax.eval_shape(lambda: init_state(config))
    tokens = jax.ShapeDtypeStruct((rows[0], rows[1] + 1), "int32")
    flops = count_flops(jax.make_jaxpr(make_train_step(config))(state, tokens))
    of_attention = count_flops(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v))
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    parts = {
        "matrix products": (flops - model.num_blocks * of_attention) / rate,
        "attention": model.num_blocks * attention,
        "AdamW": 4 * _ADAMW_ACCESSES * params / bandwidth,
    }
    return {
        "seconds": sum(parts.values()),
        "parts": parts,
        "flops_per_second": rate,
        "bytes_per_second": bandwidth,
        "device": device(),
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
