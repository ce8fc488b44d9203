"""What several benchmarks run: models, batches, and the fixed plans that the planner has to beat.

A case is a dict of JSON values: the argument of a process. `benchmarks.rivals` times the fixed
plans, and `benchmarks.planner` counts their recomputed FLOPs. Imports no JAX.

MaxText has its own names for saved values. The same values have these tags in
`jaxckpt.models.transformer`:

| MaxText | here |
| --- | --- |
| `query_proj`, `key_proj`, `value_proj` | `q`, `k`, `v` |
| `context` (the attention kernel's output and softmax statistics) | the policy `attention` |
| `out_proj` | `mid`: the residual stream after adding `out_proj`; both have one size |
| `mlpwi_0`, `mlpwi_1` | `gate`, `up` |
| `mlpwo` | none: no backward pass reads it, so that JAX does not keep it |

MaxText saves queries and keys after their norms and rotary positions. The backward pass of the
norms then recomputes the projections. Here `q` and `k` are the projections themselves, so that they
are not recomputed, which is never slower.
"""

import dataclasses
from typing import Any, Literal

from cyclopts import Parameter

from experiments.config import ConfigError, TrainConfig
from jaxckpt.models.config import TransformerConfig
from jaxckpt.plans import Plan

Case = dict[str, Any]

# Qwen3-0.6B's shape, and a model for trying a benchmark.
QWEN3 = TransformerConfig(
    vocab_size=151936,
    num_blocks=28,
    d_model=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=3072,
)
TINY = TransformerConfig(num_blocks=4)
SHORT: Case = {"batch_size": 8, "seq_len": 1024}
LONG: Case = {"batch_size": 2, "seq_len": 16384}
KEPT = "full+attention+names:q,k,v,mid,gate,up"
_SETTINGS = ("batch_size", "seq_len", "unroll", "loss_chunk_tokens")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The stack of the executor's part `nested`.

    Attributes:
      tokens: `nested`: tokens in a batch.
      width: `nested`: width of the stack, a multiple of 128.
      blocks: `nested`: number of blocks.
      dtype: `nested`: dtype of the computation.
      sequence: `nested`: tokens in a sequence, `tokens` at most.
      pairs: `nested`: timed pairs.
    """

    tokens: int = 1024
    width: int = 256
    blocks: int = 16
    dtype: Literal["f32", "bf16"] = "f32"
    sequence: int = 256
    pairs: int = 7

    def __post_init__(self):
        if self.width % 128 or self.width < 128:
            raise ConfigError(
                f"--width is {self.width}; valid: a multiple of 128, the width of a head"
            )
        if self.blocks < 2 or min(self.pairs, self.tokens, self.sequence) < 1:
            raise ConfigError(
                f"--blocks is {self.blocks}, --pairs {self.pairs}, --tokens {self.tokens}, "
                f"--sequence {self.sequence}; valid: at least 2 blocks, at least 1 of the others"
            )
        if self.tokens % min(self.tokens, self.sequence):
            raise ConfigError(f"--tokens is {self.tokens}, not a multiple of --sequence")


def tiny(case: Case) -> Case:
    """Returns the case of a small model and batch."""
    return case | {"batch_size": 2, "seq_len": 64, "tiny": True}


def config_of(case: Case, plan: str) -> TrainConfig:
    """Returns the training run of a case under a plan."""
    settings = {name: case[name] for name in _SETTINGS if name in case}
    return TrainConfig(model=TINY if case.get("tiny") else QWEN3, remat=plan, **settings)


# MaxText's `remat_policy` -> the plan that it is here.
MAXTEXT = {
    "full": "full",
    "minimal_with_context": KEPT,
    "minimal": "full+names:q,k,v,mid,gate,up",
    "save_dot_with_context_except_mlp": "full+attention+names:q,k,v,mid",
    "save_dot_except_mlp": "full+names:q,k,v,mid",
    "save_dot_except_mlpwi": "full+names:q,k,v,mid",
    "save_qkv_proj": "full+names:q,k,v",
    "save_out_proj": "full+names:mid",
    "qkv_proj_offloaded": "full+offload:q,k,v",
    "minimal_offloaded": "full+offload:q,k,v,mid,gate,up",
}
# Plans that a user of the grammar would try; `sqrt` is two-level checkpointing.
PLAIN = ("none", "full", "full+attention", "full+dots", "full+dots_no_batch", "sqrt")


def fixed() -> dict[str, tuple[str, ...]]:
    """Returns MaxText's names of each plan: an empty tuple for a plan that MaxText does not have.

    The plans are compiled in this order; where time is short, the last ones are left out.
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
