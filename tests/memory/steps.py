"""Steps that tests compile for absent chips: the entries that worker processes import."""

import os
import signal
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jaxckpt

NUM_BLOCKS = 32
CARRY = (4096, 2048)  # 32 MiB: a TPU compiler keeps small arrays in on-chip memory


def block(carry, scale):
    return jnp.tanh(carry * scale)


def gradients(plan, sharding=None):
    """Returns loss and gradients of a stack with almost no weights, arguments, donations."""

    def step(scales, carry):
        loss = lambda scales: jaxckpt.scan_blocks(block, scales, carry, remat=plan).sum()
        return jax.value_and_grad(loss)(scales)

    scales = jax.ShapeDtypeStruct((NUM_BLOCKS, 1), jnp.float32)
    carry = jax.ShapeDtypeStruct(CARRY, jnp.float32, sharding=sharding)
    return step, (scales, carry), ()


def small(size=256, donate=False, scale=2.0):
    """Returns a step of one product, quick to compile."""
    step = lambda state, x: (state @ x * scale, x.sum())
    args = (jax.ShapeDtypeStruct((size, size), jnp.float32),) * 2
    return step, args, (0,) if donate else ()


def sharded(devices, size=1024):
    """Returns a step whose rows are spread over a mesh of `devices`."""
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data", None))
    return lambda x: x + 1, (jax.ShapeDtypeStruct((size, 1024), jnp.float32, sharding=rows),), ()


def cudnn_attention():
    """Returns the gradient of cuDNN's attention, which only traces where its chip is known."""
    q = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.bfloat16)
    attend = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn")
    return jax.grad(lambda q: attend(q).astype(jnp.float32).sum()), (q,), ()


def dies():
    """Ends its process as a machine without memory would."""
    os.kill(os.getpid(), signal.SIGKILL)


def waits():
    time.sleep(300)


def raises():
    raise ValueError("no such plan:\nvalid are others")
