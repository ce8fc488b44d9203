"""What several of the planner's tests stand on."""

import pytest

from jaxckpt.planner import fit
from jaxckpt.planner.offload_check import Verdict
from tests.planner.steps import CHIP


@pytest.fixture
def chip(monkeypatch):
    """The planner takes this process's CPU for a chip with memory of its own, and a fast link."""
    monkeypatch.setattr(fit, "rates_of", lambda target: CHIP)
    found = Verdict(allowed=True, text="gradients checked on a chip")
    monkeypatch.setattr(fit, "verdict", lambda target, knows_link: found)
    return found
