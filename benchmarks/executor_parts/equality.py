"""Every schedule gives the loss and gradients of `none`: bit-equal, where XLA lets it be.

The blocks are in a loop, in float32, with dropout on. The largest difference is 0 for a residual
MLP on CPU under JAX 0.10. It is 1e-6 of a leaf's largest value on other backends and versions, and
for `linen.RMSNorm` and the Transformer, whose results are known not to be bit-equal. Gradients of
consts have that bound everywhere: they are sums over blocks, and schedules sum in another order.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxckpt
from benchmarks.executor_parts import stacks
from benchmarks.result import Result, Row
from jaxckpt.models import Transformer, TransformerConfig

LENGTHS = (1, 2, 3, 7, 12, 28, 64, 100)
TOLERANCE = 1e-6
MODEL_PLANS = ("full", "uniform:2", "every:3", "sqrt", "log", "binomial:2")


def run(quick: bool = False) -> Result:
    """Compares every schedule with `none` at every length; `quick` takes one length."""
    rows = []
    for num_blocks in (3,) if quick else LENGTHS:
        rows += compare("MLP with dropout", mlp(num_blocks), num_blocks, stacks.plans(num_blocks))
    for name, model in () if quick else (("linen.RMSNorm", normed(7)), ("Transformer", decoder(7))):
        rows += compare(name, model, 7, MODEL_PLANS)
    missed = [row for row in rows if not row["bit_equal"]]
    return Result(
        title="equality: largest difference from `none`, relative to a leaf's largest value",
        rows=rows,
        table=list(summary(rows)),
        notes=[f"not bit-equal: {describe(row)}" for row in missed],
        # XLA is known to give the residual MLP the same bits under every schedule there.
        failures=check(
            rows, exact=jax.default_backend() == "cpu" and jax.__version__.startswith("0.10.")
        ),
    )


def check(rows: list[Row], exact: bool) -> list[str]:
    """Returns a line for each row above its bound."""
    failures = []
    for row in rows:
        tolerance = 0.0 if exact and row["block"].startswith("MLP") else TOLERANCE
        bounds = {"loss": tolerance, "params": tolerance, "carry": tolerance, "consts": TOLERANCE}
        over = [name for name, bound in bounds.items() if not row[name] <= bound]
        if over:
            failures.append(f"equality: {describe(row)}: {', '.join(over)} above the bound")
    return failures


def describe(row: Row) -> str:
    """Returns version, block, length, plan and differences of a case in one line."""
    differences = ", ".join(f"{k} {row[k]:.1e}" for k in ("loss", "params", "carry", "consts"))
    return f"jax {jax.__version__}, {row['block']}, L={row['L']}, {row['plan']}: {differences}"


def compare(name: str, model: Callable, num_blocks: int, plans) -> Iterator[Row]:
    """Yields a row for each plan; `model(plan)` returns `(loss, (params, carry, consts))`."""
    with jax.default_matmul_precision("highest"):
        want, full = model("none"), model("full")
        for plan in plans:
            got = model(plan)
            loss, (params, carry, consts) = jax.tree.map(
                stacks.largest_difference, got, want, is_leaf=lambda x: not isinstance(x, tuple)
            )
            yield {
                "block": name,
                "L": num_blocks,
                "plan": plan,
                "loss": loss,
                "params": params,
                "carry": carry,
                "consts": consts,
                "bit_equal": loss == params == carry == 0.0,
                "from_full": stacks.largest_difference(
                    got[:1] + got[1][:2], full[:1] + full[1][:2]
                ),
            }


def summary(rows: list[Row]) -> Iterator[Row]:
    """Yields one row for each block and schedule: the largest differences over its cases."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["block"], row["plan"].partition(":")[0]), []).append(row)
    for (block, schedule), cases in groups.items():
        most = {k: max(row[k] for row in cases) for k in ("loss", "params", "carry", "consts")}
        yield {
            "block": block,
            "schedule": schedule,
            "L": ",".join(dict.fromkeys(str(row["L"]) for row in cases)),
            "cases": len(cases),
            **most,
            "bit-equal": all(row["bit_equal"] for row in cases),
            "from full": max(row["from_full"] for row in cases),
        }


def mlp(num_blocks: int) -> Callable:
    """Returns `model(plan)` of the residual MLP with dropout."""
    params, keys, *inputs = stacks.dropout_stack(num_blocks)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=(1, 2, 3))
    def model(plan, params, carry, scale):
        blocks = {**params, "key": keys}
        out = jaxckpt.scan_blocks(stacks.dropout_block, blocks, carry, scale, remat=plan)
        return jnp.sin(out).sum()

    return lambda plan: model(plan, params, *inputs)


class NormedBlock(nn.Module):
    """A residual MLP behind `flax.linen.RMSNorm`."""

    @nn.compact
    def __call__(self, x):
        """Returns `x` with the branch added."""
        hidden = nn.tanh(nn.Dense(2 * x.shape[-1])(nn.RMSNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


def normed(num_blocks: int) -> Callable:
    """Returns `model(plan)` of a stack of `NormedBlock`."""
    x = jax.random.normal(jax.random.key(1), (2, 32, 64))
    stack = lambda plan: jaxckpt.linen.Stack(NormedBlock, num_blocks, remat=plan)
    variables = stack("none").init(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=(1, 2))
    def model(plan, variables, x):
        out: Any = stack(plan).apply(variables, x)
        return jnp.sin(out).sum()

    def call(plan):
        loss, grads = model(plan, variables, x)
        return loss, (*grads, [])

    return call


def decoder(num_blocks: int) -> Callable:
    """Returns `model(plan)` of the bundled Transformer with query and key norms and dropout."""
    config = TransformerConfig(num_blocks=num_blocks, dropout=0.1)
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, config.vocab_size)
    variables = Transformer(config).init(jax.random.key(0), tokens)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1)
    def model(plan, variables):
        rngs = {"dropout": jax.random.key(2)}
        model = Transformer(config, remat=plan)
        logits = model.apply(variables, tokens, deterministic=False, rngs=rngs)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return -picked.mean()

    def call(plan):
        loss, grads = model(plan, variables)
        return loss, (grads, [], [])

    return call
