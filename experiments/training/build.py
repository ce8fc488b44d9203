"""The abstract train step, to be compiled for any target in any process.

    report = measure_entry(entry_of(config, "v5e-1"), "v5e-1")

It is the whole step that trains: optimizer, donation, accumulation, loss head.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments.config import OptimizerConfig, TrainConfig
from experiments.training.compilation import compiler_options
from jaxckpt.absent.jobs import Entry
from jaxckpt.models.config import TransformerConfig
from jaxckpt.plans import Plan

# The settings that a step is made of; other settings (data, folders) belong to a run.
_OF_STEP = (
    *("model", "optimizer", "unroll", "batch_size", "accumulate", "seq_len", "seed"),
    *("update_in_backward", "param_dtype"),
    *("steps", "loss_chunk_tokens", "z_loss", "trainable", "pack", "mesh"),
)


def entry_of(config: TrainConfig, target: str) -> Entry:
    """Returns the entry that rebuilds a configuration's step in another process."""
    open_entry = plan_entry(config, target)
    # A plan is spelled in one way, so that all its spellings share one compilation.
    plan = str(Plan.parse(config.remat))
    return dataclasses.replace(open_entry, arguments={**open_entry.arguments, "plan": plan})


def plan_entry(config: TrainConfig, target: str) -> Entry:
    """Returns the entry of a configuration's step without its plan, which the planner adds."""
    settings = config.to_dict()
    arguments = {"settings": {name: settings.get(name) for name in _OF_STEP}, "target": target}
    return Entry(function="experiments.training.build:built_step", arguments=arguments)


def built_step(settings: Mapping[str, Any], target: str, plan: str):
    """Returns the `BuiltStep` of the settings in an entry of `entry_of`."""
    tables = {
        "remat": plan,
        "model": TransformerConfig(**settings["model"]),
        "optimizer": OptimizerConfig(**settings["optimizer"]),
        "trainable": tuple(settings["trainable"]),
    }
    return build(TrainConfig(**{**settings, **tables}), target)


def build(config: TrainConfig, target: str):
    """Returns the abstract `BuiltStep` of a configuration for a target.

    On a mesh the arguments have shardings: over this process's devices for `local`, else over a
    mesh without devices.

    Raises:
      ConfigError: The configuration names a kernel that the target lacks, or a mesh of another
        size.
      PlanError (when traced): The plan names a value that the blocks do not have.
    """
    from experiments.training.mesh import abstract_state, abstract_tokens, make_mesh
    from experiments.training.step import make_train_step, resolve_model
    from jaxckpt.memory.built_step import BuiltStep
    from jaxckpt.models.device_choice import device_of

    config, _ = resolve_model(config, target)
    mesh = make_mesh(config) if target == "local" else None
    state = abstract_state(config, mesh)
    tokens = abstract_tokens(config, mesh)
    batch = (tokens, tokens) if config.pack else tokens
    return BuiltStep(
        fn=make_train_step(config),
        args=(state, batch),
        donate_argnums=0,
        plan=config.plan,
        baseline=make_train_step(dataclasses.replace(config, remat="none")),
        block=abstract_block(config, state.params),
        unroll=config.unroll,
        compiler_options=compiler_options(device_of(target).platform),
        tokens=config.batch_size // config.accumulate * config.seq_len,
        # On a mesh logits are sharded in two ways, and a buffer's shape does not tell which.
        vocab_size=config.model.vocab_size if config.mesh is None else 0,
    )


def abstract_block(config: TrainConfig, params):
    """Returns `(block, params_i, x, *consts)` of the model's stack for one microbatch.

    It is the block that the stack runs, so untagged values have the same names: the plan decides
    whether parameters are cast outside of the block or inside. On a mesh the block has the
    sequences of one device, but all heads and whole widths, although `tensor` shards them.

    Args:
      config: A configuration that is resolved for its target.
      params: The model's parameters, arrays or abstract.
    """
    import jax

    from jaxckpt.linen import in_dtype
    from jaxckpt.models.transformer import Block, rotary_table
    from jaxckpt.transforms import rows, traced_block

    module = Block(config.model)
    cast = functools.partial(in_dtype, dtype=config.model.dtype)
    # Blocks that use their gradients at once get uncast parameters.
    is_inside = rows.reads_inside(config.plan, config.unroll) or config.update_in_backward
    is_inside |= config.accumulate > 1 and config.mesh is None
    batch = config.batch_size // config.accumulate
    batch //= 1 if config.mesh_shape is None else config.mesh_shape.batch_parts
    x = jax.ShapeDtypeStruct((batch, config.seq_len, config.model.d_model), config.model.dtype)
    rotary = jax.eval_shape(
        lambda: rotary_table(config.seq_len, config.model.head_dim, config.model.rope_theta)
    )
    params_i = traced_block.first_block(params["layers"])
    params_i = params_i if is_inside else jax.eval_shape(cast, params_i)
    consts = [rotary]
    if config.pack:
        consts.append(jax.ShapeDtypeStruct((batch, config.seq_len), "int32"))

    def block(x, params_i, *consts):
        rngs = {"dropout": jax.random.key(0)}
        params_i = cast(params_i) if is_inside else params_i
        return module.apply({"params": params_i}, x, *consts, deterministic=False, rngs=rngs)

    return block, params_i, x, *consts
