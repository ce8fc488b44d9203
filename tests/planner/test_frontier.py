"""The program inside a block against brute force over what a plan can name."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt.memory.residuals import origin_of
from jaxckpt.memory.roofline import Rates
from jaxckpt.models.attention import causal_attention
from jaxckpt.planner.frontier import Graph, proposals
from jaxckpt.planner.stacks import given_stack

RATES = Rates(flops_per_second=1e12, bytes_per_second=1e11)


def block(x, w):
    y = jaxckpt.tag(x @ w, "y")
    q, k, v = (jaxckpt.tag(jnp.tanh(y) * n, name) for n, name in ((1, "q"), (2, "k"), (3, "v")))
    heads = lambda t: t.reshape(2, 16, 2, 8)
    z = jaxckpt.tag(causal_attention(heads(q), heads(k), heads(v)).reshape(2, 16, 16), "z")
    return x + jnp.sin(z @ w) @ w


def graph() -> Graph:
    return Graph.of(given_stack((block, jnp.ones([16, 16]), jnp.ones([2, 16, 16])), 4), RATES)


def seconds_of(found: Graph, kept: tuple[bool, ...]) -> float:
    """Returns the seconds of all steps that must run again, by walking back from the residuals."""
    saved = {v for unit, keep in zip(found.units, kept, strict=True) if keep for v in unit.values}
    todo, again = list(found.residuals), set()
    while todo:
        value = origin_of(todo.pop())
        if value.step is not None and value not in saved and value.step not in again:
            again.add(value.step)
            todo += value.step.inputs
    return sum(s for step, s in zip(found.steps, found.seconds, strict=True) if step in again)


def test_proposals_are_optimal():
    found = graph()
    assert {str(unit.policy) for unit in found.units} == {
        *("attention", "names:q", "names:k", "names:v", "names:y", "names:z"),
    }
    sizes = [unit.nbytes for unit in found.units]
    every = {
        kept: (sum(itertools.compress(sizes, kept)), seconds_of(found, kept))
        for kept in itertools.product((False, True), repeat=len(sizes))
    }
    proposed = list(proposals(found))
    assert len(proposed) >= 4
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


def test_a_block_without_names_has_nothing_to_propose():
    plain = given_stack((lambda x, w: jnp.tanh(x @ w), jnp.ones([8, 8]), jnp.ones([4, 8])), 4)
    assert list(proposals(Graph.of(plain, RATES))) == []
