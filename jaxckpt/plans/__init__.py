"""Plans and schedules: pure Python data, standard library only, no JAX."""

from jaxckpt.plans.errors import PlanError
from jaxckpt.plans.plan import Plan, Policy, Stage, as_plan

__all__ = ["Plan", "PlanError", "Policy", "Stage", "as_plan"]
