"""How a plan's policies become a JAX policy: the one callable that `jax.checkpoint` asks.

A policy is asked `policy(primitive, *avals, **params)` and answers whether the equation's outputs
are saved, moved to the host or recomputed. Ours are made from JAX's public factories and cached,
because JAX compares policies by identity and would trace anew for each new object.

`remat=` takes a policy of the user's as well. It is no plan: `plan_and_policy` hands it on beside
the plan `full`, and it is asked in place of that plan's own.
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

# JAX releases on which an offloaded residual of a scan comes back wrong, without an error.
_BAD_OFFLOAD = {("gpu", "0.11.0"): "gradients of offloaded scan residuals are silently wrong"}

_ANSWERS = (bool, type(ad_checkpoint.Recompute), type(ad_checkpoint.Saveable))


@dataclasses.dataclass(frozen=True)
class GivenPolicy:
    """A policy that the user gave as a function, asked as `jax.checkpoint` asks it.

    Attributes:
      function: `function(primitive, *avals, **params)`.

    Raises:
      PlanError: A function that cannot be called so or has no hash, or, when it is asked, that
        answers with what `jax.checkpoint` does not know.
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
        except ValueError:  # of C, without a signature
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
        """Returns what the function answers, of what `jax.checkpoint` knows."""
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
    """Returns the plan that `remat=` asks for, and the user's policy if that is what was given.

    Raises:
      PlanError: What was given is neither text nor a plan nor a policy, or does not parse.
    """
    if isinstance(remat, str | Plan) or not callable(remat):
        return as_plan(remat), None
    return _FULL, GivenPolicy(remat)


_FULL = Plan.parse("full")


def needs_tags(policies: Iterable[Policy]) -> bool:
    """Returns whether `check` has to know what the block offers."""
    return any(p.kind == "attention" or set(p.names) - {words.CARRY} for p in policies)


def all_of(plan: Plan) -> list[Policy]:
    """Returns the policies of all stages of a plan."""
    return [policy for stage in plan.stages for policy in stage.policies]


def check(policies: Iterable[Policy], offered: Tags):
    """Raises where a policy would silently do nothing, or two say different things.

    Args:
      policies: A stage's policies.
      offered: What the block offers, from `tags.tags_of`.

    Raises:
      PlanError: A name or glob that matches nothing, one value both kept and moved, or
        `attention` for a block without a kernel that jaxckpt knows.
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
    """Returns the policy for `jax.checkpoint`, or None where nothing is kept.

    A tagged value's own rule comes before `dots`: `dots+offload:q` moves q to the host although
    it is a matmul's output.

    Raises:
      PlanError: Offload on a JAX release known to return wrong gradients.
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
    """Returns whether a tag matches; globs never match the reserved tags but invented ones."""
    patterns = tuple(patterns)

    def matches(name: str) -> bool:
        invented = tags.invented_name(name)
        if invented is None and tags.is_reserved(name):
            return name in patterns
        return any(words.matches(invented or name, pattern) for pattern in patterns)

    return matches


def bad_offload(backend: str) -> str | None:
    """Returns why this JAX release is known to be wrong under offload on a backend, or None."""
    return _BAD_OFFLOAD.get((backend, jax.__version__))


def refuse_bad_offload():
    """Raises on a JAX release and backend known to return wrong gradients under offload.

    Raises:
      PlanError: With the reason.
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
