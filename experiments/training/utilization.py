"""The share of the devices' peak that a step reaches: MFU and HFU (Chowdhery et al. 2022, PaLM).

Both count matrix products and attention, over the bf16 peak. MFU counts the FLOPs that the model
needs. HFU counts the FLOPs that the step runs, with everything that a plan, a kernel or the loss
recomputes. Attention counts every pair of positions of a sequence, as PaLM does: also the half that
a causal mask hides, and pairs of two packed documents.
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
      model: The FLOPs that the model needs.
      hardware: The FLOPs that the devices run.
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
    """Returns the FLOPs of a configuration's step; `built` is from `build`."""
    jaxpr = jax.jit(built.fn, donate_argnums=built.donate_argnums).trace(*built.args).jaxpr
    params = built.args[0].params
    return StepFlops(model=model_flops(config, params), hardware=count_flops(jaxpr, masked=True))


def model_flops(config: TrainConfig, params) -> int:
    """Returns the FLOPs that a training step needs.

    A token takes `6 N + 12 L H Q T`, with N parameters in matrix products, L blocks of H heads of
    size Q, and T tokens in a sequence. Scales of norms are not counted; an embedding table is, if
    it is the head too. A frozen parameter has no gradient and takes 4 FLOPs instead of 6.
    """
    model = config.model
    multiplied = ("kernel", "embedding") if model.tied_embeddings else ("kernel",)
    trainable, frozen = (
        sum(x.size for path, x in tree_leaves_with_path(part) if path[-1].key in multiplied)
        for part in split(params, config.trainable)
    )
    attention = 12 * model.num_blocks * model.num_heads * model.head_dim * config.seq_len
    return config.batch_size * config.seq_len * (6 * trainable + 4 * frozen + attention)
