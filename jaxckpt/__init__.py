"""jaxckpt: activation checkpointing for JAX and Flax, with the compiler's own memory numbers.

    y = jaxckpt.scan_blocks(block, params, x, remat="sqrt")
    print(jaxckpt.measure(train_step, state, batch, donate_argnums=0))

Importing this package only checks versions. Every name is loaded when it is first used, and plans
and schedules never load JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxckpt import compatibility

compatibility.check_installed()

if TYPE_CHECKING:  # the names that `__getattr__` finds, for editors and type checkers
    from jaxckpt import linen as linen
    from jaxckpt import losses as losses
    from jaxckpt import models as models
    from jaxckpt import nnx as nnx
    from jaxckpt import schedules
    from jaxckpt.compiled.report import MemoryReport as MemoryReport
    from jaxckpt.memory.explain import explain as explain
    from jaxckpt.memory.measure import measure as measure
    from jaxckpt.planner.fit import fit as fit
    from jaxckpt.planner.result import BudgetError as BudgetError
    from jaxckpt.plans import Plan as Plan
    from jaxckpt.plans import PlanError as PlanError
    from jaxckpt.plans import Policy as Policy
    from jaxckpt.plans import Stage as Stage
    from jaxckpt.transforms.chain import chain as chain
    from jaxckpt.transforms.layers import run as run
    from jaxckpt.transforms.region import checkpoint as checkpoint
    from jaxckpt.transforms.region import remat_of as remat_of
    from jaxckpt.transforms.scan import scan as scan
    from jaxckpt.transforms.stack import scan_blocks as scan_blocks
    from jaxckpt.transforms.tags import tag as tag
    from jaxckpt.transforms.tiles import tiled as tiled
    from jaxckpt.transforms.update_in_backward import update_in_backward as update_in_backward
    from jaxckpt.transforms.while_loop import while_loop as while_loop

# Public name -> module that defines it; a name that the module lacks is the module itself.
_PUBLIC = {
    "BudgetError": "jaxckpt.planner.result",
    "MemoryReport": "jaxckpt.compiled.report",
    "Plan": "jaxckpt.plans",
    "PlanError": "jaxckpt.plans",
    "Policy": "jaxckpt.plans",
    "Stage": "jaxckpt.plans",
    "chain": "jaxckpt.transforms.chain",
    "checkpoint": "jaxckpt.transforms.region",
    "explain": "jaxckpt.memory.explain",
    "fit": "jaxckpt.planner.fit",
    "linen": "jaxckpt.linen",
    "losses": "jaxckpt.losses",
    "measure": "jaxckpt.memory.measure",
    "models": "jaxckpt.models",
    "nnx": "jaxckpt.nnx",
    "remat_of": "jaxckpt.transforms.region",
    "run": "jaxckpt.transforms.layers",
    "scan": "jaxckpt.transforms.scan",
    "scan_blocks": "jaxckpt.transforms.stack",
    "schedules": "jaxckpt.schedules",
    "tag": "jaxckpt.transforms.tags",
    "tiled": "jaxckpt.transforms.tiles",
    "update_in_backward": "jaxckpt.transforms.update_in_backward",
    "while_loop": "jaxckpt.transforms.while_loop",
}

# Names that people look for here, and where they are.
_ELSEWHERE = {
    "remat": "; jaxckpt.checkpoint wraps a function, jaxckpt.linen.remat a class, and remat= is an "
    "argument of scan_blocks, run, chain and scan",
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        from jaxckpt.plans.errors import nearest

        guess = _ELSEWHERE.get(name) or nearest(name, _PUBLIC)
        raise AttributeError(f"module 'jaxckpt' has no attribute {name!r}{guess}")
    module = importlib.import_module(_PUBLIC[name])
    value = getattr(module, name, module)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_PUBLIC])
