"""Mixed-integer programs solved to the end by HiGHS (scipy), and the unit that bytes have in them.

A solver takes a bound as kept that is missed by 1e-6 of its unit. Blocks' arrays weigh from bytes
to GiB, so in bytes the numbers would differ too much, and in MiB one byte less would be no less.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_INFEASIBLE, _FAILED = 2, 4  # as scipy's milp says it
_FINEST = 2.0**-20  # of all bytes


def grain(sizes: Sequence[float]) -> float:
    """Returns the bytes of a program's unit: what all sizes are multiples of, if that is not tiny.

    Sets of values whose bytes differ by less than it are equal to the program.
    """
    common = math.gcd(*map(round, sizes)) if len(sizes) else 1
    return max(float(common), _FINEST * sum(sizes), 1.0)


def minimize(cost, constraints, *, upper: Any, integrality) -> np.ndarray | None:
    """Returns an optimal point of `0 <= x <= upper`; None where there is no point.

    Args:
      cost: Of each column.
      constraints: `scipy.optimize.LinearConstraint`s.
      upper: Bound of all columns, or an array of one for each.
      integrality: 1 for a whole number, else 0.

    Raises:
      RuntimeError: The solver gave up.
    """
    from scipy.optimize import Bounds, milp

    options = {"mip_rel_gap": 0.0}
    asked: dict[str, Any] = {"bounds": Bounds(0, upper), "integrality": integrality}
    found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _FAILED:  # presolving has been wrong by its own tolerance
        options["presolve"] = False
        found = milp(cost, constraints=constraints, options=options, **asked)
    if found.status == _INFEASIBLE:
        return None
    if found.x is None:
        raise RuntimeError(f"the program of a block has no answer: {found.message}")
    return found.x
