"""Where the time of a GPU's step goes: device kernels of a profile, by what they are.

    with jax.profiler.trace(folder): ...
    kernels.by_kind(folder, steps=3)     # {'matrix products': 0.040, ...} seconds a step

Limits: NVIDIA GPUs; kernels are told apart by their names, which are those of XLA, cuBLAS and
cuDNN in 2026. What runs beside another kernel is counted in full.
"""

import collections
import re
from pathlib import Path
from typing import Any

import jax

# The first that matches names the kind.
_KINDS = (
    ("attention forward", r"(fprop|flash_fwd|sdpa.*fwd)"),
    ("attention backward", r"(bprop|flash_bwd|sdpa.*bwd|cudnn.*(dq|dot_do))"),
    ("copies", r"(memcpy|memset|^copy|_copy)"),
    ("matrix products", r"(gemm|nvjet|cutlass|xmma|splitk|cublas)"),
)
OTHER = "elementwise and reductions"


def by_kind(folder: Path, *, steps: int) -> dict[str, float]:
    """Returns the seconds of a step that each kind of kernel takes, largest first.

    Args:
      folder: Where `jax.profiler.trace` wrote one trace.
      steps: Steps that the trace holds.
    """
    found: Any = collections.Counter()  # of seconds
    for name, seconds in by_kernel(folder, steps=steps).items():
        found[kind_of(name)] += seconds
    return dict(found.most_common())


def by_kernel(folder: Path, *, steps: int) -> dict[str, float]:
    """Returns the seconds of a step that each kernel takes, by its name."""
    found: Any = collections.Counter()  # of seconds
    for path in sorted(Path(folder).rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        found[event.name] += event.duration_ns / 1e9 / steps
    return dict(found.most_common())


def kind_of(name: str) -> str:
    """Returns what a kernel is, by its name."""
    return next((kind for kind, text in _KINDS if re.search(text, name, re.IGNORECASE)), OTHER)
