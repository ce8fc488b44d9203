"""`update_in_backward`: the optimizer's step inside the backward pass, block by block.

    step = jaxckpt.update_in_backward(loss, optimizer, blocks=lambda params: params["layers"])
    done = step(params, state, batch)          # jit it, with params and state donated

In a separate step, the gradients of all blocks are in memory before the optimizer reads the first
one; they need the memory of the parameters. Here each block is updated as soon as its gradient is
complete, so that the gradient of only one block is in memory. Other parameters, such as embedding
and head, are updated after the backward pass.

Limits: an update that needs all gradients first is not possible. That is clipping by this step's
norm (pass `gradient_scale`, from the last step's norm), accumulation over several calls, and
skipping a whole step for a gradient that is not finite.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt.plans.errors import shown
from jaxckpt.transforms import stack_update
from jaxckpt.transforms.optimizer_rows import OptimizerRows, check_blockwise


class Updated(NamedTuple):
    """The result of a step.

    Attributes:
      value: The value of the loss; with `has_aux`, the pair `(scalar, aux)`.
      params: The new parameters.
      state: The new state of the optimizer.
      gradient_norm: The global norm of the gradients, before `gradient_scale`, a float32 scalar.
      is_finite: Whether the loss and all gradients were finite, a boolean scalar.
    """

    value: Any
    params: Any
    state: Any
    gradient_norm: jax.Array
    is_finite: jax.Array


def update_in_backward(
    loss: Callable,
    optimizer,
    *,
    blocks: Callable,
    has_aux: bool = False,
    skip_nonfinite: bool = False,
    check: bool = True,
) -> Callable:
    """Returns a training step that updates each block of a stack when its gradient is complete.

    New parameters and state equal those of a separate step: `jax.value_and_grad`,
    `optimizer.update` and adding the updates. Under `jax.jit`, donate parameters and state;
    otherwise the old and the new ones are in memory together.

    Args:
      loss: `loss(params, *args) -> scalar`. It runs one stack, by `scan_blocks`, `scan` or a
        `Stack` under any plan, on the arrays that `blocks` returns. The loss may not cast these
        arrays; the block may cast its own row.
      optimizer: An optimizer with Optax's `init` and `update`, whose update of a block depends on
        that block only.
      blocks: `blocks(params)` returns the stacked part of the parameters, leaves `[L, ...]`.
      has_aux: Whether the loss returns `(scalar, aux)`.
      skip_nonfinite: Whether updates stop at the first gradient that is not finite. The backward
        pass goes from the last block to the first: blocks after that one keep their update, and
        this block, all blocks before it and all other parameters are not updated.
      check: Whether to run the optimizer on a few numbers when the step is traced, to find an
        optimizer whose update of a block depends on other gradients.

    Returns:
      `step(params, state, *args, gradient_scale=None) -> Updated`. `state` is the value of
      `optimizer.init(params)`. Gradients are multiplied by `gradient_scale` before the optimizer
      sees them.

    Raises:
      ValueError: `loss`, `optimizer` or `blocks` is of the wrong type. When the step is traced: the
        optimizer's update of a block depends on other blocks or parameters; or the loss does not
        run the stack, runs it twice, or reads its parameters elsewhere too.

    Example:
      >>> import jax, jax.numpy as jnp, jaxckpt, optax
      >>> block = lambda x, w: x + jnp.tanh(x @ w)
      >>> def loss(params, x):
      ...     y = jaxckpt.scan_blocks(block, params["blocks"], x, remat="full")
      ...     return jnp.square(y @ params["head"]).mean()
      >>> optimizer = optax.adamw(1e-3)
      >>> step = jaxckpt.update_in_backward(loss, optimizer, blocks=lambda params: params["blocks"])
      >>> params = {"blocks": jnp.ones([12, 8, 8]), "head": jnp.ones([8, 1])}
      >>> done = jax.jit(step, donate_argnums=(0, 1))(
      ...     params, optimizer.init(params), jnp.ones([4, 8])
      ... )
      >>> done.params["blocks"].shape, bool(done.is_finite)
      ((12, 8, 8), True)
    """
    for name, given in (("loss", loss), ("blocks", blocks)):
        if not callable(given):
            raise ValueError(f"update_in_backward takes a function as {name}, not {shown(given)}")
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise ValueError(
            f"update_in_backward takes an optimizer with init and update, not {shown(optimizer)}"
        )

    @functools.wraps(loss)
    def step(params, state, *args, gradient_scale=None) -> Updated:
        leaves, tree = jax.tree.flatten(params)
        places = places_of(blocks, tree)
        rest = [n for n in range(len(leaves)) if n not in places]
        cut = OptimizerRows.of(optimizer, params, places)
        if check:
            check_blockwise(optimizer, params, places)
        state_leaves = jax.tree.leaves(state)
        if jax.tree.structure(state) != cut.state_tree:
            raise ValueError("update_in_backward: state is not what optimizer.init(params) returns")
        scale = 1.0 if gradient_scale is None else gradient_scale
        scaled = lambda g: g if gradient_scale is None else (g * scale).astype(g.dtype)

        def update_block(grads, params, rows):
            return cut.update_block(list(map(scaled, grads)), params, rows, state_leaves)

        def value_of(others, stack, rows, told):
            one = stack_update.Attached(
                marks=list(map(mark, stack)),
                params=stack,
                rows=rows,
                told=told,
                update=update_block,
                skips=skip_nonfinite,
            )
            return value_with(one, loss, tree, dict(zip(rest, others, strict=True)), places, *args)

        pick = lambda leaves, places: [leaves[n] for n in places]
        arguments = (pick(leaves, rest), pick(leaves, places), pick(state_leaves, cut.rows))
        run = jax.value_and_grad(value_of, (0, 1, 2, 3), has_aux)
        value, (grads, stack, rows, told) = run(*arguments, jnp.zeros([2], jnp.float32))
        squares = told[0] + sum(jnp.square(g.astype(jnp.float32)).sum() for g in grads)
        of_rest = dict(zip(rest, map(scaled, grads), strict=True))
        new, shared = cut.update_rest(
            of_rest, dict(zip(rest, arguments[0], strict=True)), state_leaves
        )
        number = value[0] if has_aux else value
        is_finite = jnp.isfinite(squares) & (told[1] > 0) & jnp.isfinite(number)
        if skip_nonfinite:
            keep = lambda a, b: jnp.where(is_finite, a, b)
            new = list(map(keep, new, arguments[0]))
            shared = {n: keep(x, state_leaves[n]) for n, x in shared.items()}
        made = dict(zip(rest, new, strict=True)) | dict(zip(places, stack, strict=True))
        shared |= dict(zip(cut.rows, rows, strict=True))
        return Updated(
            value=value,
            params=jax.tree.unflatten(tree, [made[n] for n in range(len(leaves))]),
            state=jax.tree.unflatten(cut.state_tree, [shared[n] for n in range(len(shared))]),
            gradient_norm=jnp.sqrt(squares),
            is_finite=is_finite,
        )

    return step


def value_with(
    one: stack_update.Attached, loss: Callable, tree, others: dict, places: Sequence[int], *args
):
    """Returns the value of the loss, whose stack uses its gradients as `one` says.

    Args:
      one: The stack's parameters, and how their gradients are used.
      loss: `loss(params, *args)`.
      tree: The structure of the parameters.
      others: The parameters beside the stack, by their places.
      places: The places of the stack's parameters.
      *args: The other arguments of the loss.

    Raises:
      ValueError: The loss runs no stack over the marked parameters.
    """
    given = others | dict(zip(places, one.marks, strict=True))
    with stack_update.attached(one):
        value = loss(tree.unflatten([given[n] for n in range(len(given))]), *args)
    if not one.is_used:
        raise ValueError(
            "the loss runs no stack over the arrays that blocks= returns; hand them to "
            "scan_blocks, scan or a Stack as they are (a block casts its own row), and not inside "
            "of jax.checkpoint or jit"
        )
    return value


def places_of(blocks: Callable, tree) -> tuple[int, ...]:
    """Returns the places of the stack's leaves among those of the parameters."""
    # Plain objects have no arithmetic, so that `blocks` can only pick arrays, not compute new ones.
    stand_ins = [object() for _ in range(tree.num_leaves)]
    places = {one: place for place, one in enumerate(stand_ins)}
    try:
        picked = jax.tree.leaves(blocks(tree.unflatten(stand_ins)))
    except (TypeError, AttributeError):
        picked = []
    found = tuple(places[one] for one in picked if one in places)
    if not found or len(found) < len(picked):
        raise ValueError(
            "update_in_backward: blocks(params) returns a part of params, such as "
            f"params['blocks'], as it is; got {shown(blocks)}"
        )
    return found


@jax.custom_vjp
def mark(x):
    """Returns a stack's parameter, which the loss may hand to the stack and use nowhere else."""
    return jnp.copy(x)


def _mark_forward(x):
    return mark(x.value), None


def _mark_backward(_, grad):
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return (grad,)
    raise ValueError(
        "update_in_backward: the loss reads parameters of the blocks outside of their stack too "
        "(tied weights, or a penalty on them), so that a block's gradient is not complete "
        "after the block's reversal; use a separate step"
    )


mark.defvjp(_mark_forward, _mark_backward, symbolic_zeros=True)
