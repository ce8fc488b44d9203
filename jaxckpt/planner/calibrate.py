"""Times a block on the chip of this process once, and keeps the seconds on disk.

The roofline orders kinds by speed, but its seconds are estimates. This module times a block's
forward pass, its backward pass and the link to the host, on arrays of the block's shapes. The
results scale the roofline's seconds. One factor is for forward passes and recomputation, another
factor is for backward passes.

Limits: a block is timed alone, on one device. The rest of the step keeps the roofline's seconds.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxckpt.compiled import cache
from jaxckpt.costs.roofline import Rates
from jaxckpt.memory.measure import program_key
from jaxckpt.planner.kinds import Forward, Kind, with_copies
from jaxckpt.planner.stacks import Stack
from jaxckpt.transforms.block_vjp import Moving, differentiate

_TIMES = 5
_LINK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured seconds of one block of every stack together.

    Attributes:
      forward_seconds: Seconds of the forward pass alone.
      backward_seconds: Seconds of the backward pass of a block that kept all its residuals.
      host_bytes_per_second: Speed of the link to the host in its slower direction; None on a CPU.
    """

    forward_seconds: float
    backward_seconds: float
    host_bytes_per_second: float | None

    def link(self, rates: Rates) -> Rates:
        """Returns rates with the measured speed of the link."""
        if self.host_bytes_per_second is None:
            return rates
        return dataclasses.replace(rates, host_bytes_per_second=self.host_bytes_per_second)

    def forward(self, forward: Forward) -> Forward:
        """Returns the cost of a forward pass with its measured seconds."""
        return dataclasses.replace(forward, seconds=self.forward_seconds)

    def kind(self, kind: Kind, *, none: Kind, forward: Forward, rates: Rates) -> Kind:
        """Returns a kind with calibrated seconds.

        Args:
          kind: The kind with the roofline's seconds.
          none: The kind `none` with the roofline's seconds.
          forward: One forward pass with the roofline's seconds.
          rates: The chip's rates with the measured speed of the link.
        """
        again = self.forward_seconds / forward.seconds
        device = kind.device_seconds or kind.seconds
        backward = self.backward_seconds + again * (device - none.seconds)
        seconds = self.forward_seconds + backward
        if kind.host_bytes:
            seconds = with_copies(self.forward_seconds, backward, kind.host_bytes, rates)
        return dataclasses.replace(kind, seconds=seconds)


def calibrate(stacks: Sequence[Stack]) -> Calibration:
    """Returns the measured seconds of one block of every stack on this process's device.

    If a program was timed before on this kind of device and with these versions of JAX and jaxckpt,
    its seconds are read from disk.

    Args:
      stacks: The stacks that follow one plan.
    """
    found = [_of_block(stack) for stack in stacks]
    is_cpu = jax.default_backend() == "cpu"
    return Calibration(
        forward_seconds=sum(one["forward"] for one in found),
        backward_seconds=sum(one["backward"] for one in found),
        host_bytes_per_second=None if is_cpu else _link(),
    )


def _of_block(stack: Stack) -> dict[str, float]:
    moving = Moving.all_of(stack.params, stack.consts)

    def backward(carry, params_i, consts):
        out, reverse = differentiate(stack.call, carry, params_i, consts, moving)
        grads = [jnp.ones_like(x) for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]
        return out, reverse(grads)

    groups = (stack.carry, stack.params_i, stack.consts)

    def timed() -> dict[str, float]:
        args = jax.tree.map(_array, groups)
        forward = _seconds(jax.jit(stack.call), *args)
        both = _seconds(jax.jit(backward), *args)
        found = {"forward": forward, "backward": max(both - forward, 0.0)}
        # A chain is timed as a whole, but figures are of one block.
        return {name: seconds / max(len(stack.ends) - 1, 1) for name, seconds in found.items()}

    return _kept(jax.jit(backward).lower(*groups), timed)


def _kept(lowered, timed: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Returns a program's seconds from disk; if they are missing, times and stores the program."""
    name = program_key(lowered, timed="seconds", by=cache.digest_of_sources({"jaxckpt"}))
    found = cache.load_json(name)
    is_whole = isinstance(found, dict) and all(isinstance(x, float) for x in found.values())
    if not found or not is_whole:
        found = timed()
        cache.store_json(name, found)
    return found


def _array(abstract) -> jax.Array:
    """Returns an array of an abstract array's type; its numbers are small, so nothing overflows."""
    if jnp.issubdtype(abstract.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), abstract.shape)
    if not jnp.issubdtype(abstract.dtype, jnp.inexact):
        return jnp.zeros(abstract.shape, abstract.dtype)
    drawn = jax.random.normal(jax.random.key(1), abstract.shape, jnp.float32)
    return (0.02 * drawn).astype(abstract.dtype)


def _seconds(fn: Callable, *args) -> float:
    """Returns the median seconds of a few calls, after a first call that compiles."""
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _link() -> float:
    """Returns bytes per second of a large copy to the host or back, whichever is slower."""
    to = lambda space: jax.jit(lambda x: jax.device_put(x, space))
    out, back = to(jax.memory.Space.Host), to(jax.memory.Space.Device)
    here = lambda: jnp.zeros(_LINK_BYTES, jnp.int8)

    def timed() -> dict[str, float]:
        array = here()
        return {"seconds": max(_seconds(out, array), _seconds(back, out(array)))}

    lowered = out.lower(jax.eval_shape(here))
    return _LINK_BYTES / _kept(lowered, timed)["seconds"]
