"""One training step: model, loss, gradients and optimizer as a pure function of the state.

A parameter is trained if a pattern matches its path; other parameters are frozen. `--trainable
'layers/self_attn/*'` trains the attention of every block alone. A frozen parameter has no gradient
and no optimizer state. A path is the keys of the parameter tree, joined by slashes. Parameters of
blocks are stacked, so a pattern holds for all blocks.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from experiments.config import ConfigError, TrainConfig
from experiments.training.compilation import choose_unroll
from experiments.training.optimizers import make_optimizer
from jaxckpt.models import Transformer, next_token_loss, resolve
from jaxckpt.models.device_choice import device_of
from jaxckpt.models.sharding import Layout
from jaxckpt.plans.errors import nearest
from jaxckpt.targets.target import Target
from jaxckpt.transforms.accumulate import adding
from jaxckpt.transforms.update_in_backward import update_in_backward

# The values of PyTorch's GradScaler; a gradient that is not finite halves the scale.
_FIRST_SCALE, _GROWTH_STEPS = 2.0**16, 2000
_IGNORED = -1  # the target of a document's last position: it belongs to the next document


class LossScale(NamedTuple):
    """The factor of a loss that makes its gradients large enough for float16.

    Attributes:
      scale: The factor, a power of two, float32.
      steps: Steps with finite gradients since the factor changed, an int32 scalar.
    """

    scale: jax.Array
    steps: jax.Array

    def after(self, finite) -> "LossScale":
        """Returns the scale of the next step (Micikevicius et al. 2018, Mixed precision)."""
        grows = self.steps + 1 == _GROWTH_STEPS
        scale = jnp.where(finite, self.scale * jnp.where(grows, 2, 1), self.scale / 2)
        return LossScale(scale, jnp.where(finite & ~grows, self.steps + 1, 0))


class TrainState(NamedTuple):
    """The state that a training step takes, donated, and returns.

    Attributes:
      step: Steps done, an int32 scalar; with the seed it gives the dropout key.
      params: The model's parameters: float32 or, in blocks, `param_dtype`; frozen ones in the dtype
        of the computation.
      optimizer: Optax's state.
      skipped: Steps whose gradients were not finite, an int32 scalar.
      skipped_in_row: Skipped steps since the last step that was taken, an int32 scalar.
      loss_scale: The loss scale of a computation in float16; None for other dtypes.
      gradient_norm: The gradient norm of the last step that was taken, a float32 scalar, 0 before
        the first step; None unless blocks are updated in the backward pass.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array
    loss_scale: LossScale | None = None
    gradient_norm: jax.Array | None = None


def resolve_model(
    config: TrainConfig, target: str | Target = "local"
) -> tuple[TrainConfig, tuple[str, ...]]:
    """Returns the configuration with the attention, dtype and unrolling of a target.

    Args:
      config: The configuration; its model may have `auto`, and its `unroll` may be 0.
      target: The chip that the step is compiled for, present or not.

    Returns:
      The configuration without `auto` and with a positive `unroll`, and a line for each choice.

    Raises:
      ModelError: The model names a kernel that the target or its sizes do not have.
    """
    sizes = {"seq_len": config.seq_len, "packed": config.pack}
    found = resolve(config.model, target, spread=config.mesh is not None, **sizes)
    unroll, why = config.unroll, found.why
    if config.update_in_backward and not unroll:
        unroll, why = 1, (*why, "unroll 1: blocks are updated in a loop")
    if not unroll:
        count = 1 if config.mesh_shape is None else config.mesh_shape.size
        unroll, because = choose_unroll(config.plan, device_of(target).platform, count)
        why = (*why, because)
    return dataclasses.replace(config, model=found.config, unroll=unroll), why


def layout_of(config: TrainConfig) -> Layout | None:
    """Returns the shardings of a configuration's arrays on its mesh; None without a mesh."""
    return None if config.mesh_shape is None else Layout(config.mesh_shape)


def init_state(config: TrainConfig, params=None) -> TrainState:
    """Returns the state before the first step; abstract under `jax.eval_shape`.

    Args:
      config: A configuration from `resolve_model`.
      params: The model's parameters, such as loaded weights; by default they are drawn.
    """
    if params is None:
        tokens_BS = jnp.zeros([1, config.seq_len], jnp.int32)
        # Parameters do not depend on the plan, so the cheapest one to trace makes them.
        model = Transformer(config.model, remat="none")
        params = model.init(jax.random.key(config.seed), tokens_BS)["params"]
    trainable, frozen = split(params, config.trainable)
    # Frozen parameters need no float32 master copy.
    frozen = jax.tree.map(lambda x: x.astype(config.model.dtype), frozen)
    params = merge(trainable, frozen)
    if config.param_dtype == "bfloat16" and "layers" in trainable:
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainable["layers"])
        trainable = trainable | {"layers": narrow}
        params = merge(trainable, frozen)
    optimizer = _optimizer(config).init(trainable)
    zero = jnp.zeros([], jnp.int32)
    state = TrainState(
        step=zero, params=params, optimizer=optimizer, skipped=zero, skipped_in_row=zero
    )
    if config.update_in_backward:
        state = state._replace(gradient_norm=jnp.zeros([]))
    if config.model.dtype != "float16":
        return state
    return state._replace(loss_scale=LossScale(jnp.float32(_FIRST_SCALE), zero))


def state_bytes(state: TrainState) -> tuple[float, float]:
    """Returns the bytes per parameter of the weights, and of the optimizer's state.

    Args:
      state: The state, abstract or not.
    """
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return size(state.params) / count, size(state.optimizer) / count


def make_train_step(config: TrainConfig):
    """Returns `train_step(state, batch) -> (state, metrics)`, to be jitted with `state` donated.

    `batch` is tokens, `[batch_size, seq_len + 1]` integers: inputs and, shifted by one, targets.
    With `config.pack` it is a pair: tokens, and segment ids in the shape of tokens. The metrics are
    scalars: `loss` in nats per token, `gradient_norm` before clipping, `skipped` and
    `skipped_in_row`. If gradients are not finite, only the two counts and the step's number change,
    so that the next step reads new data. In float16 the loss scale is halved as well.

    Only trainable parameters have gradients and optimizer state, and change.

    Raises (when traced):
      PlanError: The plan names a value that the blocks do not have.
      ConfigError: A pattern of `trainable` matches nothing.
    """
    if config.update_in_backward:
        return _make_updating_step(config)
    optimizer = _optimizer(config)
    loss_of = make_loss(config)
    layout = layout_of(config)

    def train_step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        trainable, frozen = split(state.params, config.trainable)
        count = _targets_a_part(batch, config.accumulate)

        def part_loss(trainable, part, key):
            loss = loss_of(merge(trainable, frozen), part, key, count)
            return loss if state.loss_scale is None else loss * state.loss_scale.scale

        loss, gradients = _gradients(config, part_loss, trainable, batch, key)
        if state.loss_scale is not None:
            scale = state.loss_scale.scale
            loss, gradients = jax.tree.map(lambda x: x / scale, (loss, gradients))
        gradients = _placed(gradients, layout)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trainable)
        taken = (optax.apply_updates(trainable, updates), optimizer_state)
        trainable, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), taken, (trainable, state.optimizer)
        )
        state = _after(
            state,
            finite,
            params=merge(trainable, frozen),
            optimizer=optimizer_state,
            loss_scale=state.loss_scale and state.loss_scale.after(finite),
        )
        state = _placed(state, layout)
        return state, _metrics(loss, norm, state)

    return train_step


def _optimizer(config: TrainConfig, **options):
    """Returns the optimizer of a run."""
    rounds = config.seed if config.param_dtype == "bfloat16" else None
    return make_optimizer(config.optimizer, config.steps, rounds=rounds, **options)


def _make_updating_step(config: TrainConfig):
    """Returns `train_step` with the optimizer's step inside the backward pass.

    Gradients are clipped by the norm of the last step, because this step's norm is known only after
    all blocks are updated. The first step is not clipped. If a gradient is not finite, blocks that
    were updated before it keep their update, and the rest of the step is skipped.
    """
    optimizer = _optimizer(config, clips=False)
    loss_of = make_loss(config)

    def train_step(state: TrainState, batch):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
        trainable, frozen = split(state.params, config.trainable)
        if not trainable.get("layers"):
            raise ConfigError(
                "--update-in-backward updates blocks, and --trainable names no parameter of "
                "layers/; leave it out"
            )
        count = _targets_a_part(batch, 1)
        update = update_in_backward(
            lambda trainable: loss_of(merge(trainable, frozen), batch, key, count),
            optimizer,
            blocks=lambda params: params["layers"],
            skip_nonfinite=True,
            check=False,  # the optimizers of `optimizers.py` are tested for it
        )
        clip, last = config.optimizer.clip_norm, state.gradient_norm
        assert last is not None  # `init_state` makes it
        scale = jnp.where(last > clip, clip / last, 1.0)
        done = update(trainable, state.optimizer, gradient_scale=scale)
        state = _after(
            state,
            done.is_finite,
            params=merge(done.params, frozen),
            optimizer=done.state,
            gradient_norm=jnp.where(done.is_finite, done.gradient_norm, last),
        )
        return state, _metrics(done.value, done.gradient_norm, state)

    return train_step


def _after(state: TrainState, finite, **changes) -> TrainState:
    """Returns the state after a step; `finite` says whether the step was taken."""
    skipped = 1 - finite.astype(jnp.int32)
    return state._replace(
        step=state.step + 1,
        skipped=state.skipped + skipped,
        skipped_in_row=(state.skipped_in_row + 1) * skipped,
        **changes,
    )


def _metrics(loss, norm, state: TrainState) -> dict:
    metrics = {"loss": loss, "gradient_norm": norm}
    return metrics | {"skipped": state.skipped, "skipped_in_row": state.skipped_in_row}


def _placed(tree, layout: Layout | None):
    """Returns a tree with the parameters' paths, such as gradients, sharded over the mesh."""
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, layout.of_params(tree))


def make_loss(config: TrainConfig):
    """Returns `loss(params, batch, key, count)` in nats per token.

    The sum over the batch is divided by `count`; None stands for the number of targets.
    """
    layout = layout_of(config)
    model = Transformer(config.model, remat=config.plan, unroll=config.unroll or 1, layout=layout)
    options = {"chunk_tokens": config.loss_chunk_tokens or None, "z_loss": config.z_loss}
    options["layout"] = layout

    def loss(params, batch, key, count):
        inputs_BS, targets_BS = _inputs_and_targets(batch)
        x_BSD = model.apply(
            {"params": params},
            *inputs_BS,
            deterministic=False,
            rngs={"dropout": key},
            method="features",
        )
        if count is None and config.model.dtype == "float16":
            count = targets_BS.size  # gradients of a mean would be too small for float16
        if count is None:
            return next_token_loss(x_BSD, params, targets_BS, config.model, **options)
        summed = {"ignore_index": _IGNORED, "reduction": "sum", **options}
        return next_token_loss(x_BSD, params, targets_BS, config.model, **summed) / count

    return loss


def _inputs_and_targets(batch):
    """Returns the model's inputs (tokens, and segment ids if packed), and targets `[B, S]`."""
    if not isinstance(batch, tuple):
        return (batch[:, :-1],), batch[:, 1:]
    tokens, ids = batch
    is_same = ids[:, 1:] == ids[:, :-1]
    return (tokens[:, :-1], ids[:, :-1]), jnp.where(is_same, tokens[:, 1:], _IGNORED)


def _targets_a_part(batch, parts: int):
    """Returns the mean number of targets of a packed microbatch; None for a batch without packing.

    Microbatches have different numbers of targets. Sums that are divided by the mean number give
    every target the same weight.
    """
    if not isinstance(batch, tuple):
        return None
    _, targets_BS = _inputs_and_targets(batch)
    return jnp.maximum((targets_BS != _IGNORED).sum(), 1) / parts


def _gradients(config: TrainConfig, part_loss, params, batch, key):
    """Returns the loss and its gradients, accumulated over microbatches.

    Only the activations of one microbatch are live. Gradients are accumulated in place, a block at
    a time in the backward pass; on a mesh, or if no block is trained, after the backward pass.
    """
    if config.accumulate == 1:
        return jax.value_and_grad(part_loss)(params, batch, key)
    parts, layout = config.accumulate, layout_of(config)
    in_place = layout is None and params.get("layers")
    add = adding(part_loss, blocks=lambda params: params["layers"])

    def add_part(total, numbered):
        (loss, gradients), (index, part) = total, numbered
        one_key = jax.random.fold_in(key, index)
        if in_place:
            of_part, gradients = add(params, gradients, part, one_key)
            return (loss + of_part, gradients), None
        found = jax.value_and_grad(part_loss)(params, part, one_key)
        return _placed(jax.tree.map(jnp.add, total, found), layout), None

    def cut(array):
        array = array.reshape(parts, -1, array.shape[-1])
        return array if layout is None else layout.parts(array)

    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    zero = _placed(jax.tree.map(wide, (jnp.zeros([]), params)), layout)
    total, _ = jax.lax.scan(add_part, zero, (jnp.arange(parts), jax.tree.map(cut, batch)))
    return jax.tree.map(lambda x: x / parts, total)


def make_validation_step(config: TrainConfig):
    """Returns `validation_step(params, batch) -> (loss, count)`: nats per token, and tokens.

    The loss is the cross entropy, without dropout and `z_loss`. Rows of -1 pad a batch and are not
    counted.
    """
    layout = layout_of(config)
    model = Transformer(config.model, remat="none", layout=layout)

    def validation_step(params, batch):
        inputs_BS, targets_BS = _inputs_and_targets(batch)
        inputs_BS = [jnp.maximum(x_BS, 0) for x_BS in inputs_BS]
        x_BSD = model.apply({"params": params}, *inputs_BS, method="features")
        options = {"ignore_index": _IGNORED, "return_count": True, "layout": layout}
        return next_token_loss(x_BSD, params, targets_BS, config.model, **options)

    return validation_step


def split(params, patterns: Sequence[str]):
    """Returns `(trainable, frozen)`, two trees that `merge` joins again.

    Args:
      params: The model's parameters, a tree of dictionaries.
      patterns: Globs over paths (`*` matches slashes too); without patterns all is trainable.

    Raises:
      ConfigError: A pattern matches no parameter.
    """
    if not patterns:
        return params, {}
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in flat):
            raise ConfigError(
                f"trainable {pattern!r} matches no parameter{nearest(pattern, flat)}; "
                f"valid: globs over {', '.join(sorted(flat))}"
            )
    learns = lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    part = lambda chosen: traverse_util.unflatten_dict(
        {path: leaf for path, leaf in flat.items() if learns(path) == chosen}, sep="/"
    )
    return part(True), part(False)


def merge(trainable, frozen):
    """Returns the parameters that `split` cut in two."""
    if not frozen:
        return trainable
    flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)
