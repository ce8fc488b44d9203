"""What is made abstract keeps all that a type says."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.planner.stacks import given_stack
from jaxckpt.transforms.traced_block import abstract, all_blocks, first_block, on_devices

STACKS = {
    "float": lambda: jnp.ones((3, 4, 2), jnp.bfloat16),
    "weak": lambda: lax.broadcast(jnp.asarray(1.0), (3,)),
    "keys": lambda: jax.random.split(jax.random.key(0), 3),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))


def check_round_trip(stack):
    one = first_block(stack)
    assert one == abstract(stack[0])
    assert all_blocks(one, 3) == abstract(stack)
    return one


@pytest.mark.parametrize("name", STACKS)
def test_a_row_and_back(name):
    one = check_round_trip(STACKS[name]())
    assert one.weak_type == (name == "weak")
    assert on_devices(one, None).weak_type == one.weak_type


def test_sharded_rows(mesh):
    with jax.set_mesh(mesh):
        stack = jax.device_put(STACKS["float"](), NamedSharding(mesh, P(None, "d")))
        assert check_round_trip(stack).sharding.spec == P("d", None)


def test_varying_rows():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))

    def body(stack):
        one = check_round_trip(stack)
        assert one != abstract(STACKS["float"]()[0])  # which is the same on all devices
        return stack

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(None, "d"), out_specs=P(None, "d"))
    jax.eval_shape(mapped, STACKS["float"]())


def test_devices_come_with_the_type():
    where = SingleDeviceSharding(jax.devices()[0])
    assert on_devices(jnp.ones((2,)), where).sharding == where
    assert on_devices(1.0, where).weak_type


def test_a_given_stack_keeps_weak_types():
    stack = given_stack((lambda x, w: x * w, 1.0, jnp.ones((2,), jnp.bfloat16)), 3)
    assert stack.params[0].weak_type and stack.params[0].shape == (3,)
