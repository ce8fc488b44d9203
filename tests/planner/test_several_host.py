"""Several stacks that share the host's memory, whose blocks are timed, or given by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt.planner import fit as fit_module
from jaxckpt.planner.across_blocks import drafts
from jaxckpt.planner.across_stacks import joints
from jaxckpt.planner.calibrate import Calibration
from jaxckpt.planner.offload_check import Verdict
from jaxckpt.planner.result import FitResult
from jaxckpt.planner.steps import Steps
from jaxckpt.targets.links import HostLink
from jaxckpt.targets.target import LOCAL
from tests.experiments.test_fit import report
from tests.planner.test_pieces import FORWARD, frontier, kinds_of
from tests.planner.test_several import NUM_BLOCKS, replayed_peak, step_for

KIB = 2**10


@pytest.mark.parametrize("host_bytes", [0, 3, 6, 100])
def test_joint_plans_within_the_hosts_bytes_equal_brute_force(host_bytes):
    """Schedules have their carries there."""
    kinds, counts = kinds_of(9, 3.2), (4, 3)
    link = HostLink(bytes_per_second=2.0)
    own = [list(drafts(kinds, FORWARD, count, link)) for count in counts]
    every = [
        (replayed_peak(chosen, [0.0, 0.0]), sum(one.seconds for one in chosen))
        for chosen in itertools.product(*own)
        if sum(one.host_bytes for one in chosen) <= host_bytes
    ]
    found = joints(["a", "b"], own, [0.0, 0.0], host_bytes)
    assert all(one.host_bytes <= host_bytes for one in found)
    assert any(one.host_bytes for one in found) == (host_bytes > 0)
    np.testing.assert_allclose(
        frontier((one.worst_bytes, one.seconds) for one in found), frontier(every)
    )


def fitted(budget: int = 2**30, step=step_for, **asked) -> FitResult:
    """Returns the answer for peaks of a compiler that likes every mix: 140 KiB."""
    plain = {("full", "full"): 120, ("none", "none"): 400}

    def peak(plans):
        size = plain.get(tuple(map(str, plans.values())), 140) * KIB
        return report(size / 2**30)

    of = Steps(step, LOCAL, peak)
    return fit_module.solve(of, NUM_BLOCKS, target=LOCAL, budget=budget, **asked)


def test_the_host_is_shared(chip):
    found = fitted(host_budget=60 * KIB)
    assert all(one.host_bytes <= 60 * KIB for one in found.table)
    moving = [one.plan for one in found.table if one.host_bytes]
    assert moving
    roomy = fitted(host_budget=2**30)
    both = [
        one.plan
        for one in roomy.table
        if all("offload:" in str(plan) for plan in one.plan.values())
    ]
    assert both, "with room for all, both stacks move"
    assert max(one.host_bytes for one in roomy.table) > 60 * KIB
    assert "  offload    gradients checked on a chip" in found.summary
    assert FitResult.from_json(found.as_json()) == found
    assert not any(one.host_bytes for one in fitted().table)


def test_the_error_says_why_nothing_was_moved(chip, monkeypatch):
    refused = Verdict(allowed=False, text="refused on a chip: wrong")
    monkeypatch.setattr(fit_module, "verdict", lambda target, knows_link: refused)
    with pytest.raises(jaxckpt.BudgetError, match=r"; offload: refused on a chip: wrong$"):
        fitted(1000, host_budget=2**30)


def test_each_stack_has_its_own_clock(monkeypatch):
    clocks = {
        count: Calibration(
            forward_seconds=count, backward_seconds=2.0 * count, host_bytes_per_second=None
        )
        for count in NUM_BLOCKS.values()
    }
    monkeypatch.setattr(
        "jaxckpt.planner.problem.calibrate", lambda stacks: clocks[stacks[0].num_blocks]
    )
    found = fitted(2**40, calibrate=True)
    timed = sum(3.0 * count * count for count in NUM_BLOCKS.values())
    assert found.chosen.seconds == pytest.approx(timed, rel=1e-3)
    assert "calibrated by a block timed here" in found.summary


def other_step(plans):
    """Returns the encoder-decoder of `test_several` with loops of its own."""
    policies = {"none": jax.checkpoint_policies.everything_saveable, "full": None}

    def run(name, block, carry, rows):
        policy = policies.get(str(plans[name]))
        block = jax.checkpoint(block, policy=policy)
        return jax.lax.scan(lambda x, w: (block(x, w), None), carry, rows)[0]

    def loss(params, x, y):
        memory = run("encoder", encode, x, params["encoder"])
        decoder = lambda y, w: decode(y, w, memory)
        return jnp.square(run("decoder", decoder, y, params["decoder"])).sum()

    return jax.grad(loss), step_for(dict.fromkeys(NUM_BLOCKS, "none"))[1]


def encode(x, w):
    return x + jnp.sin(jnp.tanh(x @ w) @ w.T)


def decode(y, w, memory):
    return y + jnp.sin(jnp.tanh(y @ w) * jnp.cos(memory @ w)) @ w.T


def blocks():
    params, x, y = step_for(dict.fromkeys(NUM_BLOCKS, "none"))[1]
    row = lambda name: jax.ShapeDtypeStruct(params[name].shape[1:], params[name].dtype)
    return {
        "encoder": (encode, row("encoder"), x),
        "decoder": (decode, row("decoder"), y, x),
    }


def test_blocks_are_given_by_name():
    found = fitted(step=other_step, block=blocks())
    assert list(found.plan) == ["encoder", "decoder"], "in the order in which they run"
    by_tracing = fitted()
    kept = lambda result: [one for one in result.keeps if "full" in one or "none" in one]
    assert kept(found) == kept(by_tracing)
    with pytest.raises(ValueError, match=r"no stack runs under it; hand .* or give the blocks as"):
        fitted(step=other_step)


def test_a_given_block_whose_plan_is_ignored():
    ignoring = lambda plans: other_step({**plans, "decoder": "none"})
    with pytest.raises(ValueError, match="ignores the plan of 'decoder': the program is the same"):
        fitted(step=ignoring, block=blocks())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((jnp.sin, 1.0, 2.0), "block is one for each stack by name, as num_blocks is: 'decoder', "),
        (
            {**blocks(), "enkoder": (jnp.sin, 1.0, 2.0)},
            r"block has 'enkoder', which num_blocks has not.*\(did you mean 'encoder'\?\)",
        ),
        ({"encoder": (jnp.sin, 1.0, 2.0)}, "block has none for 'decoder'; num_blocks has"),
        ({**blocks(), "decoder": 3}, r"block\['decoder'\] is \(block, params_i, carry, \*consts\)"),
    ],
)
def test_bad_blocks(block, message):
    with pytest.raises(ValueError, match=message) as caught:
        jaxckpt.fit(other_step, num_blocks=NUM_BLOCKS, budget="1MiB", block=block)
    assert "\n" not in str(caught.value)
