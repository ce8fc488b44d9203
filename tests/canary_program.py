"""Compiles, on eight devices, programs of which every figure is known; see `test_canary.py`.

`python -m tests.canary_program FOLDER` leaves the texts that are read, and what JAX itself says.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxckpt import scan_blocks

SIZE, DEVICES, OUTER, INNER, BLOCKS = 128, 8, 3, 5, 8
# The line of this file that makes the largest buffer.
GATHER_LINE = next(
    number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), start=1)
    if line.strip().startswith("return lax.all_gather(")
)


def inner(x, _):
    return lax.psum(jnp.tanh(x @ x), "d"), None


def outer(x, _):
    x, _ = lax.scan(inner, x, None, length=INNER)
    return lax.pmax(x * 0.5, "d"), None


def once(state):
    count, x = state
    return count + 1, lax.ppermute(x, "d", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]) * 0.5


def of_a_device(x, count):
    """Sends in nested loops of 3 and 5 trips, in a branch, in a loop that no text has trips of."""
    x, _ = lax.scan(outer, x, None, length=OUTER)
    x = lax.cond(count > 3, lambda x: lax.pmin(x, "d"), lambda x: x - 1.0, x)
    _, x = lax.while_loop(lambda state: state[0] < count, once, (0, x))
    return lax.all_gather(x, "d", axis=0, tiled=True)


def program():
    """Returns the program that sends, lowered."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    fn = jax.shard_map(
        of_a_device,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32, sharding=whole)
    return jax.jit(fn).lower(x, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


def executed():
    """Returns the gradient of a stack that the executor runs, traced."""
    params = jax.ShapeDtypeStruct((BLOCKS, SIZE, SIZE), jnp.float32)
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    block = lambda x, w: jnp.tanh(x @ w)
    loss = lambda w, x: scan_blocks(block, w, x, remat="binomial:2").sum()
    return jax.jit(jax.grad(loss)).trace(params, x)


def main(folder: Path):
    """Leaves texts, dumps and JAX's own figures in a folder."""
    dump = folder / "dump"
    compiled = program().compile(compiler_options={"xla_dump_to": str(dump)})
    (folder / "program.txt").write_text(compiled.as_text())
    (folder / "executed.txt").write_text(executed().lower().compile().as_text())
    sizes = compiled.memory_analysis()
    names = ("argument", "output", "temp", "alias")
    found = {name: getattr(sizes, f"{name}_size_in_bytes") for name in names}
    (folder / "sizes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
