"""How much of its devices' peak a step reaches: MFU and HFU (Chowdhery et al. 2022, PaLM).

Both count matrix products and attention over the bf16 peak. MFU counts what the model needs,
however it is run. HFU's are those that the step runs, with what a plan, a kernel or the loss runs
again. Attention counts every pair of positions of a row, as PaLM does: also the half that a causal
mask hides, and in packed rows pairs of two documents.
"""

import dataclasses

import jax
from jax.tree_util import tree_leaves_with_path

from experiments.config import TrainConfig
from experiments.training.step import split
from jaxckpt.costs.flops import count_flops
from jaxckpt.memory.built_step import BuiltStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one training step, on all its devices together.

    Attributes:
      model: What the model needs.
      hardware: What the devices run.
    """

    model: int
    hardware: int

    def utilization(self, seconds: float, peak_flops: float | None) -> dict[str, float]:
        """Returns `mfu` and `hfu`; empty if the devices' peak, in FLOPs a second, is unknown."""
        if peak_flops is None:
            return {}
        count = {"mfu": self.model, "hfu": self.hardware}
        return {name: flops / seconds / peak_flops for name, flops in count.items()}


def step_flops(config: TrainConfig, built: BuiltStep) -> StepFlops:
    """Returns the FLOPs of a configuration's step, which `build` has made."""
    jaxpr = jax.jit(built.fn, donate_argnums=built.donate_argnums).trace(*built.args).jaxpr
    params = built.args[0].params
    return StepFlops(model=model_flops(config, params), hardware=count_flops(jaxpr, masked=True))


def model_flops(config: TrainConfig, params) -> int:
    """Returns the FLOPs that a training step needs.

    A token takes `6 N + 12 L H Q T`: N parameters in matrix products (no scales, and of embeddings
    only a table that is the head too), L blocks of H heads of size Q, and T tokens a row. A frozen
    parameter has no gradient and takes 4.
    """
    model = config.model
    multiplied = ("kernel", "embedding") if model.tied_embeddings else ("kernel",)
    trainable, frozen = (
        sum(x.size for path, x in tree_leaves_with_path(part) if path[-1].key in multiplied)
        for part in split(params, config.trainable)
    )
    attention = 12 * model.num_blocks * model.num_heads * model.head_dim * config.seq_len
    return config.batch_size * config.seq_len * (6 * trainable + 4 * frozen + attention)
