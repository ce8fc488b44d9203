"""Checks whether plans may move values to the host on a target, before such a plan is proposed.

Some JAX releases moved values to the host and brought wrong values back, without an error. So if
the chip is present, a small stack is run once for each version and backend. Its gradients under
plans that move values must equal its gradients under `none`. Releases that are known to be bad are
refused without a run.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt.compiled import cache
from jaxckpt.targets.target import Target
from jaxckpt.transforms.policies import bad_offload
from jaxckpt.transforms.stack import scan_blocks
from jaxckpt.transforms.tags import tag

# One plan for each way in which the planner moves values: inputs of blocks, named values, inputs
# and named values, and the carries of a schedule.
PLANS = (
    "full+offload:carry",
    "full+offload:kept",
    "full+offload:kept,carry",
    "binomial:2+offload:carry",
    "uniform:3+offload:carry",
)
_NUM_BLOCKS, _ROWS, _WIDTH = 5, 16, 32
# The largest allowed error, as a share of a leaf's largest value. All plans multiply the same
# numbers, so only a wrong value exceeds it, such as a value of another block.
_TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether values may be moved to the host on a target, with the reason as text."""

    allowed: bool
    text: str


def verdict(target: Target, knows_link: bool) -> Verdict:
    """Returns whether the planner may propose to move values to the host.

    Args:
      target: The target of the plan.
      knows_link: Whether the speed of the target's link to the host is known.
    """
    is_here = target.backend == "local"
    backend = jax.default_backend() if is_here else {"cuda": "gpu"}.get(target.backend, "tpu")
    where = f"jax {jax.__version__} on {backend}"
    reason = bad_offload(backend)
    if reason is not None:
        return Verdict(allowed=False, text=f"refused on {where}: {reason}")
    if backend == "cpu":
        return Verdict(allowed=False, text="not proposed: a CPU has no memory beside the host's")
    if not knows_link:
        kind = jax.local_devices()[0].device_kind
        return Verdict(allowed=False, text=f"not proposed: the host link of {kind} is not known")
    if not is_here:
        return Verdict(
            allowed=True,
            text=f"gradients not checked, as the chip is not here; {where} is not known to be bad",
        )
    return _verdict_of(checked(backend), where)


def _verdict_of(errors: dict[str, float], where: str) -> Verdict:
    """Returns the verdict for the errors of the check's plans; NaN counts as an error."""
    for plan, error in errors.items():
        if not error <= _TOLERANCE:
            text = f"refused on {where}: gradients under {plan} are off by {error:.1e}"
            return Verdict(allowed=False, text=text)
    return Verdict(allowed=True, text=f"gradients checked on {where}")


def checked(backend: str) -> dict[str, float]:
    """Returns the error of the gradients under each plan, measured once and then kept on disk.

    Args:
      backend: The backend of this process.
    """
    sources = cache.digest_of_sources({"jaxckpt"})
    asked = {"check": "gradients under offload", "backend": backend, "sources": sources}
    name = cache.key(**asked, **cache.here())
    found = cache.load_json(name)
    if not _is_whole(found):
        found = {plan: _error(plan) for plan in PLANS}
        cache.store_json(name, found)
    return found


def _is_whole(found: Any) -> bool:
    is_number = lambda value: isinstance(value, float)
    return (
        isinstance(found, dict) and set(found) == set(PLANS) and all(map(is_number, found.values()))
    )


class _Arrays(NamedTuple):
    weights: jax.Array
    x: jax.Array


def _error(plan: str) -> float:
    """Returns the largest error of a gradient under a plan, as a share of its largest value."""
    errors = []
    for one, other in zip(_gradients(plan), _gradients("none"), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        errors.append(float(np.abs(one - other).max() / np.abs(other).max()))
    return max(errors, key=lambda error: (error != error, error))


def _gradients(plan: str) -> _Arrays:
    """Returns gradients of a stack in which no two blocks have equal values."""
    keys = jax.random.split(jax.random.key(0))
    arrays = _Arrays(
        weights=jax.random.normal(keys[0], (_NUM_BLOCKS, _WIDTH, _WIDTH)) / _WIDTH**0.5,
        x=jax.random.normal(keys[1], (_ROWS, _WIDTH)),
    )
    block = lambda x, w: x * jnp.sin(tag(x @ w, "kept"))
    loss = lambda arrays: jnp.cos(scan_blocks(block, *arrays, remat=plan)).sum()
    return jax.jit(jax.grad(loss))(arrays)
