"""Steps that take longer than their bytes say: random bits and collectives.

Both are told in bytes of device memory that take as long, so that a roofline needs no more rates.

- Threefry takes about 57 integer operations for each word of four bytes (20 rounds of an addition,
  a rotation and an exclusive or, and 5 times a key, for two words). At 14.8 T operations a second
  (H100: 64 lanes a multiprocessor) or 6 T (TPU v5e: 4096 lanes) that is the time of writing the
  word about twice. Keys of `rbg` use the chip's own generator.
- A link between chips moves about a tenth of what memory does: NVLink of an H100 450 of 3352 GB/s,
  a link of a TPU v5e 45 of 819. An all-reduce sends its array twice.

Only collectives that are in the jaxpr are seen, such as those of `jax.shard_map`: those that XLA's
partitioner adds for sharded arrays are in no jaxpr.
"""

from jaxckpt.memory.flat import Step
from jaxckpt.transforms import jaxprs

_RANDOM_SHARE = 2
_LINK_SHARE = 10
# Primitive -> how often its array crosses a link.
_COLLECTIVES = {
    **dict.fromkeys(jaxprs.ALL_REDUCES, 2),
    **dict.fromkeys((*jaxprs.GATHERS, *jaxprs.EXCHANGES), 1),
}


def is_collective(step: Step) -> bool:
    """Returns whether a step sends arrays between devices."""
    return step.name in _COLLECTIVES


def extra_bytes(step: Step) -> int:
    """Returns what a step takes beside reading and writing, in bytes of memory; 0 for most."""
    inputs = sum(value.nbytes for value in step.inputs)
    outputs = sum(value.nbytes for value in step.outputs)
    if step.name in jaxprs.RANDOM_BITS:
        is_hardware = any("rbg" in str(value.aval.dtype) for value in step.inputs)
        return 0 if is_hardware else _RANDOM_SHARE * outputs
    return _LINK_SHARE * _COLLECTIVES.get(step.name, 0) * max(inputs, outputs)
