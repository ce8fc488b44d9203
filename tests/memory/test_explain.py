"""`explain` against bytes counted by hand and against what `jax.vjp` really keeps."""

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import PlanError
from jaxckpt.costs.residuals import checkpointed, single_stage
from jaxckpt.memory.explain import explain
from jaxckpt.models import TransformerConfig, transformer
from jaxckpt.transforms.block_vjp import Moving, Recorder, inexact
from tests.transforms import cases

X, W = jnp.ones((4, 16)), {"w": jnp.ones((16, 32)), "v": jnp.ones((32, 16))}
CARRY = X.size * 4
WIDE = 2 * CARRY
PLANS = ("none", "full", "dots", "dots_no_batch", "names:hidden", "offload:hidden", "sqrt", "log")


def mlp(x, p):
    return x + jnp.sin(jaxckpt.tag(x @ p["w"], "hidden")) @ p["v"]


def transformer_block():
    config = TransformerConfig(vocab_size=16, d_model=32, head_dim=8, d_ff=48, dtype="bf16")
    block = transformer.Block(config)
    x = jnp.ones((2, 16, 32), jnp.bfloat16)
    rotary = transformer.rotary_table(16, 8, 1e6)
    params = jax.eval_shape(block.init, jax.random.key(0), x, rotary)
    return lambda x, params, rotary: block.apply(params, x, rotary), (x, params, rotary)


def kept_by_vjp(block, plan: str, carry, params_i, *consts) -> int:
    """Returns the bytes that `jax.vjp` hands over, those of parameters and consts left out.

    The executor's own recorder tells them apart; a leaf that is handed over twice counts once. A
    cast of a parameter is handed over too, although the executor makes it again.
    """
    fn = checkpointed(block, single_stage(plan))
    tree = jax.tree.structure((carry, params_i, consts))

    def call(carry_leaves, params_leaves, const_leaves):
        leaves = [*carry_leaves, *params_leaves, *const_leaves]
        carry, params_i, consts = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(fn(carry, params_i, *consts))

    groups = [jax.tree.leaves(part) for part in (carry, params_i, consts)]
    places = [tuple(inexact(group)) for group in groups]
    moving = Moving(carry=places[0], params=places[1], consts=places[2])
    recorder = Recorder.trace(call, *groups, moving)
    kept = recorder.run.jaxpr.outvars[recorder.num_carry :]
    places = zip(kept, recorder.sources, recorder.again, strict=True)
    kept = {var for var, source, again in places if source is None or again}
    return sum(var.aval.size * var.aval.dtype.itemsize for var in kept)


def rows_by_name(found) -> dict:
    return {row.name: row for row in found.rows}


def test_bytes_of_a_small_block():
    found = explain(mlp, W, X)
    # x for the first product, the cosine of its output for the sine, the sine for the second.
    assert {row.name: row.residual_bytes for row in found.rows} == {
        "carry": CARRY,
        "cos": WIDE,
        "@sin.1": WIDE,
    }
    assert found.carry_bytes == CARRY
    assert found.residual_bytes == CARRY + 2 * WIDE
    assert found.ratio == 5
    assert found.shared_bytes == sum(leaf.nbytes for leaf in W.values())
    assert found.saved_bytes is None and found.host_bytes is None


def test_where_a_row_is_made_and_what_it_costs():
    row = rows_by_name(explain(mlp, W, X))["@sin.1"]
    line = mlp.__code__.co_firstlineno + 1
    assert row.source == f"test_explain.py:{line}"
    assert (row.shape, row.dtype, row.num_arrays) == ((4, 32), "float32", 1)
    assert row.recompute_flops == 2 * 4 * 16 * 32
    assert row.recompute == "sin < dot_general < carry"


def test_a_librarys_cached_function_is_placed_where_it_is_called():
    jax.jit(lambda x: jax.nn.silu(x))(X)  # the first call, which the cached trace remembers
    found = explain(lambda x, _: jax.nn.silu(x), {}, X)
    line = test_a_librarys_cached_function_is_placed_where_it_is_called.__code__.co_firstlineno
    assert {row.source for row in found.rows if row.source} == {f"test_explain.py:{line + 2}"}


DECISIONS = {
    "none": {"carry": "saved", "cos": "saved", "@sin.1": "saved"},
    "full": {"carry": "saved", "cos": "recomputed", "@sin.1": "recomputed"},
    "sqrt": {"carry": "saved", "cos": "recomputed", "@sin.1": "recomputed"},
    "offload:carry": {"carry": "host", "cos": "recomputed", "@sin.1": "recomputed"},
    "uniform:2": {"carry": "saved", "cos": "saved", "@sin.1": "saved"},
    "names:hidden": {
        "carry": "saved",
        "cos": "recomputed",
        "@sin.1": "recomputed",
        "hidden": "saved",
    },
    "offload:hidden": {
        "carry": "saved",
        "cos": "recomputed",
        "@sin.1": "recomputed",
        "hidden": "host",
    },
}


@pytest.mark.parametrize("plan", DECISIONS)
def test_what_a_plan_does_with_each_row(plan):
    found = explain(mlp, W, X, plan=plan)
    assert {row.name: row.decision for row in found.rows} == DECISIONS[plan]
    assert found.residual_bytes == CARRY + 2 * WIDE, "R does not depend on the plan"
    for row in found.rows:
        kept = {"saved": row.saved_bytes, "host": row.host_bytes, "recomputed": 0}[row.decision]
        assert row.saved_bytes + row.host_bytes == kept
        assert (kept > 0) == (row.decision != "recomputed")


@pytest.mark.parametrize("schedule", ["full", "uniform:2", "every:3"])
def test_one_plan_in_two_spellings(schedule):
    """A carry on the host is not the block's own inputs in the live segment, however spelled."""
    written = [explain(mlp, W, X, plan=f"{schedule}+{end}") for end in CARRY_AND_HIDDEN]
    assert written[0].rows == written[1].rows == written[2].rows
    decisions = {row.name: row.decision for row in written[0].rows}
    assert decisions["hidden"] == "host"
    assert decisions["carry"] == ("host" if schedule == "full" else "saved")


CARRY_AND_HIDDEN = ("offload:carry,hidden", "offload:hidden,carry", "offload:hidden+offload:carry")


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_rows_add_up_to_what_vjp_keeps(plan):
    params, carry, scale = cases.dropout_stack(1)
    params_i = jax.tree.map(lambda leaf: leaf[0], params)
    found = explain(cases.dropout_block, params_i, carry, scale, plan=plan)
    # The executor's recorder differentiates floating inputs alone; a dropout key needs no row.
    kept = kept_by_vjp(cases.dropout_block, plan, carry, params_i, scale)
    assert found.saved_bytes + found.host_bytes == kept
    assert (found.host_bytes > 0) == plan.startswith("offload")


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", ["none", "full", "dots", "names:q,mid+attention", "attention", "offload:q,carry"]
)
def test_rows_of_a_transformer_add_up(plan):
    block, args = transformer_block()
    found = explain(block, args[1], args[0], args[2], plan=plan)
    assert found.saved_bytes + found.host_bytes == kept_by_vjp(block, plan, *args)
    assert len({(row.name, row.source, row.recompute, row.dtype) for row in found.rows}) > 5


def test_an_attention_kernels_arrays_are_one_row():
    block, (x, params, rotary) = transformer_block()
    statistics = 2 * 4 * 16 * 4  # [B, H, S] in float32
    output = 2 * 16 * 4 * 8 * 2  # [B, S, H, N] in bfloat16
    for plan, decision in (("attention", "saved"), ("full", "recomputed")):
        rows = [
            r for r in explain(block, params, x, rotary, plan=plan).rows if r.name == "attention"
        ]
        assert [(r.num_arrays, r.residual_bytes) for r in rows] == [(2, output + statistics)]
        assert [r.decision for r in rows] == [decision]
        assert rows[0].shape == (2, 16, 4, 8)


def test_two_kernels_are_two_rows():
    from jaxckpt.models import causal_attention

    def twice(x, _):
        return causal_attention(causal_attention(x, x, x), x, x)

    rows = explain(twice, {}, jnp.ones((1, 8, 2, 4))).rows
    assert [row.num_arrays for row in rows if row.name == "attention"] == [2, 2]


def test_a_cast_of_a_parameter_is_a_residual_the_parameter_is_not():
    def cast(x, w):
        return x @ w.astype(jnp.bfloat16)

    x, w = jnp.ones((4, 16), jnp.bfloat16), jnp.ones((16, 16))
    found = explain(cast, w, x)
    assert found.shared_bytes == 0
    assert rows_by_name(found)["convert_element_type of params_i"].residual_bytes == 16 * 16 * 2
    plain = explain(lambda x, w: x @ w, w, jnp.ones((4, 16)))
    assert [row.name for row in plain.rows] == ["carry"] and plain.shared_bytes == 16 * 16 * 4


def test_closed_over_arrays_and_consts_are_read_again():
    big = jnp.ones((16, 16))
    closed = explain(lambda x, _: jnp.sin(x @ big), {}, X)
    const = explain(lambda x, _, big: jnp.sin(x @ big), {}, X, big)
    assert closed.residual_bytes == CARRY == const.residual_bytes - CARRY


def test_a_closed_over_key():
    key = jax.random.key(0)
    noisy = lambda x, w: jnp.sin(x @ w) * jax.random.bernoulli(key, 0.5, (4, 16))
    found = explain(noisy, jnp.ones((16, 16)), X, plan="full")
    assert found.saved_bytes == CARRY and found.residual_bytes > CARRY


def test_a_loop_inside_the_block_and_a_tree_of_carries():
    def block(carry, w):
        step = lambda x, _: (jnp.tanh(x @ w), None)
        return {"x": jax.lax.scan(step, carry["x"], None, length=3)[0], "n": carry["n"] + 1}

    carry = {"x": X, "n": jnp.zeros((), jnp.int32)}
    found = explain(block, jnp.ones((16, 16)), carry, plan="full")
    assert found.carry_bytes == CARRY + 4
    assert found.residual_bytes >= 3 * CARRY
    assert "carry/x" in rows_by_name(found)
    stacked = [row for row in found.rows if row.name == "scan"]
    assert stacked and all(row.recompute_flops == 3 * 2 * 4 * 16 * 16 for row in stacked)


@pytest.mark.parametrize("plan", [None, "none", "full", "full+offload:carry", "names:hidden"])
def test_what_a_block_hands_on_is_kept_once(plan):
    """A mask in the carry weighs what it weighs as a const: nothing a block."""
    mask = jnp.ones((4, 16))
    of = lambda x, p, m: mlp(x * m, p)
    handing_on = lambda c, p: {**c, "x": of(c["x"], p, c["m"])}
    carried = explain(handing_on, W, {"x": X, "m": mask}, plan=plan)
    const = explain(of, W, X, mask, plan=plan)
    total = lambda found: (
        found.carry_bytes,
        found.residual_bytes,
        found.shared_bytes,
        found.saved_bytes,
        found.host_bytes,
    )
    assert total(carried) == total(const)
    assert carried.carry_bytes == CARRY
    if plan == "full":
        assert carried.saved_bytes == CARRY
    # Its twin: a mask that every block changes is a part of every carry.
    changing = lambda c, p: {"x": of(c["x"], p, c["m"]), "m": -c["m"]}
    found = explain(changing, W, {"x": X, "m": mask}, plan=plan)
    assert found.carry_bytes == 2 * CARRY
    assert found.residual_bytes == carried.residual_bytes + CARRY


def test_arguments_may_be_abstract():
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert explain(mlp, abstract(W), abstract(X), plan="dots") == explain(mlp, W, X, plan="dots")


def test_text_is_a_table_with_totals():
    text = str(explain(mlp, W, X, num_blocks=28, plan="names:hidden"))
    head, *rows = text.splitlines()
    assert "x 28" in head and "names:hidden" in head and "GFLOP" in head
    assert any(row.startswith("hidden") and "saved" in row for row in rows)
    assert any(row.startswith("R = ") and "R/a = 5.0" in row for row in rows)
    assert "not counted" in rows[-1] and "parameters" in rows[-1]
    assert "x 28" not in str(explain(mlp, W, X)).splitlines()[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"plan": "2xfull/none"}, "treats blocks in 2 ways; ask for one stage, such as '2xfull'"),
        ({"plan": "auto"}, "auto names no plan yet"),
        ({"plan": "names:hiden"}, "did you mean 'hidden'"),
        ({"plan": "dotz"}, "is not a schedule or policy"),
        ({"plan": 3}, "remat is a plan"),
    ],
)
def test_plans_that_cannot_be_explained(options, message):
    with pytest.raises(PlanError, match=message):
        explain(mlp, W, X, **options)


STACK = jax.tree.map(lambda x: jnp.stack([x] * 3), W)


@pytest.mark.parametrize(
    "args, message",
    [
        ((mlp, STACK, X), r"leading axis of 3 in every leaf: one block's.*lambda x: x\[0\]"),
        ((mlp, X, W), r"changed places: the order is \(block, params_i, carry, \*consts\)"),
        ((W, mlp, X), "the first argument is the block, a function, not dict"),
    ],
)
def test_arguments_that_are_not_one_blocks(args, message):
    with pytest.raises(ValueError, match=message):
        explain(*args)


def test_a_blocks_own_error_and_a_carry_that_changes_stay():
    with pytest.raises(KeyError, match="nope"):
        explain(lambda x, p: x + p["nope"], W, X)
    assert explain(lambda x, p: jnp.sin(x @ p["w"]), W, X).residual_bytes > 0


def test_num_blocks_is_at_least_one():
    with pytest.raises(ValueError, match="num_blocks is 0"):
        explain(mlp, W, X, num_blocks=0)


def test_the_public_name():
    assert jaxckpt.explain is explain
