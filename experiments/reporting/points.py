"""A row of a file as a `Point` of the report; a row that cannot be shown is a `PointError`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from experiments.config import OptimizerConfig, TrainConfig
from experiments.sweeping.case import LOCAL, Case, about, settings_of
from experiments.sweeping.running import row_of_run
from jaxckpt.compiled.buffers import Buffer
from jaxckpt.models.config import TransformerConfig
from jaxckpt.plans import Plan, PlanError

_SHOWN_BUFFERS = 12


class PointError(ValueError):
    """A row that cannot be shown, and the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A plan at a depth on a target, as it is shown. Unknown text is "", an unknown number None.

    Attributes:
      plan: The plan as people write it: a lone stage has no count.
      depth: The number of blocks.
      target: The chip that the step was compiled for, or `"local"`.
      device: The device's own name.
      settings: The flags that comparable rows share.
      about: Model, batch and optimizer in words.
      date: The day of the row.
      peak_bytes: The compiled peak.
      temp_bytes: The temporaries at the compiled peak.
      runtime_bytes: The most that the runtime held.
      step_seconds: The median of the step times.
      step_spread: The quartiles of the step times.
      seconds_source: `"measured"` or `"roofline"`.
      recomputed: Recomputed FLOPs, as a share of the FLOPs without remat.
      losses: The loss of every step; empty without steps.
      buffers: The largest values at the peak, largest first.
      command: The command line that repeats the row.
      origin: Versions, commit, and the part of XLA's text that was not understood.
    """

    plan: str
    depth: int
    target: str
    device: str
    settings: str
    about: str
    date: str
    peak_bytes: int
    temp_bytes: int | None
    runtime_bytes: int | None
    step_seconds: float | None
    step_spread: tuple[float, float] | None
    seconds_source: str
    recomputed: float | None
    losses: tuple[float | None, ...]
    buffers: tuple[Buffer, ...]
    command: str
    origin: str


def point_of_row(row: Mapping[str, Any]) -> Point:
    """Returns the point of a row of a sweep; raises `PointError` for a missing or wrong value."""
    depth = _number(row, "depth", least=1, whole=True)
    return Point(
        plan=_plan(_text(row, "plan"), depth),
        depth=depth,
        target=_text(row, "target"),
        device=_text(row, "device"),
        settings=_text(row, "settings", ""),
        about=_text(row, "about", ""),
        date=_text(row, "date", ""),
        peak_bytes=_number(row, "peak_bytes", least=1, whole=True),
        temp_bytes=_number(row, "temp_bytes", least=0, whole=True, optional=True),
        runtime_bytes=_number(row, "runtime_peak_bytes", least=1, whole=True, optional=True),
        step_seconds=_number(row, "step_seconds", least=0, optional=True),
        step_spread=_spread(row),
        seconds_source=_text(row, "step_seconds_source", "unknown"),
        recomputed=_recomputed(row),
        losses=_losses(row),
        buffers=_buffers(row),
        command=_text(row, "train_command", ""),
        origin=_origin(row),
    )


def point_of_run(record: list[dict[str, Any]]) -> Point:
    """Returns the point of a run of `experiments.train`, from the lines of its record.

    Raises:
      PointError: The record is not of a run, or it has no step.
    """
    try:
        header = [row for row in record if "versions" in row][-1]
        row = row_of_run(record)
        config = _config(header["config"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise PointError("no record of a run with at least one step") from None
    case = Case(config=config, target=LOCAL, run_steps=config.steps)
    found = {"plan": config.remat, "target": LOCAL, "depth": case.depth}
    found |= {"settings": settings_of(config), "train_command": case.command()}
    found |= {"about": about(config)}
    return point_of_row(header | row | found)


def _config(values: Mapping[str, Any]) -> TrainConfig:
    """Returns the configuration of a record, without fields that this version does not know."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    kept = {name: value for name, value in values.items() if name in known}
    for name in ("out", "overwrite", "resume", "compile_cache", "keep", "tensorboard", "sample"):
        kept.pop(name, None)
    kept["trainable"] = tuple(kept.get("trainable", ()))
    kept["model"] = TransformerConfig(**values["model"])
    kept["optimizer"] = OptimizerConfig(**values["optimizer"])
    return TrainConfig(**kept)


def _plan(text: str, depth: int) -> str:
    try:
        return Plan.parse(text).bind(depth).written
    except PlanError as error:
        raise PointError(f"plan: {error}") from None


def _text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if not isinstance(value, str):
        raise PointError(f"{name} is {value!r}; text is needed")
    return value


def _number(row, name: str, *, least: float, whole: bool = False, optional: bool = False) -> Any:
    value: Any = row.get(name)
    if value is None and optional:
        return None
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if value is None or not right or not math.isfinite(value) or value < least:
        raise PointError(f"{name} is {value!r}; a number of at least {least} is needed")
    return value


def _spread(row: Mapping[str, Any]) -> tuple[float, float] | None:
    name = "step_seconds_spread"
    if (ends := row.get(name)) is None:
        return None
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise PointError(f"{name} is {ends!r}; two numbers are needed")
    low, high = (_number({name: end}, name, least=0) for end in ends)
    return low, high


def _recomputed(row: Mapping[str, Any]) -> float | None:
    flops = _number(row, "flops", least=0, optional=True)
    again = _number(row, "recomputed_flops", least=0, optional=True)
    return None if not flops or again is None or again >= flops else again / (flops - again)


def _losses(row: Mapping[str, Any]) -> tuple[float | None, ...]:
    losses = row.get("losses", [])
    if not isinstance(losses, list | tuple):
        raise PointError(f"losses is {losses!r}; a list of numbers is needed")
    return tuple(_number({"loss": x}, "loss", least=-math.inf, optional=True) for x in losses)


def _buffers(row: Mapping[str, Any]) -> tuple[Buffer, ...]:
    listed = row.get("buffers", [])
    if not isinstance(listed, list | tuple) or not all(isinstance(one, dict) for one in listed):
        raise PointError("buffers is no list of objects")
    found = []
    for one in listed:
        size = _number(one, "size_bytes", least=0, whole=True)
        texts = {name: _text(one, name, "") for name in ("shape", "operation", "source")}
        texts["source"] = "/".join(texts["source"].split("/")[-2:])
        found.append(Buffer(size_bytes=size, **texts))
    found.sort(key=lambda one: one.size_bytes, reverse=True)
    return tuple(found[:_SHOWN_BUFFERS])


def _origin(row: Mapping[str, Any]) -> str:
    versions = row.get("versions")
    names = ("jaxckpt", "jax", "jaxlib", "flax")
    shown = versions if isinstance(versions, dict) else {}
    parts = [f"{name} {shown[name]}" for name in names if name in shown]
    commit = row.get("commit")
    if isinstance(commit, str) and commit != "unknown":
        parts.append(f"commit {commit[:10]}")
    read = row.get("understood")
    if isinstance(read, dict) and read.get("lines") != read.get("of"):
        parts.append(f"understood {read.get('lines')} of {read.get('of')} lines of XLA's text")
    return ", ".join(parts)
