"""What a user could name by hand that recomputes least: no plan may recompute more at its peak.

Tags and attention kernels are swept as `frontier.py` does all values, with the matrix products of a
step in place of its seconds. The sets found are plain plans to the planner, beside `dots` and its
like: `ladder.py` puts no plan before one of them that needs no more memory and multiplies less.
"""

import dataclasses
from collections.abc import Iterator

from jaxckpt.memory.flops import step_flops
from jaxckpt.memory.roofline import Rates
from jaxckpt.planner.frontier import Graph, proposals
from jaxckpt.plans import Policy, words

# Of steps with the same products, those that take less time; too little to outweigh a product.
_TIE = 1e-4


def lean_proposals(graph: Graph, rates: Rates) -> Iterator[tuple[Policy, ...]]:
    """Yields policies over a user's own names, from those that keep most to those that keep least.

    Args:
      graph: Of a block.
      rates: The chip's.
    """
    products = [float(step_flops(step)) / rates.flops_per_second for step in graph.steps]
    seconds = (p + _TIE * s for p, s in zip(products, graph.seconds, strict=True))
    named = (unit for unit in graph.units if not any(map(words.is_invented, unit.policy.names)))
    units = tuple(dataclasses.replace(unit, seconds=0.0) for unit in named)
    yield from proposals(dataclasses.replace(graph, seconds=tuple(seconds), units=units))
