"""The gradient self-check of plans that move values to the host."""

import jax
import numpy as np
import pytest

from jaxckpt.compiled import cache
from jaxckpt.planner import offload_check
from jaxckpt.planner.offload_check import PLANS, checked, verdict
from jaxckpt.targets.target import LOCAL, parse_target
from jaxckpt.transforms import policies


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCKPT_CACHE", str(tmp_path))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture
def errors(monkeypatch):
    """Errors by plan, in place of those of stacks that are run; counts the asks."""
    found = dict.fromkeys(PLANS, 0.0) | {"asked": 0}

    def error(plan):
        found["asked"] += 1
        return found[plan]

    monkeypatch.setattr(offload_check, "_error", error)
    return found


@pytest.mark.slow
def test_gradients_are_compared_once(monkeypatch):
    found = checked("cpu")
    assert set(found) == set(PLANS) and max(found.values()) < 1e-5
    monkeypatch.setattr(offload_check, "_error", None)
    assert checked("cpu") == found


@pytest.mark.slow
def test_another_blocks_values_are_seen(monkeypatch):
    """What JAX 0.11.0 did: the right shapes, the wrong rows."""
    run = offload_check.scan_blocks

    def wrong(block, weights, x, remat):
        out = run(block, weights, x, remat=remat)
        if remat == "none":
            return out
        other = run(block, weights[::-1], x, remat=remat)
        return jax.lax.stop_gradient(out - other) + other

    monkeypatch.setattr(offload_check, "scan_blocks", wrong)
    for error in checked("cpu").values():
        assert error > 0.1


def test_a_checked_chip(on_gpu, errors):
    found = verdict(LOCAL, knows_link=True)
    assert found.allowed and found.text == f"gradients checked on jax {jax.__version__} on gpu"
    verdict(LOCAL, knows_link=True)
    assert errors["asked"] == len(PLANS), "the second time is read from disk"


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_gradients_are_refused(on_gpu, errors, error):
    errors[PLANS[1]] = error
    found = verdict(LOCAL, knows_link=True)
    assert not found.allowed
    assert f"gradients under {PLANS[1]} are off by" in found.text


def test_what_is_not_whole_is_measured_again(on_gpu, errors, monkeypatch):
    monkeypatch.setattr(cache, "load_json", lambda name: {PLANS[0]: 0.0})
    assert verdict(LOCAL, knows_link=True).allowed and errors["asked"] == len(PLANS)


@pytest.mark.parametrize("target", ["local", "h100"])
def test_a_release_known_to_be_bad(target, on_gpu, errors, monkeypatch):
    monkeypatch.setitem(policies._BAD_OFFLOAD, ("gpu", jax.__version__), "silently wrong")
    found = verdict(parse_target(target), knows_link=True)
    assert not found.allowed and not errors["asked"]
    assert found.text == f"refused on jax {jax.__version__} on gpu: silently wrong"


@pytest.mark.parametrize("target", ["h100", "v5e-1"])
def test_an_absent_chip_cannot_be_checked(target, errors):
    found = verdict(parse_target(target), knows_link=True)
    assert found.allowed and not errors["asked"]
    assert "gradients not checked, as the chip is not here" in found.text
    assert "is not known to be bad" in found.text


def test_where_moving_makes_no_sense(monkeypatch, errors):
    assert verdict(LOCAL, knows_link=True).text.startswith("not proposed: a CPU has no memory")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "the host link of" in verdict(LOCAL, knows_link=False).text
    assert not errors["asked"]


def test_every_value_of_the_check_differs():
    grads = offload_check._gradients("none")
    assert np.unique(np.asarray(grads.weights)).size > 0.99 * grads.weights.size
