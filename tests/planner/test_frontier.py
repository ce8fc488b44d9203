"""The program inside a block against brute force over what a plan can name."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.costs.flops import step_flops
from jaxckpt.costs.residuals import origin_of
from jaxckpt.costs.roofline import Rates
from jaxckpt.models.attention import causal_attention
from jaxckpt.planner.inside_block import Graph, lean_proposals, proposals
from jaxckpt.planner.stacks import given_stack
from jaxckpt.plans import words

RATES = Rates(flops_per_second=1e12, bytes_per_second=1e11)


def block(x, w):
    y = jaxckpt.tag(x @ w, "y")
    q, k, v = (jaxckpt.tag(jnp.tanh(y) * n, name) for n, name in ((1, "q"), (2, "k"), (3, "v")))
    heads = lambda t: t.reshape(2, 16, 2, 8)
    z = jaxckpt.tag(causal_attention(heads(q), heads(k), heads(v)).reshape(2, 16, 16), "z")
    return x + jnp.sin(z @ w) @ w


def graph(run=block) -> Graph:
    return Graph.of(given_stack((run, jnp.ones([16, 16]), jnp.ones([2, 16, 16])), 4), RATES)


def seconds_of(found: Graph, kept: tuple[bool, ...]) -> float:
    """Returns the seconds of all steps that must run again, by walking back from the residuals."""
    saved = {v for unit, keep in zip(found.units, kept, strict=True) if keep for v in unit.values}
    todo, again = list(found.residuals), set()
    while todo:
        value = origin_of(todo.pop())
        if value.step is not None and value not in saved and value.step not in again:
            again.add(value.step)
            todo += value.step.inputs
    rerun = sum(s for step, s in zip(found.steps, found.seconds, strict=True) if step in again)
    return rerun + sum(unit.seconds for unit in itertools.compress(found.units, kept))


def untagged(x, w):
    """A product that feeds three functions, one of them in a loop, and random bits."""
    y = x @ w
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, y.shape)
    z = jnp.where(keep, jnp.sin(y), jnp.tanh(y))
    z, _ = jax.lax.scan(lambda z, _: (jnp.sin(z @ w), None), z, None, length=2)
    return x + jax.checkpoint(lambda z: jnp.exp(z @ w) @ w)(z)


NAMES = {
    block: "attention q k v y z @dot.2 @sin.1 @tanh.1 @tanh.2 @tanh.3",
    # Those of the dropout mask's arithmetic are left out: there would be too many subsets.
    untagged: "@dot.1 @random_bits.1 @lt.1 @sin.1 @tanh.1 @where.1 @sin.2 @dot.3 @exp.1",
}


@pytest.mark.parametrize("run", NAMES)
def test_proposals_are_optimal(run):
    found, names = graph(run), NAMES[run].split()
    units = {(*unit.policy.names, "attention")[0]: unit for unit in found.units}
    assert set(names) <= set(units)
    assert run is untagged or set(names) == set(units)
    found = dataclasses.replace(found, units=tuple(units[name] for name in names))
    sizes = [unit.nbytes for unit in found.units]
    every = {
        kept: (sum(itertools.compress(sizes, kept)), seconds_of(found, kept))
        for kept in itertools.product((False, True), repeat=len(sizes))
    }
    proposed = list(proposals(found))
    assert len(proposed) >= (4 if run is block else 3)
    for policies in proposed:
        kept = tuple(unit.policy in policies for unit in found.units)
        nbytes, seconds = every[kept]
        best = min(s for size, s in every.values() if size <= nbytes)
        assert seconds == pytest.approx(best)


def test_the_same_in_any_order_of_asking():
    texts = lambda: [tuple(map(str, policies)) for policies in proposals(graph())]
    first = texts()
    jax.clear_caches()
    assert texts() == first


def test_a_dropout_mask_is_kept_rather_than_drawn_again():
    """Random bits take long to draw; the mask made of them weighs a byte an element."""
    kept = [[str(policy) for policy in policies] for policies in proposals(graph(untagged))]
    assert all("names:@lt.1" in policies for policies in kept[:3])


def test_a_collective_takes_longer_than_its_bytes():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def summed(x):
        return jnp.sin(jnp.tanh(jax.lax.psum(jnp.tanh(x), "x")))

    def run(x, w):
        return x + jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec)(x @ w)

    found = graph(run)
    seconds = dict(zip([step.name for step in found.steps], found.seconds, strict=True))
    # An all-reduce sends its 2 KiB twice, over a link with a tenth of memory's rate.
    assert seconds["shard_map"] > 20 * 2048 / RATES.bytes_per_second


def test_a_block_without_steps_has_nothing_to_propose():
    plain = given_stack((lambda x, w: x, jnp.ones([8, 8]), jnp.ones([4, 8])), 4)
    assert list(proposals(Graph.of(plain, RATES))) == []


def test_what_a_user_names_recomputes_least():
    """Against brute force over tags and the kernel: no set of as many bytes multiplies less."""
    found = graph()
    units = [u for u in found.units if not any(map(words.is_invented, u.policy.names))]
    products = [float(step_flops(step)) for step in found.steps]
    found = dataclasses.replace(
        found,
        units=tuple(dataclasses.replace(unit, seconds=0.0) for unit in units),
        seconds=tuple(products),
    )
    every = {
        kept: (sum(u.nbytes for u in itertools.compress(units, kept)), seconds_of(found, kept))
        for kept in itertools.product((False, True), repeat=len(units))
    }
    proposed = list(lean_proposals(graph(), RATES))
    assert len(proposed) >= 3 and proposed[-1] == ()
    for policies in proposed:
        nbytes, flops = every[tuple(unit.policy in policies for unit in units)]
        assert flops == min(f for size, f in every.values() if size <= nbytes)
