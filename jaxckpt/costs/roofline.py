"""Seconds of a step on a chip, estimated from its jaxpr; nothing is compiled or run.

    rates = Rates(flops_per_second=790e12, bytes_per_second=4.3e12)
    estimate(jax.make_jaxpr(train_step)(state, batch), rates).seconds

The roofline model (Williams et al. 2009): a matrix product or attention kernel takes the time of
its arithmetic or of its bytes, whichever is longer. Other steps take the time of their bytes, after
a model of XLA's fusion (`fusion.py`). A loop counts all its trips, a cond its slowest branch. If
the chip's `HostLink` overlaps, copies to and from the host cost only the time by which they outlast
everything else; otherwise they add their own time.

Random bits and the collectives of `jax.shard_map` are counted (`fusion.py`). Collectives of XLA's
partitioner are in no jaxpr; `annotate` adds them from the compiled program (`collectives.py`).
Launch gaps, caches, and the arithmetic of other elementwise work are left out. The order of plans
is more reliable than the seconds.
"""

import dataclasses

from jax.extend import core

from jaxckpt.costs.flat import Flat, Step, bodies, flatten
from jaxckpt.costs.flops import attention_shape, step_flops, trips
from jaxckpt.costs.fusion import traffic
from jaxckpt.targets.chips import Chip
from jaxckpt.targets.links import HostLink
from jaxckpt.targets.present import chip_of
from jaxckpt.targets.target import Target
from jaxckpt.transforms import jaxprs

# The shares of a chip's rates that kernels reach: matrix products, and fused elementwise kernels.
MATMUL_EFFICIENCY = 0.95
BYTES_EFFICIENCY = 0.8
# Attention kernels reach less, most of all on short sequences. The curve goes through the shares of
# cuDNN's kernels, forward and backward, on an H200: 0.36 at 1024 tokens, 0.68 at 16384.
ATTENTION_EFFICIENCY = 0.72
ATTENTION_HALF_LENGTH = 1064


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates of a chip, as measured on large arrays; see `of_data_sheet`.

    Attributes:
      flops_per_second: FLOPs per second of matrix products in the step's dtype.
      bytes_per_second: Bytes per second of device memory.
      host_bytes_per_second: Bytes per second of the link to host memory, in one direction.
      host_overlaps: Whether copies over this link run beside the computation.

    Raises:
      ValueError: A rate is not above 0.
    """

    flops_per_second: float
    bytes_per_second: float
    host_bytes_per_second: float = 50e9
    host_overlaps: bool = True

    def __post_init__(self):
        for name, value in self._rates.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; a rate is above 0")

    @property
    def _rates(self) -> dict[str, float]:
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "host_overlaps"}

    @property
    def host_link(self) -> HostLink:
        """The link to host memory."""
        return HostLink(bytes_per_second=self.host_bytes_per_second, overlaps=self.host_overlaps)

    @classmethod
    def of_data_sheet(
        cls,
        *,
        flops_per_second: float,
        bytes_per_second: float,
        host_bytes_per_second: float,
        host_overlaps: bool = True,
    ) -> "Rates":
        """Returns the rates that programs reach, from the rates in a chip's data sheet.

        The shares are an H200's: 790 of 989 TFLOP/s in bfloat16, 4.3 of 4.8 TB/s.
        """
        return cls(
            flops_per_second=0.8 * flops_per_second,
            bytes_per_second=0.9 * bytes_per_second,
            host_bytes_per_second=0.9 * host_bytes_per_second,
            host_overlaps=host_overlaps,
        )

    @classmethod
    def of_chip(cls, chip: Chip) -> "Rates":
        """Returns the rates that programs reach on one device of a chip."""
        return cls.of_data_sheet(
            flops_per_second=chip.bf16_flops_per_second,
            bytes_per_second=chip.memory_bytes_per_second,
            host_bytes_per_second=chip.host_bytes_per_second,
            host_overlaps=chip.backend != "cuda",
        )

    def times(self, num_devices: int) -> "Rates":
        """Returns the rates of several devices that share a step's work evenly."""
        scaled = {name: num_devices * rate for name, rate in self._rates.items()}
        return dataclasses.replace(self, **scaled)


# The planner's rates for a device that is in no table. Bytes cost nothing: a CPU's elementwise work
# is bound by arithmetic, which the roofline does not count. So matrix products alone order plans.
UNKNOWN = Rates(flops_per_second=1e11, bytes_per_second=1e15, host_bytes_per_second=1e15)


def rates_of(target: Target) -> Rates | None:
    """Returns the rates of a target (of this process's device for `local`); None if unknown."""
    chip = chip_of(target)
    return None if chip is None else Rates.of_chip(chip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated cost of one call.

    Attributes:
      seconds: The whole call: matmul and memory in turn, host copies beside them or after.
      matmul_seconds: Seconds of matrix products and attention kernels.
      memory_seconds: Seconds of all other work on the device, bound by its bytes.
      host_seconds: Seconds of copies to and from host memory.
      flops: FLOPs of matrix products and attention kernels.
      bytes_moved: Bytes to and from device memory, of all steps.
    """

    seconds: float
    matmul_seconds: float
    memory_seconds: float
    host_seconds: float
    flops: int
    bytes_moved: int


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Sums over steps; may be scaled by a loop's trips."""

    matmul_seconds: float = 0.0
    memory_bytes: float = 0.0
    host_bytes: float = 0.0
    flops: float = 0.0
    matmul_bytes: float = 0.0

    def __add__(self, other: "_Cost") -> "_Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Cost(*(a + b for a, b in pairs))

    def times(self, count: float) -> "_Cost":
        return _Cost(*(count * value for value in dataclasses.astuple(self)))

    def seconds(self, rates: Rates) -> float:
        device = self.matmul_seconds + self.memory_seconds(rates)
        return rates.host_link.seconds(device, self.host_bytes)

    def memory_seconds(self, rates: Rates) -> float:
        return self.memory_bytes / (rates.bytes_per_second * BYTES_EFFICIENCY)


def estimate(jaxpr: core.ClosedJaxpr | core.Jaxpr, rates: Rates) -> Estimate:
    """Returns the estimated cost of one call of a function.

    Args:
      jaxpr: The jaxpr of the whole step, with gradients and optimizer, from `jax.make_jaxpr`.
      rates: The rates of the chip, or of all devices together.
    """
    cost = _cost_of(flatten(jaxpr), rates)
    return Estimate(
        seconds=cost.seconds(rates),
        matmul_seconds=cost.matmul_seconds,
        memory_seconds=cost.memory_seconds(rates),
        host_seconds=cost.host_bytes / rates.host_bytes_per_second,
        flops=round(cost.flops),
        bytes_moved=round(cost.memory_bytes + cost.matmul_bytes),
    )


def nested_seconds(step: Step, rates: Rates) -> float:
    """Returns the seconds of one loop, branch or other step with functions of its own."""
    return _nested_cost(step, rates).seconds(rates)


def _cost_of(flat: Flat, rates: Rates, stacked: int = 0) -> _Cost:
    moved = traffic(flat, stacked)
    cost = _Cost(memory_bytes=moved.memory_bytes, host_bytes=moved.host_bytes)
    for step, size in moved.kernel_bytes.items():
        flops = float(step_flops(step))
        arithmetic = flops / (rates.flops_per_second * _efficiency(step))
        seconds = max(arithmetic, size / (rates.bytes_per_second * BYTES_EFFICIENCY))
        cost += _Cost(matmul_seconds=seconds, flops=flops, matmul_bytes=size)
    for step in moved.nested:
        cost += _nested_cost(step, rates)
    return cost


def _efficiency(step: Step) -> float:
    shape = attention_shape(step)
    if shape is None:
        # A Pallas kernel is taken to be attention on long sequences.
        return ATTENTION_EFFICIENCY if step.name == jaxprs.PALLAS else MATMUL_EFFICIENCY
    return ATTENTION_EFFICIENCY * shape.rows / (shape.rows + ATTENTION_HALF_LENGTH)


def _nested_cost(step: Step, rates: Rates) -> _Cost:
    """Returns the cost of a loop, a cond or another step with functions of its own."""
    costs = []
    for body in bodies(step):
        rows = 0
        if step.name == jaxprs.SCAN and step.params["unroll"] < step.params["length"]:
            rows = sum(
                outer.aval.ndim > inner.aval.ndim
                for outer, inner in zip(step.outputs, body.outputs, strict=True)
            )
        costs.append(_cost_of(body, rates, rows))
    if step.name == jaxprs.COND:
        return max(costs, key=lambda cost: cost.seconds(rates), default=_Cost())
    return sum(costs, _Cost()).times(float(trips(step)))
