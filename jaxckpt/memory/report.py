"""`MemoryReport`: what a compiled step needs, in bytes, with where each number comes from."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory of one compiled function on one device; `print` shows it as a small table.

    Attributes:
      peak_bytes: What the device needs at the worst moment.
      argument_bytes: Inputs.
      output_bytes: Outputs, those that reuse a donated input included.
      alias_bytes: Outputs that live in donated inputs, counted in both of the above.
      temp_bytes: Everything in between: residuals, gradients, working memory.
      host_bytes: Host memory that the step uses for offloaded values.
      code_bytes: The compiled program.
      flops: Matrix-product FLOPs of one call, loops counted by their trips; None if unknown.
      target: The chip it is compiled for.
      source: Who says so: backend and rule.
      jax_version: The JAX that compiled it.
    """

    peak_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    host_bytes: int
    code_bytes: int
    flops: int | None
    target: str
    source: str
    jax_version: str

    def __str__(self) -> str:
        rows = [("peak", self.peak_bytes, "on the device at the worst moment")]
        rows += [
            ("arguments", self.argument_bytes, ""),
            ("outputs", self.output_bytes, f"of them {gib(self.alias_bytes)} in donated arguments"),
            ("temporaries", self.temp_bytes, "residuals, gradients, working memory"),
            ("host", self.host_bytes, "offloaded values"),
            ("code", self.code_bytes, ""),
        ]
        lines = [f"memory of one step on {self.target} ({self.source}, jax {self.jax_version})"]
        lines += [f"  {name:<12}{gib(size):>12}  {note}".rstrip() for name, size, note in rows]
        if self.flops is not None:
            lines.append(f"  {'matmul FLOPs':<12}{self.flops:>12.3e}")
        return "\n".join(lines)


def gib(size: int) -> str:
    """Returns bytes as text in GiB, with more digits for small sizes."""
    value = size / 2**30
    return f"{value:.2f} GiB" if value >= 1 else f"{value:.4f} GiB"


def report_of(compiled, *, target: str = "local", flops: int | None = None) -> MemoryReport:
    """Returns the report of an already compiled function.

    Args:
      compiled: What `jax.jit(f).lower(...).compile()` returns.
      target: The chip it was compiled for.
      flops: FLOPs of one call, if they were counted.

    Raises:
      RuntimeError: The backend has no memory analysis.
    """
    stats = compiled.memory_analysis()
    backend = jax.default_backend()
    if stats is None:
        raise RuntimeError(f"XLA's {backend} backend gives no memory analysis")
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    peak, rule = total, "argument + output - alias + temp"
    if backend == "tpu" and getattr(stats, "peak_memory_in_bytes", 0):
        # On TPU temporaries can read 0 while the compiler's own peak is right; on CPU that peak
        # ignores temporaries.
        peak, rule = stats.peak_memory_in_bytes, "compiler's peak"
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    return MemoryReport(
        peak_bytes=peak,
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        host_bytes=host,
        code_bytes=stats.generated_code_size_in_bytes,
        flops=flops,
        target=target,
        source=f"XLA {backend}, {rule}",
        jax_version=jax.__version__,
    )
