"""The claims, a function each: what is said, what was found, and the verdict that follows.

Nothing here is a number: all come from the evidence, and verdicts are decided by comparing them.
"""

import dataclasses
from collections.abc import Callable

from experiments.claiming.cases import (
    AUTO_BUDGET,
    EXAMPLE,
    LARGE_CHIP,
    LOG_SEGMENTS,
    PLANS,
    QWEN,
    SMALL_CHIP,
    SQRT_SEGMENTS,
)
from experiments.claiming.evidence import (
    Evidence,
    config_of,
    extra_forwards,
    gb,
    gib,
    log2,
    percent,
    recomputed,
)
from jaxckpt.planner.budgets import given_bytes

TRUE, PARTLY, FALSE = "true", "true in part", "false"
_SEGMENTED = ("uniform:4", LOG_SEGMENTS, SQRT_SEGMENTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim.

    Attributes:
      says: The claim, in our words.
      found: What was compiled or measured.
      verdict: `TRUE`, `PARTLY` or `FALSE`, and why.
    """

    says: str
    found: str
    verdict: str


def _plain_memory(evidence: Evidence) -> Claim:
    slope = evidence.stack_slope("none")
    ratios = [
        evidence.residual_bytes(model, chip) / evidence.carry_bytes(model, chip)
        for model, chip in ((EXAMPLE, SMALL_CHIP), (QWEN, LARGE_CHIP), (QWEN, SMALL_CHIP))
    ]
    linear = abs(slope - 1) < 0.05
    return Claim(
        says="Without checkpointing, L layers of M bytes of activations take O(L M).",
        found=(
            f"Temporaries of a stack grow with L to the {slope:.2f}, fitted from 16 to 1,024 "
            f"blocks. A block's residuals weigh {ratios[0]:.1f} of its inputs in the example, "
            f"{ratios[1]:.1f} (GPU) and {ratios[2]:.1f} (TPU) in {QWEN}."
        ),
        verdict=_verdict(
            linear,
            "M is all residuals of a block, not its output alone" if max(ratios) > 2 else "",
        ),
    )


def _segments(evidence: Evidence) -> Claim:
    blocks = config_of(EXAMPLE, LARGE_CHIP).model.num_blocks
    again = extra_forwards("uniform:4", blocks)
    share = recomputed(evidence.of(EXAMPLE, LARGE_CHIP, "uniform:4"))
    return Claim(
        says="Cut the layers into n equal segments, keep each one's input, and run a segment again "
        "when its backward pass comes.",
        found=(
            f"This is plan `uniform:n`. On {blocks} blocks in 4 segments {again} blocks are run "
            f"again, as the last segment is kept at no cost in peak memory: {percent(share)} of "
            "the FLOPs without it."
        ),
        verdict=_verdict(again == blocks - blocks // 4, "and the last segment need not be rerun"),
    )


def _order_n(evidence: Evidence) -> Claim:
    temps = [_temp(evidence, plan) for plan in _SEGMENTED]
    falls = temps == sorted(temps, reverse=True) and temps[0] > temps[-1]
    listed = ", ".join(f"`{p}` {gib(t)}" for p, t in zip(_SEGMENTED, temps, strict=True))
    a, large = evidence.carry_bytes(EXAMPLE), evidence.residual_bytes(EXAMPLE)
    return Claim(
        says="Memory becomes O(n M) with n segments.",
        found=(
            f"Temporaries of the example on {LARGE_CHIP}: {listed}. The live segment holds the "
            f"residuals of L / n blocks beside n inputs: n a + (L / n) R with a = {gib(a)} and "
            f"R = {gib(large)}."
        ),
        verdict=(
            f"{FALSE}: with more segments it falls here, since (L / n) R outweighs n a"
            if falls
            else f"{PARTLY}: (L / n) R comes on top"
        ),
    )


def _root(evidence: Evidence) -> Claim:
    uniform, full, sqrt = (_temp(evidence, plan) for plan in (SQRT_SEGMENTS, "full", "sqrt"))
    slope = evidence.stack_slope("sqrt")
    return Claim(
        says="With sqrt(L) segments memory is O(sqrt(L) M).",
        found=(
            f"Example on {LARGE_CHIP}: `{SQRT_SEGMENTS}` holds {gib(uniform)} of temporaries, "
            f"`full` {gib(full)}, `sqrt`, which keeps block inputs again inside the live segment, "
            f"{gib(sqrt)}. A stack under `sqrt` grows with L to the {slope:.2f}."
        ),
        verdict=(
            f"{PARTLY}: not by uniform segments that keep all residuals of the live one, which "
            "need more than remat of every block; by two levels it is"
            if uniform > full and slope < 0.55
            else _verdict(slope < 0.55)
        ),
    )


def _logarithm(evidence: Evidence) -> Claim:
    uniform, log, full = (_temp(evidence, plan) for plan in (LOG_SEGMENTS, "log", "full"))
    blocks = config_of(EXAMPLE, LARGE_CHIP).model.num_blocks
    again = extra_forwards("log", blocks)
    return Claim(
        says="With log(L) segments memory is O(log(L) M).",
        found=(
            f"log2 of {blocks} is {log2(blocks)}: `{LOG_SEGMENTS}` holds {gib(uniform)}, "
            f"`full` {gib(full)}, `log` (Revolve with log2 L + 1 inputs) {gib(log)} and runs "
            f"{again} blocks again. Over lengths, `log` grows with L to the "
            f"{evidence.stack_slope('log'):.2f}."
        ),
        verdict=(
            f"{FALSE} for uniform segments, whose live one has L / log L blocks; true of a "
            "recursive or binomial schedule, which runs more blocks again"
            if uniform > full > log
            else PARTLY
        ),
    )


def _extra_compute(evidence: Evidence) -> Claim:
    shares = {
        plan: recomputed(evidence.of(EXAMPLE, SMALL_CHIP, plan)) for plan in PLANS if plan != "none"
    }
    uniform = [recomputed(evidence.of(EXAMPLE, LARGE_CHIP, plan)) for plan in _SEGMENTED]
    listed = ", ".join(f"`{plan}` {percent(share)}" for plan, share in shares.items())
    one_level = shares["full"], shares["uniform:4"]
    times = evidence.seconds("uniform:4") / evidence.seconds("none") - 1
    return Claim(
        says="The extra compute is about L / n, in practice 20 to 30 %.",
        found=(
            f"FLOPs run again in the example on {SMALL_CHIP}: {listed}. With 4, 5 and 6 segments "
            f"on {LARGE_CHIP}, where attention alone learns: "
            f"{', '.join(percent(share) for share in uniform)}. Measured time of {QWEN} on an "
            f"H100: `uniform:4` {percent(times)} above `none`."
        ),
        verdict=(
            f"{PARTLY}: it is one forward pass of what is run again, nearly the same for every n, "
            "and below a third; L / n is not it"
            if max(one_level) < 1 / 3 and max(uniform) - min(uniform) < 0.05
            else FALSE
        ),
    )


def _layer_bytes(evidence: Evidence) -> Claim:
    config = config_of(EXAMPLE, SMALL_CHIP)
    a, blocks = evidence.carry_bytes(EXAMPLE, SMALL_CHIP), config.model.num_blocks
    large = evidence.residual_bytes(EXAMPLE, SMALL_CHIP)
    return Claim(
        says="32 layers, batch 8, 1,024 tokens, width 4,096, 16 bit: 67 MB a layer, 2.1 GB in all.",
        found=(
            f"One tensor is {gb(a)}, {blocks} of them {gb(a * blocks)}. Compiled for {SMALL_CHIP}, "
            f"a layer without remat holds {gb(large)}, {blocks} of them {gb(large * blocks)}."
        ),
        verdict=(
            f"{PARTLY}: right for one tensor a layer, the block inputs alone"
            if large > 2 * a and round(a / 1e6) == 67
            else _verdict(round(a / 1e6) == 67)
        ),
    )


def _four_segments(evidence: Evidence) -> Claim:
    a, blocks = (
        evidence.carry_bytes(EXAMPLE, SMALL_CHIP),
        config_of(EXAMPLE, SMALL_CHIP).model.num_blocks,
    )
    found = []
    for chip in (SMALL_CHIP, LARGE_CHIP):
        none, four, full = (
            evidence.of(EXAMPLE, chip, plan)["peak_bytes"] for plan in ("none", "uniform:4", "full")
        )
        found.append((chip, none, four, full))
    less = [1 - four / none for _, none, four, _ in found]
    listed = "; ".join(
        f"{chip}: `none` {gib(none)}, `uniform:4` {gib(four)}, `full` {gib(full)}"
        for chip, none, four, full in found
    )
    return Claim(
        says="Four segments (layers 0, 8, 16, 24) keep 268 MB: 87 % less.",
        found=(
            f"Four inputs are {gb(4 * a)}, {percent(1 - 4 / blocks)} less than {blocks}. Peak of "
            f"the whole step: {listed}: {' and '.join(map(percent, less))} less."
        ),
        verdict=(
            f"{PARTLY}: right for stored inputs; the live segment's residuals, parameters and "
            "optimizer are left out"
            if round(4 * a / 1e6) == 268 and max(less) < 0.8
            else _verdict(max(less) >= 0.8)
        ),
    )


def _step_time(evidence: Evidence) -> Claim:
    plans = ("full", "uniform:4", "sqrt", "log")
    fastest = min(row["seconds"] for row in evidence.times if row["batch_size"] == 8)
    none = evidence.seconds("none")
    listed = ", ".join(f"`{plan}` {evidence.seconds(plan) / none:.2f}" for plan in plans)
    best = ", ".join(f"`{plan}` {evidence.seconds(plan) / fastest:.2f}" for plan in plans)
    roofline = _estimated(evidence, "uniform:4") / _estimated(evidence, "none")
    ratio = evidence.seconds("uniform:4") / none
    return Claim(
        says="A step takes 1.25 times as long.",
        found=(
            f"Measured on an H100, {QWEN}, 8 x 1,024 tokens, of the time of `none`: {listed}; of "
            f"the fastest plan measured: {best}. By the roofline, the example's `uniform:4` on "
            f"{LARGE_CHIP} takes {roofline:.2f} of `none`."
        ),
        verdict=(
            f"{PARTLY}: it depends on the plan and on what it is compared to; `full` is not slower "
            "than `none`, which has to write all residuals"
            if evidence.seconds("full") <= none and 1.05 < ratio < 1.4
            else _verdict(1.15 < ratio < 1.35)
        ),
    )


def _qwen_sizes(evidence: Evidence) -> Claim:
    model = config_of(QWEN, LARGE_CHIP).model
    sizes = [
        f"{chip} {_peaks(evidence, QWEN, chip, ('none', 'uniform:4', 'full'))}"
        for chip in (LARGE_CHIP, SMALL_CHIP)
    ]
    same = model.num_blocks == 32 and model.d_model == 4096
    return Claim(
        says="Qwen3-0.6B, 32 layers of width 4,096, needs 11.2 GB in all, 9.3 GB with "
        "checkpointing.",
        found=(
            f"{QWEN} has {model.num_blocks} layers of width {model.d_model:,}, "
            f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for keys and "
            f"values, {model.vocab_size:,} tokens: "
            f"{evidence.checks['parameters'] / 1e6:.0f} million parameters. Peak of the AdamW "
            f"step, 8 x 1,024 tokens: {'; '.join(sizes)}."
        ),
        verdict=_verdict(same) if same else f"{FALSE}: another shape, and other totals",
    )


def _by_hand(evidence: Evidence) -> Claim:
    same, other = evidence.checks["dropout_difference"], evidence.checks["dropout_off_difference"]
    return Claim(
        says="A loop over segments under a framework's checkpoint function does it.",
        found=(
            f"`uniform:4` on 8 blocks with dropout 0.3: gradients differ from those of `none` by "
            f"{same:.1e} of a leaf's largest value (by {other:.1f} with another dropout key). "
            "Written by hand, such a loop often leaves its first segment out, binds the loop's "
            "variable late, or draws other dropout masks in the second run."
        ),
        verdict=_verdict(same < 1e-6 < 1e-2 < other, "where the masks are replayed, as here"),
    )


def _automatic(evidence: Evidence) -> Claim:
    row = evidence.rows[f"auto, {QWEN}"]
    report = row["report"]
    budget = given_bytes(AUTO_BUDGET)
    return Claim(
        says="Real frameworks segment a model by themselves.",
        found=(
            f"`--remat=auto` within {gib(budget)} for {QWEN} on {row['target']} chose "
            f"`{row['plan']}`: peak {gib(report['peak_bytes'])}, "
            f"{1e3 * report['estimated_seconds']:.0f} ms by the roofline."
        ),
        verdict=_verdict(report["peak_bytes"] <= budget, "the planner, with compiled peaks"),
    )


def _accumulation(evidence: Evidence) -> Claim:
    plain, parts = evidence.report("in one part"), evidence.report("in four parts")
    return Claim(
        says="It goes together with gradient accumulation.",
        found=(
            f"`full`, {QWEN} on {LARGE_CHIP}, 32 x 1,024 tokens: {gib(plain['peak_bytes'])} in one "
            f"part, {gib(parts['peak_bytes'])} with `--accumulate=4`, which holds a sum of "
            "gradients in float32 beside them."
        ),
        verdict=_verdict(parts["peak_bytes"] < plain["peak_bytes"]),
    )


def _precision(evidence: Evidence) -> Claim:
    half, single = evidence.of(QWEN, LARGE_CHIP, "full"), evidence.report("float32")
    return Claim(
        says="It goes together with mixed precision.",
        found=(
            f"`full`, {QWEN} on {LARGE_CHIP}: {gib(half['peak_bytes'])} with bfloat16 computation "
            f"and float32 master weights, {gib(single['peak_bytes'])} with float32 alone."
        ),
        verdict=_verdict(half["peak_bytes"] < single["peak_bytes"]),
    )


def _sizes(evidence: Evidence) -> Claim:
    small = evidence.of(QWEN, SMALL_CHIP, "full")
    four, eight = evidence.report("4B"), evidence.report("8B")
    growth = evidence.stack_bytes("log", 1024) / evidence.stack_bytes("log", 16)
    fits = all(_fits(report) for report in (small, four, eight))
    weights = 7e9 * 2
    return Claim(
        says="It is for language models of 32 to 128 layers; one 16 GB device trains 0.6B to 7B.",
        found=(
            f"Of {gib(small['usable_bytes'])} on {SMALL_CHIP}: {QWEN} under `full` with AdamW on "
            f"everything {gib(small['peak_bytes'])}; Qwen3-4B under `sqrt`, keys and values "
            f"learning, {gib(four['peak_bytes'])}. Qwen3-8B with attention learning takes "
            f"{gib(eight['peak_bytes'])} on {LARGE_CHIP}. 7 billion weights in bfloat16 alone are "
            f"{gib(weights)}. From 16 to 1,024 blocks a stack's temporaries grow {growth:.2f} "
            "times under `log`."
        ),
        verdict=(
            f"{PARTLY}: 0.6B with everything learning, 4B with most frozen; 7B does not fit 16 GB"
            if fits and weights > 0.8 * small["usable_bytes"]
            else _verdict(fits)
        ),
    )


CLAIMS: tuple[Callable[[Evidence], Claim], ...] = (
    *(_plain_memory, _segments, _order_n, _root, _logarithm, _extra_compute, _layer_bytes),
    *(_four_segments, _step_time, _qwen_sizes, _by_hand, _automatic, _accumulation, _precision),
    _sizes,
)


def _verdict(holds: bool, note: str = "") -> str:
    text = TRUE if holds else FALSE
    return f"{text}: {note}" if note and holds else text


def _temp(evidence: Evidence, plan: str) -> int:
    return evidence.of(EXAMPLE, LARGE_CHIP, plan)["temp_bytes"]


def _estimated(evidence: Evidence, plan: str) -> float:
    return evidence.of(EXAMPLE, LARGE_CHIP, plan)["estimated_seconds"]


def _peaks(evidence: Evidence, model: str, chip: str, plans: tuple[str, ...]) -> str:
    return ", ".join(
        f"`{plan}` {gb(evidence.of(model, chip, plan)['peak_bytes'])}" for plan in plans
    )


def _fits(report) -> bool:
    return report["usable_bytes"] is None or report["peak_bytes"] <= report["usable_bytes"]
