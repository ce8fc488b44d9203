"""Checks of compiled steps for remat that the compiler has undone; see `findings.py`."""

import re

from jax.extend import core

from jaxckpt.memory.finding import Finding
from jaxckpt.memory.flat import Flat, Step, bodies, flatten
from jaxckpt.plans import Plan
from jaxckpt.transforms import jaxprs

# A product is a `dot`, on TPU a `convolution`, on GPU often a library call.
_PRODUCT = re.compile(r"=\s+\S+\s+(?:dot|convolution)\(")
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul)[^"]*"')


def undone_remat(
    plan: str | Plan,
    compiled_text: str,
    jaxpr: core.ClosedJaxpr,
    none_jaxpr: core.ClosedJaxpr,
) -> tuple[Finding, ...]:
    """Returns a finding if the compiled step makes no matmul again although its jaxpr does.

    Args:
      plan: The plan of the step.
      compiled_text: `compiled.as_text()` of the step under the plan.
      jaxpr: Of the same step.
      none_jaxpr: Of the step under `none`, at the same unroll; it need not be compiled.
    """
    expected, plain = count_products(jaxpr), count_products(none_jaxpr)
    made = _num_compiled(compiled_text)
    if expected <= plain or made > plain:
        return ()
    message = (
        f"plan {str(plan)!r} is undone by the compiler: {made} matmuls are left of the {expected} "
        f"that the step asks for, {plain} without remat; common-subexpression elimination merged "
        "unrolled blocks with their recomputation; use unroll=1 (a loop keeps them apart)"
    )
    return (Finding(code="remat-undone", message=message),)


def count_products(jaxpr: core.ClosedJaxpr) -> int:
    """Returns how many matrix products a program has when compiled; a loop's body counts once.

    Of an unrolled scan the body counts as often as it is written out.
    """
    return _num_products(flatten(jaxpr))


def _num_products(flat: Flat) -> int:
    return sum(
        (step.name == jaxprs.DOT)
        + _num_copies(step) * sum(_num_products(body) for body in bodies(step))
        for step in flat.live_steps()
    )


def _num_copies(step: Step) -> int:
    if step.name != jaxprs.SCAN:
        return 1
    length, unroll = step.params["length"], int(step.params["unroll"])
    return min(length, unroll + length % unroll)


def _num_compiled(text: str) -> int:
    return len(_PRODUCT.findall(text)) + len(_LIBRARY.findall(text))
