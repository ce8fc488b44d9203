"""How a plan's policies become a JAX policy: the one callable that `jax.checkpoint` asks.

A policy is called as `policy(primitive, *avals, **params)` and answers whether the equation's
outputs are saved, moved to the host or recomputed. Ours are made from JAX's public factories and
cached, because JAX compares policies by identity and would trace again for each new object.

`remat=` takes a user's policy as well. `plan_and_policy` turns it into the plan `full` and the
policy, which then replaces the policies of the plan.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
from jax import ad_checkpoint

from jaxckpt.plans import Plan, PlanError, Policy, as_plan, words
from jaxckpt.plans.errors import nearest
from jaxckpt.transforms import jaxprs, tags
from jaxckpt.transforms.tags import Tags

# Backends and JAX releases on which an offloaded residual of a scan is wrong, without an error.
_BAD_OFFLOAD = {("gpu", "0.11.0"): "gradients of offloaded scan residuals are silently wrong"}

_ANSWERS = (bool, type(ad_checkpoint.Recompute), type(ad_checkpoint.Saveable))


@dataclasses.dataclass(frozen=True)
class GivenPolicy:
    """A policy that the user gave as a function; `jax.checkpoint` calls it through this.

    Attributes:
      function: `function(primitive, *avals, **params)`.

    Raises:
      PlanError: The function does not take these arguments or has no hash. When it is called: it
        returns a value that `jax.checkpoint` does not take.
    """

    function: Callable

    def __post_init__(self):
        if not isinstance(self.function, Hashable):
            raise PlanError(
                f"JAX compares policies and takes none without a hash; {self} has none (a "
                "dataclass has one with frozen=True)"
            )
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # a function of C without a signature
            return
        try:
            signature.bind("primitive", "aval", "aval", a_param=0, another_param=0)
        except TypeError:
            raise PlanError(
                f"remat is a plan such as 'sqrt', or a policy that jax.checkpoint calls as "
                f"policy(primitive, *avals, **params); {self} takes {signature}; of "
                "jax.checkpoint_policies, what takes names or policies is called first"
            ) from None

    def __call__(self, primitive, *avals, **params):
        """Returns the function's answer; raises unless `jax.checkpoint` knows it."""
        answer = self.function(primitive, *avals, **params)
        if isinstance(answer, ad_checkpoint.Offloadable):
            refuse_bad_offload()
        elif not isinstance(answer, _ANSWERS):
            raise PlanError(
                f"the policy {self} answers {answer!r} of {primitive}; jax.checkpoint knows True, "
                "False and jax.ad_checkpoint's Saveable, Recompute and Offloadable(src=, dst=)"
            )
        return answer

    def __str__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def plan_and_policy(remat: Any) -> tuple[Plan, GivenPolicy | None]:
    """Returns the plan that `remat=` asks for, and the user's policy; None if it is a plan.

    Raises:
      PlanError: `remat` is neither text nor a plan nor a policy, or does not parse.
    """
    if isinstance(remat, str | Plan) or not callable(remat):
        return as_plan(remat), None
    return _FULL, GivenPolicy(remat)


_FULL = Plan.parse("full")


def needs_tags(policies: Iterable[Policy]) -> bool:
    """Returns whether `check` needs the block's tags."""
    return any(p.kind == "attention" or set(p.names) - {words.CARRY} for p in policies)


def all_of(plan: Plan) -> list[Policy]:
    """Returns the policies of all stages of a plan."""
    return [policy for stage in plan.stages for policy in stage.policies]


def check(policies: Iterable[Policy], offered: Tags):
    """Raises if a policy would silently do nothing, or two policies contradict each other.

    Args:
      policies: A stage's policies.
      offered: The block's tags, from `tags.tags_of`.

    Raises:
      PlanError: A name or glob matches nothing, a value is both kept and moved, or `attention` is
        asked of a block without a kernel that jaxckpt knows.
    """
    matched = {"names": set(), "offload": set()}
    for policy in policies:
        if policy.kind == "attention" and not offered.attention:
            raise PlanError(
                "policy 'attention' finds no attention kernel in the block; it knows "
                "jaxckpt.models.attention and cuDNN's; names:... can keep tagged values instead"
            )
        for pattern in set(policy.names) - {words.CARRY}:
            matched[policy.kind].update(_matches(policy.kind, pattern, offered))
    both = matched["names"] & matched["offload"]
    if both:
        raise PlanError(
            f"{min(both)!r} is both kept (names) and moved to the host (offload); "
            "name each value once"
        )


def _matches(kind: str, pattern: str, offered: Tags) -> list[str]:
    is_invented = words.is_invented(pattern)
    names = offered.invented if is_invented else offered.names
    matching = [name for name in names if words.matches(name, pattern)]
    if not matching:
        what = "untagged value" if is_invented else "tag"
        none = "it has none" if is_invented else "it has none; see jaxckpt.tag"
        has = f"it has: {', '.join(names)}" if names else none
        if is_invented:
            has += f"; {tags.NAMELESS} has no name"
        raise PlanError(
            f"{kind}:{pattern} matches no {what} of the block{nearest(pattern, names)}; {has}"
        )
    return matching


@functools.cache
def checkpoint_policy(policies: tuple[Policy, ...]) -> Callable | None:
    """Returns the policy for `jax.checkpoint`; None if it would keep nothing.

    A rule that names a value comes before `dots`: `dots+offload:q` moves q to the host although it
    is a matmul's output.

    Raises:
      PlanError: Values would be moved on a JAX release known to return wrong gradients.
    """
    if not policies:
        return None
    patterns = {policy.kind: policy.names for policy in policies}
    saved = _matcher(patterns.get("names", ()))
    moved = _matcher(
        tags.CARRY if name == words.CARRY else name for name in patterns.get("offload", ())
    )
    saves = [words.POLICIES[kind].saves for kind in patterns]
    rules = [words.function_of(text) for text in saves if text is not None]
    if "offload" in patterns:
        refuse_bad_offload()

    def policy(primitive, *avals, **params):
        if primitive.name == jaxprs.TAG:
            name = params["name"]
            if moved(name):
                return _offload_policy(name)(primitive, *avals, **params)
            if saved(name):
                return True
        return any(rule(primitive, *avals, **params) for rule in rules)

    return policy


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Returns a matcher of tags; its globs match invented names, but no other reserved tags."""
    patterns = tuple(patterns)

    def matches(name: str) -> bool:
        invented = tags.invented_name(name)
        if invented is None and tags.is_reserved(name):
            return name in patterns
        return any(words.matches(invented or name, pattern) for pattern in patterns)

    return matches


def bad_offload(backend: str) -> str | None:
    """Returns the fault of this JAX release under offload on a backend; None if none is known."""
    return _BAD_OFFLOAD.get((backend, jax.__version__))


def refuse_bad_offload():
    """Raises if this JAX release and backend are known to return wrong gradients under offload.

    Raises:
      PlanError: The release and backend are known to be wrong; the text says how.
    """
    reason = bad_offload(jax.default_backend())
    if reason:
        raise PlanError(
            f"offload is refused on jax {jax.__version__} ({jax.default_backend()}): {reason}; "
            "use another jax release, or a plan without offload"
        )


@functools.cache
def _offload_policy(name: str) -> Callable:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )
