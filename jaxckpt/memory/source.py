"""Where in the user's code a step of a jaxpr was written."""

from pathlib import Path

from jaxckpt.memory.flat import Step

# Frames of these are machinery: what called them is the line that a reader wants to see. Our own
# models are not among them.
_PACKAGES = ("jax", "jaxlib", "flax")
_OURS = ("transforms/", "memory/", "linen.py", "nnx.py")
_MACHINERY = (
    *(f"/site-packages/{name}/" for name in _PACKAGES),
    *(f"/jaxckpt/{name}" for name in _OURS),
)
_STANDARD = ("functools.py", "contextlib.py")


def where(step: Step) -> str:
    """Returns `file.py:123`, the innermost line outside JAX and Flax, or `""` if unknown.

    A function of JAX's own that is traced once and cached (`jax.nn.silu`) remembers who called it
    first; its steps are placed where this call was made.
    """
    equations = [*step.calls, step.equation]
    while len(equations) > 1 and _is_library_call(equations[-2], equations[-1]):
        equations.pop()
    for frame in _frames(equations[-1]):
        if not _is_machinery(frame):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return ""


def _is_library_call(call, equation) -> bool:
    """Whether the function that `call` calls is machinery itself."""
    name = call.params.get("name")
    for frame in _frames(equation):
        if not _is_machinery(frame):
            return False
        if frame.function_name.rpartition(".")[2] == name:
            return True
    return False


def _frames(equation) -> list:
    traceback = equation.source_info.traceback
    return list(traceback.frames) if traceback is not None else []


def _is_machinery(frame) -> bool:
    path = frame.file_name.replace("\\", "/")
    if path.startswith("<"):
        return True
    return any(part in path for part in _MACHINERY) or Path(path).name in _STANDARD
