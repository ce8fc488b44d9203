"""Findings: each is made to happen for real, and a twin beside it where it must not appear."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import PlanError
from jaxckpt.compiled.buffers import read_buffers
from jaxckpt.costs.roofline import Rates
from jaxckpt.memory.explain import explain
from jaxckpt.memory.finding import Finding, peak_not_below_none
from jaxckpt.memory.findings import (
    block_sets_peak,
    carry_slow_to_move,
    count_products,
    findings_of_block,
    head_sets_peak,
    undone_remat,
)
from tests.transforms import cases

X, W = jnp.ones((2, 8, 16)), jnp.ones((2, 16, 16))


def codes(block, plan: str, carry=X, params_i=W) -> list[str]:
    found = findings_of_block(block, params_i, carry, plan=plan)
    for finding in found:
        assert "\n" not in str(finding) and finding.code in str(finding)
        # A name is spelled as the plan spells it, and there is always something to do.
        assert ";" in finding.message
    return [finding.code for finding in found]


def batched(x, w):
    return jnp.tanh(jnp.einsum("bsd,bde->bse", x, w))


def plain(x, w):
    return jnp.tanh(x @ w[0])


def test_a_dots_policy_without_dots_that_it_may_keep():
    assert codes(batched, "dots_no_batch") == ["dots-save-nothing"]
    assert codes(batched, "dots") == codes(plain, "dots_no_batch") == codes(batched, "full") == []
    (finding,) = findings_of_block(batched, W, X, plan="dots_no_batch")
    assert "every matmul of the block (1) has batch dimensions; use dots" in finding.message


def test_a_dots_policy_for_a_block_without_matmuls():
    (finding,) = findings_of_block(lambda x, _: jnp.sin(x), W, X, plan="uniform:2+dots")
    assert "the block has no matmul" in finding.message


def test_a_dots_policy_whose_dots_nobody_asks_for():
    linear = lambda x, w: x + x @ w[0]
    (finding,) = findings_of_block(linear, W, X, plan="dots")
    assert "the backward pass needs none" in finding.message


def test_the_dots_finding_is_true():
    """What the finding says, seen in bytes: the policy keeps what `full` keeps."""
    kept = lambda plan: explain(batched, W, X, plan=plan).saved_bytes
    assert kept("dots_no_batch") == kept("full") < kept("dots")


def tagged(x, w):
    """`pre` is what the sine's derivative reads, `out` is the block's output."""
    inner = jnp.sin(jaxckpt.tag(x @ w[0], "pre"))
    return jaxckpt.tag(x + inner @ w[1], "out")


@pytest.mark.parametrize("kind", ["names", "offload"])
def test_a_tag_on_the_blocks_output(kind):
    assert codes(tagged, f"{kind}:out") == codes(tagged, f"{kind}:pre,out") == ["tag-on-output"]
    assert codes(tagged, f"{kind}:pre") == []
    assert codes(tagged, "offload:carry") == codes(tagged, "sqrt+offload:carry") == []
    (finding,) = findings_of_block(tagged, W, X, plan=f"{kind}:out")
    assert finding.message.startswith(f"{kind}:out does nothing")
    assert "write offload:carry" in finding.message


def test_a_tag_on_the_output_that_the_block_itself_reads():
    def used(x, w):
        out = jaxckpt.tag(x @ w[0], "out")
        return {"y": out, "z": jnp.sin(out) @ w[1]}

    block = lambda carry, w: used(carry["y"], w)
    carry = {"y": X, "z": X}
    assert codes(block, "names:out", carry=carry) == []


def test_the_output_finding_is_true():
    for plan in ("names:out", "offload:out"):
        found = explain(tagged, W, X, plan=plan)
        assert (found.saved_bytes, found.host_bytes) == (X.nbytes, 0), "the carry, as in full"


def after_tanh(x, w):
    """The tanh's derivative reads the untagged output, so the product is made again anyway."""
    return x + jaxckpt.tag(jnp.tanh(x @ w[0]), "post") @ w[1]


def before_tanh(x, w):
    return x + jnp.tanh(jaxckpt.tag(x @ w[0], "pre")) @ w[1]


def test_a_name_that_spares_no_step():
    assert codes(after_tanh, "names:post") == ["tag-not-needed"]
    assert codes(before_tanh, "names:pre") == []
    assert codes(after_tanh, "3xnone/2xfull/names:post") == ["tag-not-needed"]
    assert explain(after_tanh, W, X, plan="names:post").saved_bytes == 2 * X.nbytes, "it costs"


def test_a_name_nobody_asks_for():
    block = lambda x, w: x + jaxckpt.tag(x @ w[0], "product")
    assert codes(block, "names:product") == ["tag-not-needed"]
    assert explain(block, W, X, plan="names:product").saved_bytes == X.nbytes, "not even kept"


def test_two_names_of_one_value_are_both_of_use():
    """Neither is needed beside the other; alone each spares the product."""

    def block(x, w):
        return x + jnp.sin(jaxckpt.tag(jaxckpt.tag(x @ w[0], "a"), "b")) @ w[1]

    assert codes(block, "names:a,b") == codes(block, "names:*") == []


def test_a_name_beside_dots_that_keep_the_same():
    assert codes(before_tanh, "dots+names:pre") == []


def test_blocks_with_keys_consts_and_kernels():
    params, carry, scale = cases.dropout_stack(1)
    params_i = jax.tree.map(lambda leaf: leaf[0], params)
    for plan in ("names:hidden", "offload:hidden", "dots", "dots_no_batch", "none", "log"):
        assert findings_of_block(cases.dropout_block, params_i, carry, scale, plan=plan) == ()


def test_names_that_match_nothing_stay_errors():
    with pytest.raises(PlanError, match="did you mean 'pre'"):
        findings_of_block(tagged, W, X, plan="names:prr")


# Steps that are compiled.


def stack_step(plan: str, unroll: int, num_blocks: int = 4):
    """Returns the traced gradient of a stack of sines of products."""
    w = jnp.ones((num_blocks, 32, 32))

    def loss(w, x):
        block = lambda x, w: jnp.sin(x @ w)
        return jaxckpt.scan_blocks(block, w, x, remat=plan, unroll=unroll).sum()

    return jax.jit(jax.grad(loss)).trace(w, jnp.ones((4, 32)))


def undone(plan: str, unroll: int) -> tuple[Finding, ...]:
    traced, plain = stack_step(plan, unroll), stack_step("none", unroll)
    text = traced.lower().compile().as_text()
    return undone_remat(plan, text, traced.jaxpr, plain.jaxpr)


def test_products_are_counted_as_they_are_written_out():
    # Of a block: forward, again (full), and two gradients, less the first carry's.
    assert count_products(stack_step("none", 1).jaxpr) == 1 + 2
    assert count_products(stack_step("full", 1).jaxpr) == 1 + 3
    assert count_products(stack_step("full", 4).jaxpr) == 4 * (1 + 3)
    assert count_products(stack_step("full", 3).jaxpr) == 4 * (1 + 3)


def compiled_products(plan: str, unroll: int) -> int:
    return stack_step(plan, unroll).lower().compile().as_text().count(" dot(")


def test_remat_that_the_compiler_undoes():
    if compiled_products("full", 4) > compiled_products("none", 4):
        pytest.skip(f"jax {jax.__version__} keeps the remat of unrolled blocks on this backend")
    (finding,) = undone("full", unroll=4)
    assert finding.code == "remat-undone"
    assert "use unroll=1" in finding.message


def test_remat_in_a_loop_is_kept():
    assert compiled_products("full", 1) > compiled_products("none", 1)
    assert undone("full", unroll=1) == undone("none", unroll=4) == ()


def test_the_finding_and_the_compiled_step_agree():
    is_undone = compiled_products("full", 4) <= compiled_products("none", 4)
    assert bool(undone("full", unroll=4)) == is_undone


def peak(plan: str, num_blocks: int, width: int):
    """Returns the report of a stack whose blocks keep three carries each."""

    def loss(w, x):
        def block(x, w):
            for _ in range(3):
                x = jnp.sin(x @ w)
            return x

        return jaxckpt.scan_blocks(block, w, x, remat=plan).sum()

    w = jax.ShapeDtypeStruct((num_blocks, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((2048, width), jnp.float32)
    return jaxckpt.measure(jax.grad(loss), w, x)


def test_a_plan_that_saves_no_memory():
    """A stack of one block: it is recomputed for nothing, as its residuals are alive once."""
    one, none = peak("full", 1, 32), peak("none", 1, 32)
    assert one.peak_bytes >= none.peak_bytes
    (finding,) = peak_not_below_none("full", one, none)
    assert finding.code == "peak-not-below-none" and "use none" in finding.message
    assert peak_not_below_none("none", none, none) == ()


def test_a_plan_that_saves_memory():
    full, none = peak("full", 8, 32), peak("none", 8, 32)
    assert full.peak_bytes < none.peak_bytes
    assert peak_not_below_none("full", full, none) == ()


TOKENS, VOCAB, WIDTH, BLOCKS = 256, 2000, 32, 4


def head_step(chunks: int):
    """Returns the gradient of a stack with a loss head, in so many chunks of tokens."""

    def nll(x, head, y):
        logits = x @ head
        return (jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, y, 1)[:, 0]).sum()

    def loss(params, x, y):
        w, head = params
        x = jaxckpt.scan_blocks(before, w, x, remat="full")
        parts = x.reshape(chunks, -1, WIDTH), y.reshape(chunks, -1, 1)
        step = lambda total, part: (total + jax.checkpoint(nll)(part[0], head, part[1]), None)
        return jax.lax.scan(step, 0.0, parts)[0]

    params = jnp.ones((BLOCKS, WIDTH, WIDTH)), jnp.ones((WIDTH, VOCAB))
    return jax.jit(jax.grad(loss)).lower(
        params, jnp.ones((TOKENS, WIDTH)), jnp.zeros((TOKENS, 1), int)
    )


def before(x, w):
    return jnp.sin(x @ w)


@pytest.fixture
def compiled_anew():
    """A step that is read from JAX's cache, which a run in this process turns on, has no dump."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e6)
    yield
    jax.config.update(name, before)


def head_findings(chunks: int, folder, stack_bytes: int) -> tuple[Finding, ...]:
    head_step(chunks).compile(compiler_options={"xla_dump_to": str(folder)})
    buffers = read_buffers(folder)
    assert buffers, "the compiler has dumped its buffers"
    return head_sets_peak(buffers, tokens=TOKENS, vocab_size=VOCAB, stack_bytes=stack_bytes)


def stack_bytes(num_blocks: int) -> int:
    found = explain(before, jnp.ones((WIDTH, WIDTH)), jnp.ones((TOKENS, WIDTH)), plan="full")
    return num_blocks * found.saved_bytes + found.residual_bytes


def test_a_loss_head_that_sets_the_peak(compiled_anew, tmp_path):
    (finding,) = head_findings(1, tmp_path, stack_bytes(BLOCKS))
    assert finding.code == "head-sets-peak"
    assert "jaxckpt.losses" in finding.message and "2000]" in finding.message


def test_a_head_in_chunks_does_not(compiled_anew, tmp_path):
    assert head_findings(8, tmp_path, stack_bytes(BLOCKS)) == ()


def test_a_stack_that_outweighs_the_head(compiled_anew, tmp_path):
    assert head_findings(1, tmp_path, stack_bytes(1000)) == ()


@pytest.mark.parametrize("plan", ["binomial:4+offload:carry", "sqrt+offload:carry"])
def test_a_carry_that_takes_longer_to_move_than_its_block(plan):
    cheap = lambda x, _: x + 0.1 * (jnp.roll(x, 1) - x)
    x = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    rates = Rates(flops_per_second=1e14, bytes_per_second=1e12, host_bytes_per_second=5e10)
    (finding,) = carry_slow_to_move(cheap, None, x, plan=plan, rates=rates)
    assert finding.code == "carry-slow-to-move"
    # 4 MiB over 50 GB/s.
    assert "0.0839 ms" in finding.message and "full+offload:carry" in finding.message
    fast = dataclasses.replace(rates, host_bytes_per_second=1e13)
    assert carry_slow_to_move(cheap, None, x, plan=plan, rates=fast) == ()
    # A loop that moves nothing, and one whose carries stay in order.
    for other in (plan.removesuffix("+offload:carry"), "full+offload:carry"):
        assert carry_slow_to_move(cheap, None, x, plan=other, rates=rates) == ()


def test_a_block_that_sets_the_peak(compiled_anew):
    """The twins: in tiles, under none, and a stack that keeps more than one block makes."""

    def finding_of(block, num_blocks=2, plan="full"):
        params = {"up": jnp.ones([num_blocks, 8, 128]), "down": jnp.ones([num_blocks, 128, 8])}
        x, one = jnp.ones([1024, 8]), jax.tree.map(lambda w: w[0], params)
        loss = lambda w: jaxckpt.scan_blocks(block, w, x, remat=plan).sum()
        report = jaxckpt.measure(jax.grad(loss), params)
        return block_sets_peak(block, one, x, plan=plan, report=report)

    wide = lambda x, w: x + jnp.tanh(x @ w["up"]) @ w["down"]
    (finding,) = finding_of(wide)
    assert finding.code == "block-sets-peak"
    assert "f32[1024,128] made at test_findings.py:" in finding.message
    assert "jaxckpt.tiled" in finding.message
    assert finding_of(jaxckpt.tiled(wide, 16, axis=0)) == ()
    assert finding_of(wide, plan="none") == ()
    assert finding_of(wide, num_blocks=64) == ()
