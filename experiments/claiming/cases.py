"""What the claims page compiles: two models for a 16 GB and an 80 GB chip, under several plans."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from experiments.config import TrainConfig, load_toml
from experiments.sweeping.case import flags_of
from jaxckpt.models.config import TransformerConfig

ROOT = Path(__file__).parents[2]
SMALL_CHIP, LARGE_CHIP = "v5e-1", "h100"
PLANS = ("none", "full", "uniform:4", "sqrt", "log")
# log2 L and sqrt L segments of the example's 32 blocks.
LOG_SEGMENTS, SQRT_SEGMENTS = "uniform:5", "uniform:6"
EXAMPLE, QWEN = "the example", "Qwen3-0.6B"
# About the peak of `full` on the large chip, so that the planner has a choice.
AUTO_BUDGET = "10GiB"
_FILES = {
    (EXAMPLE, SMALL_CHIP): "note_32x4096_16gb",
    (EXAMPLE, LARGE_CHIP): "note_32x4096_80gb",
    (QWEN, SMALL_CHIP): "qwen3_0p6b_16gb",
    (QWEN, LARGE_CHIP): "qwen3_0p6b",
}
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One compilation.

    Attributes:
      name: What the page calls it; unique.
      config: The configuration of the step; its plan may be `auto`.
      target: The chip.
    """

    name: str
    config: TrainConfig
    target: str

    @property
    def key(self) -> str:
        """A digest that is equal for equal steps on equal targets."""
        # Flags leave out defaults, so a new setting changes no key.
        asked = [flags_of(self.config), self.target]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def all_cases() -> tuple[Case, ...]:
    """Returns every case; the most telling ones first."""
    pairs = [(target, model) for target in (LARGE_CHIP, SMALL_CHIP) for model in (EXAMPLE, QWEN)]
    found = [plan_case(model, target, plan) for target, model in pairs for plan in PLANS]
    found += [plan_case(EXAMPLE, LARGE_CHIP, plan) for plan in (LOG_SEGMENTS, SQRT_SEGMENTS)]
    found += [
        _case("in one part", LARGE_CHIP, "qwen3_0p6b", remat="full", batch_size=32),
        _case("in four parts", LARGE_CHIP, "qwen3_0p6b", remat="full", batch_size=32, accumulate=4),
        _case("float32", LARGE_CHIP, "qwen3_0p6b", remat="full", dtype="f32"),
        _case("4B", SMALL_CHIP, "qwen3_4b_16gb"),
        _case("8B", LARGE_CHIP, "qwen3_8b"),
    ]
    auto = {"remat": "auto", "budget": AUTO_BUDGET}
    found.append(_case(f"auto, {QWEN}", LARGE_CHIP, _FILES[QWEN, LARGE_CHIP], **auto))
    return tuple(found)


def plan_case(model: str, target: str, plan: str) -> Case:
    """Returns the case of one of the two models under a plan."""
    return _case(f"{model}, {target}, {plan}", target, _FILES[model, target], remat=plan)


def _case(name: str, target: str, file: str, **changes) -> Case:
    flags = load_toml(ROOT / f"configs/{file}.toml")
    values = {key.replace("-", "_"): value for key, value in flags.items()} | changes
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    model: dict[str, Any] = {name: values.pop(name) for name in [*values] if name in fields}
    # All plans in the same loop, so that nothing but the plan differs between them.
    values["unroll"] = 1
    values["trainable"] = tuple(values.get("trainable", ()))
    config = TrainConfig(model=TransformerConfig(**model), **values)
    return Case(name=name, target=target, config=config)
