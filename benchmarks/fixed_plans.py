"""What the planner is held against: fixed plans of the grammar, and MaxText's by name.

`benchmarks.rivals` times them, `benchmarks.planner` counts what they run again.

MaxText saves values by names of its own. Here they are the values of the same products under the
tags of `jaxckpt.models.transformer`:

| MaxText | here |
| --- | --- |
| `query_proj`, `key_proj`, `value_proj` | `q`, `k`, `v` |
| `context` (the attention kernel's output and softmax statistics) | the policy `attention` |
| `out_proj` | `mid`: the sum that it goes into, of the same bytes |
| `mlpwi_0`, `mlpwi_1` | `gate`, `up` |
| `mlpwo` | nothing: no backward pass needs it, so that JAX does not keep it |

MaxText names queries and keys after their norms and rotary positions, whose backward pass then runs
the projections again; here their products are kept, which is never slower.
"""

from jaxckpt.plans import Plan

# MaxText's `remat_policy` -> the plan that it is here.
MAXTEXT = {
    "full": "full",
    "minimal_with_context": "full+attention+names:q,k,v,mid,gate,up",
    "minimal": "full+names:q,k,v,mid,gate,up",
    "save_dot_with_context_except_mlp": "full+attention+names:q,k,v,mid",
    "save_dot_except_mlp": "full+names:q,k,v,mid",
    "save_dot_except_mlpwi": "full+names:q,k,v,mid",
    "save_qkv_proj": "full+names:q,k,v",
    "save_out_proj": "full+names:mid",
    "qkv_proj_offloaded": "full+offload:q,k,v",
    "minimal_offloaded": "full+offload:q,k,v,mid,gate,up",
}
# Those that a user of the grammar would try; `sqrt` is the two-level one.
PLAIN = ("none", "full", "full+attention", "full+dots", "full+dots_no_batch", "sqrt")


def fixed() -> dict[str, tuple[str, ...]]:
    """Returns MaxText's names by plan, none for a plan that it does not have.

    The order is that of compiling: what is at its end is left out first where time is short.
    """
    found: dict[str, tuple[str, ...]] = {canonical(text): () for text in PLAIN[:3]}
    for name, text in MAXTEXT.items():
        plan = canonical(text)
        found[plan] = (*found.get(plan, ()), name)
    found |= {plan: () for plan in map(canonical, PLAIN) if plan not in found}
    return dict(sorted(found.items(), key=lambda item: "offload" in item[0]))


def canonical(text: str) -> str:
    """Returns the one spelling of a plan."""
    return str(Plan.parse(text))
