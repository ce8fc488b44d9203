"""`PlanSet`: plans by name for a model of several stacks, hashable, read like a dictionary."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxckpt.plans.plan import Plan, as_plan


class PlanSet(Mapping):
    """One plan for each named stack, such as `{"encoder": full, "decoder": sqrt}`.

    It cannot be changed and is equal to a dictionary of the same plans.

    Example:
      >>> plans = PlanSet({"encoder": "full", "decoder": "8xfull/dots"})
      >>> str(plans["decoder"]), len(plans)
      ('8xfull/dots', 2)
      >>> print(plans)
      encoder=full decoder=8xfull/dots
    """

    def __init__(self, plans: Mapping[str, str | Plan]):
        """Takes plans, or their texts, by name; their order is kept."""
        self._plans = {name: as_plan(plan) for name, plan in plans.items()}

    @classmethod
    def same(cls, names: Iterable[str], plan: str | Plan) -> "PlanSet":
        """Returns one plan for every name."""
        return cls(dict.fromkeys(names, plan))

    def __getitem__(self, name: str) -> Plan:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def __eq__(self, other) -> bool:
        return isinstance(other, Mapping) and self._plans == dict(other)

    def __hash__(self) -> int:
        return hash(frozenset(self._plans.items()))

    def __str__(self) -> str:
        return " ".join(f"{name}={plan}" for name, plan in self._plans.items())

    def __repr__(self) -> str:
        return f"PlanSet({ {name: str(plan) for name, plan in self._plans.items()} })"

    def replace(self, name: str, plan: str | Plan) -> "PlanSet":
        """Returns the plans with one of them replaced."""
        return PlanSet({**self._plans, name: plan})


def plan_json(plan: Plan | PlanSet) -> Any:
    """Returns a plan as JSON values: its text, or texts by name."""
    if isinstance(plan, PlanSet):
        return {name: str(one) for name, one in plan.items()}
    return str(plan)


def plan_of_json(value: Any) -> Plan | PlanSet:
    """Returns the plan, or plans by name, of the values that `plan_json` returned.

    Raises:
      PlanError, AttributeError: The value is neither.
    """
    return PlanSet(value) if isinstance(value, dict) else Plan.parse(value)
