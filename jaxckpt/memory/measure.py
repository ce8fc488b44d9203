"""`measure`: compile a function and read the memory it needs, without running it.

    print(jaxckpt.measure(train_step, state, batch, donate_argnums=0))

Arguments may be arrays or `jax.ShapeDtypeStruct`s; nothing is allocated for the latter.
"""

from collections.abc import Callable, Sequence

import jax

from jaxckpt.memory.flops import count_flops
from jaxckpt.memory.report import MemoryReport, report_of


def measure(
    fn: Callable,
    *args,
    target: str = "local",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> MemoryReport:
    """Compiles `fn(*args)` and returns the memory that XLA says it needs.

    Args:
      fn: A function, or one already under `jax.jit`: its own donations then hold if none are
        given here.
      *args: Arrays or abstract values.
      target: `"local"`, the backend of this process.
      donate_argnums: Arguments whose memory outputs may reuse. Without it a training step counts
        parameters and optimizer state twice.
      static_argnums: Arguments that are compile-time constants.

    Raises:
      ValueError: An unknown target.

    Example:
      >>> import jax.numpy as jnp, jaxckpt
      >>> report = jaxckpt.measure(lambda x: x @ x, jnp.ones([256, 256]))
      >>> report.argument_bytes, report.output_bytes, report.flops
      (262144, 262144, 33554432)
    """
    compiled, flops = compile_step(
        fn, *args, target=target, donate_argnums=donate_argnums, static_argnums=static_argnums
    )
    return report_of(compiled, target=target, flops=flops)


def compile_step(
    fn: Callable,
    *args,
    target: str = "local",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
):
    """Returns `(compiled, flops)`: the executable of `fn(*args)` and the FLOPs of one call.

    Arguments and errors are those of `measure`; a loop that runs the executable compiles once.
    """
    if target != "local":
        raise ValueError(f"target {target!r} is not known; valid: local")
    jitted = fn
    if not hasattr(fn, "trace") or donate_argnums != () or static_argnums != ():
        jitted = jax.jit(fn, donate_argnums=donate_argnums, static_argnums=static_argnums)
    traced = jitted.trace(*args)
    return traced.lower().compile(), count_flops(traced.jaxpr)
