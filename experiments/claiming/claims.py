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
    MissingRow,
    config_of,
    extra_forwards,
    gb,
    gib,
    log2,
    percent,
    recomputed,
)
from jaxckpt.planner.budgets import given_bytes

TRUE, PARTLY, FALSE, OPEN = "true", "true in part", "false", "open"
_SEGMENTED = ("uniform:4", LOG_SEGMENTS, SQRT_SEGMENTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a claim.

    Attributes:
      found: What was compiled or measured.
      verdict: `TRUE`, `PARTLY`, `FALSE` or `OPEN`, and why.
    """

    found: str
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim: what is said, in our words, and how it is decided."""

    says: str
    decide: Callable[[Evidence], Found]

    def held_against(self, evidence: Evidence) -> Found:
        """Returns what was found; a claim whose numbers are not there is open."""
        try:
            return self.decide(evidence)
        except MissingRow as missing:
            return Found(found=f"{missing} is not compiled yet.", verdict=OPEN)


CLAIMS: list[Claim] = []


def _claim(says: str):
    """Adds a function to the claims, in the order of this file."""

    def add(decide: Callable[[Evidence], Found]):
        CLAIMS.append(Claim(says=says, decide=decide))
        return decide

    return add


@_claim("Without checkpointing, L layers of M bytes of activations take O(L M).")
def _plain_memory(evidence: Evidence) -> Found:
    slope = evidence.stack_slope("none")
    ratios = [
        evidence.residual_bytes(model, chip) / evidence.carry_bytes(model, chip)
        for model, chip in ((EXAMPLE, SMALL_CHIP), (EXAMPLE, LARGE_CHIP), (QWEN, LARGE_CHIP))
    ]
    linear = abs(slope - 1) < 0.05
    return Found(
        found=(
            f"Temporaries of a stack grow with L to the {slope:.2f}, fitted from 16 to 1,024 "
            f"blocks. A block's residuals weigh {ratios[0]:.1f} of its inputs in the example on "
            f"{SMALL_CHIP}, {ratios[1]:.1f} on {LARGE_CHIP}, {ratios[2]:.1f} in {QWEN}."
        ),
        verdict=_verdict(
            linear,
            "M is all residuals of a block, not its output alone" if max(ratios) > 2 else "",
        ),
    )


@_claim(
    "Cut the layers into n equal segments, keep each one's input, and run a segment again "
    "when its backward pass comes."
)
def _segments(evidence: Evidence) -> Found:
    blocks = config_of(EXAMPLE, LARGE_CHIP).model.num_blocks
    again = extra_forwards("uniform:4", blocks)
    share = recomputed(evidence.of(EXAMPLE, LARGE_CHIP, "uniform:4"))
    return Found(
        found=(
            f"This is plan `uniform:n`. On {blocks} blocks in 4 segments {again} blocks are run "
            f"again, as the last segment is kept at no cost in peak memory: {percent(share)} of "
            "the FLOPs without it."
        ),
        verdict=_verdict(again == blocks - blocks // 4, "and the last segment need not be rerun"),
    )


@_claim("Memory becomes O(n M) with n segments.")
def _order_n(evidence: Evidence) -> Found:
    temps = [_temp(evidence, plan) for plan in _SEGMENTED]
    falls = temps == sorted(temps, reverse=True) and temps[0] > temps[-1]
    listed = ", ".join(f"`{p}` {gib(t)}" for p, t in zip(_SEGMENTED, temps, strict=True))
    a, large = evidence.carry_bytes(EXAMPLE), evidence.residual_bytes(EXAMPLE)
    return Found(
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


@_claim("With sqrt(L) segments memory is O(sqrt(L) M).")
def _root(evidence: Evidence) -> Found:
    uniform, full, sqrt = (_temp(evidence, plan) for plan in (SQRT_SEGMENTS, "full", "sqrt"))
    slope = evidence.stack_slope("sqrt")
    return Found(
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


@_claim("With log(L) segments memory is O(log(L) M).")
def _logarithm(evidence: Evidence) -> Found:
    uniform, log, full = (_temp(evidence, plan) for plan in (LOG_SEGMENTS, "log", "full"))
    blocks = config_of(EXAMPLE, LARGE_CHIP).model.num_blocks
    again = extra_forwards("log", blocks)
    return Found(
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


@_claim("The extra compute is about L / n, in practice 20 to 30 %.")
def _extra_compute(evidence: Evidence) -> Found:
    shares = {
        plan: recomputed(evidence.of(EXAMPLE, LARGE_CHIP, plan)) for plan in PLANS if plan != "none"
    }
    uniform = [recomputed(evidence.of(EXAMPLE, LARGE_CHIP, plan)) for plan in _SEGMENTED]
    listed = ", ".join(f"`{plan}` {percent(share)}" for plan, share in shares.items())
    one_level = shares["full"], shares["uniform:4"]
    times = evidence.seconds("uniform:4") / evidence.seconds("none") - 1
    return Found(
        found=(
            f"FLOPs run again in the example on {LARGE_CHIP}: {listed}; with 4, 5 and 6 segments "
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


@_claim("32 layers, batch 8, 1,024 tokens, width 4,096, 16 bit: 67 MB a layer, 2.1 GB in all.")
def _layer_bytes(evidence: Evidence) -> Found:
    config = config_of(EXAMPLE, SMALL_CHIP)
    a, blocks = evidence.carry_bytes(EXAMPLE, SMALL_CHIP), config.model.num_blocks
    large = evidence.residual_bytes(EXAMPLE, SMALL_CHIP)
    return Found(
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


@_claim("Four segments (layers 0, 8, 16, 24) keep 268 MB: 87 % less.")
def _four_segments(evidence: Evidence) -> Found:
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
    return Found(
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


@_claim("A step takes 1.25 times as long.")
def _step_time(evidence: Evidence) -> Found:
    plans = ("full", "uniform:4", "sqrt", "log")
    fastest = min(row["seconds"] for row in evidence.times if row["batch_size"] == 8)
    none = evidence.seconds("none")
    listed = ", ".join(f"`{plan}` {evidence.seconds(plan) / none:.2f}" for plan in plans)
    best = ", ".join(f"`{plan}` {evidence.seconds(plan) / fastest:.2f}" for plan in plans)
    roofline = _estimated(evidence, "uniform:4") / _estimated(evidence, "none")
    ratio = evidence.seconds("uniform:4") / none
    return Found(
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


@_claim("Qwen3-0.6B, 32 layers of width 4,096, needs 11.2 GB in all, 9.3 GB with checkpointing.")
def _qwen_sizes(evidence: Evidence) -> Found:
    model = config_of(QWEN, LARGE_CHIP).model
    sizes = [
        f"{chip} {_peaks(evidence, QWEN, chip, ('none', 'uniform:4', 'full'))}"
        for chip in (LARGE_CHIP, SMALL_CHIP)
    ]
    same = model.num_blocks == 32 and model.d_model == 4096
    return Found(
        found=(
            f"{QWEN} has {model.num_blocks} layers of width {model.d_model:,}, "
            f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for keys and "
            f"values, {model.vocab_size:,} tokens: "
            f"{evidence.check('parameters') / 1e6:.0f} million parameters. Peak of the AdamW "
            f"step, 8 x 1,024 tokens: {'; '.join(sizes)}."
        ),
        verdict=_verdict(same) if same else f"{FALSE}: another shape, and other totals",
    )


@_claim("A loop over segments under a framework's checkpoint function does it.")
def _by_hand(evidence: Evidence) -> Found:
    same, other = evidence.check("dropout_difference"), evidence.check("dropout_off_difference")
    return Found(
        found=(
            f"`uniform:4` on 8 blocks with dropout 0.3: gradients differ from those of `none` by "
            f"{same:.1e} of a leaf's largest value (by {other:.1f} with another dropout key). "
            "Written by hand, such a loop often leaves its first segment out, binds the loop's "
            "variable late, or draws other dropout masks in the second run."
        ),
        verdict=_verdict(same < 1e-6 < 1e-2 < other, "where the masks are replayed, as here"),
    )


@_claim("Real frameworks segment a model by themselves.")
def _automatic(evidence: Evidence) -> Found:
    row = evidence.row(f"auto, {QWEN}")
    report = row["report"]
    budget = given_bytes(AUTO_BUDGET)
    return Found(
        found=(
            f"`--remat=auto` within {gib(budget)} for {QWEN} on {row['target']} chose "
            f"`{row['plan']}`: peak {gib(report['peak_bytes'])}, "
            f"{1e3 * report['estimated_seconds']:.0f} ms by the roofline."
        ),
        verdict=_verdict(report["peak_bytes"] <= budget, "the planner, with compiled peaks"),
    )


@_claim("It goes together with gradient accumulation.")
def _accumulation(evidence: Evidence) -> Found:
    plain, parts = evidence.report("in one part"), evidence.report("in four parts")
    return Found(
        found=(
            f"`full`, {QWEN} on {LARGE_CHIP}, 32 x 1,024 tokens: {gib(plain['peak_bytes'])} in one "
            f"part, {gib(parts['peak_bytes'])} with `--accumulate=4`, which holds a sum of "
            "gradients in float32 beside them."
        ),
        verdict=_verdict(parts["peak_bytes"] < plain["peak_bytes"]),
    )


@_claim("It goes together with mixed precision.")
def _precision(evidence: Evidence) -> Found:
    half, single = evidence.of(QWEN, LARGE_CHIP, "full"), evidence.report("float32")
    return Found(
        found=(
            f"`full`, {QWEN} on {LARGE_CHIP}: {gib(half['peak_bytes'])} with bfloat16 computation "
            f"and float32 master weights, {gib(single['peak_bytes'])} with float32 alone."
        ),
        verdict=_verdict(half["peak_bytes"] < single["peak_bytes"]),
    )


@_claim("It is for language models of 32 to 128 layers; one 16 GB device trains 0.6B to 7B.")
def _sizes(evidence: Evidence) -> Found:
    small = evidence.of(QWEN, SMALL_CHIP, "full")
    four, eight = evidence.report("4B"), evidence.report("8B")
    growth = evidence.stack_bytes("log", 1024) / evidence.stack_bytes("log", 16)
    fits = all(_fits(report) for report in (small, four, eight))
    weights = 7e9 * 2
    return Found(
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
