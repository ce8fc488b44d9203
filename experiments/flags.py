"""The table of flags: which commands use a flag, and where help shows it. No JAX import.

A flag is a parameter of a command: its type and its help stand at the parameter. This table has the
rules of all commands: `--plan` and `--remat` are one flag, a flag that a command does not use is
refused, only a flag that is on by default has a form `--no-`, and only `--help-all` shows rare
flags.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cyclopts import ArgumentCollection, Group, Parameter

# Each panel's flags in the order in which they are shown; panels come in this order, too.
PANELS = {
    "Most used": (
        *("config", "target", "plan", "budget", "depth", "max", "folder", "init", "data"),
        *("batch-size", "seq-len", "steps", "run-steps", "out", "resume", "json"),
    ),
    "Plan and memory": (
        *(
            "host-budget",
            "mesh",
            "accumulate",
            "update-in-backward",
            "explain",
            "loss-chunk-tokens",
            "unroll",
        ),
        *("calibrate", "compile-cache", "parallel"),
    ),
    "Model": (
        *("num-blocks", "d-model", "num-heads", "num-kv-heads", "head-dim", "d-ff"),
        *("vocab-size", "dtype", "attention", "dropout", "qk-norm", "tied-embeddings"),
        *("rope-theta", "norm-eps", "mlp-tiles"),
    ),
    "Optimizer": (
        *("optimizer", "learning-rate", "warmup-steps", "decay-steps", "weight-decay"),
        *("clip-norm", "beta1", "beta2", "param-dtype", "moment-dtype", "trainable", "z-loss"),
    ),
    "Data": ("pack", "end-token", "token-dtype"),
    "Run": (
        *("overwrite", "save-every", "keep", "validate-every", "validation-batches", "sample"),
        *("tensorboard", "seed", "max-skipped"),
    ),
    "Several processes": ("coordinator", "processes", "process-id", "join-seconds"),
}
RARE = frozenset({
    *("loss-chunk-tokens", "unroll", "calibrate", "compile-cache", "parallel"),
    *("vocab-size", "attention", "qk-norm", "tied-embeddings", "rope-theta", "norm-eps"),
    *("mlp-tiles", "param-dtype", "moment-dtype"),
    *("decay-steps", "weight-decay", "clip-norm", "beta1", "beta2", "z-loss"),
    *("end-token", "token-dtype", "keep", "validation-batches", "max-skipped", "join-seconds"),
})  # fmt: skip
# The commands that use a setting, where not all of `train`, `fit` and `sweep` do.
_TRAIN, _RUNS, _STEPS = ("train",), ("train", "sweep"), ("train", "fit")
USED_BY = {
    **dict.fromkeys(("data", "token-dtype", "end-token", "validate-every", "max-skipped"), _RUNS),
    **dict.fromkeys(("out", "overwrite", "resume", "save-every", "keep", "sample"), _TRAIN),
    **dict.fromkeys(("tensorboard", "validation-batches"), _TRAIN),
    **dict.fromkeys(("explain", "compile-cache"), _STEPS),
}
_SETTINGS = ("train", "fit", "sweep")
PLAN_NAMES = ("--plan", "--remat")  # of one flag


def is_used(flag: str, command: str) -> bool:
    """Whether a command, such as `fit`, uses a setting of a run, such as `save-every`."""
    return command not in _SETTINGS or command in USED_BY.get(flag, _SETTINGS)


def arranged(found: ArgumentCollection, command: str, *, with_rare: bool) -> ArgumentCollection:
    """Returns a command's arguments as the table says: used, named, ordered and shown."""
    place = {flag: n for n, flag in enumerate(flag for row in PANELS.values() for flag in row)}
    panels = {
        flag: Group(title, sort_key=number)
        for number, (title, row) in enumerate(PANELS.items())
        for flag in row
    }
    own_plan = sum(_is_plan(argument) for argument in found) == 1
    for argument in found:
        if argument.children:
            continue
        flag = "plan" if _is_plan(argument) else _flag(argument)
        changes: dict[str, Any] = {"show_default": _default(argument.field_info.default)}
        if argument.field_info.default is not True:
            changes["negative"] = ()  # only a flag that is on by default has a form --no-flag
        if argument.parameter.help:
            changes["help"] = _plain(argument.parameter.help, place)
        if command in _SETTINGS and argument.keys and not is_used(flag, command):
            changes["parse"] = False
        if flag == "plan":
            # A command that compares plans does not use a run's single plan.
            is_single = argument.field_info.name == "remat"
            changes |= {"parse": own_plan or not is_single, "name": PLAN_NAMES}
        if flag in panels and command in _SETTINGS:
            changes["group"] = panels[flag]
            if flag in RARE and not with_rare:
                changes["show"] = False
        argument.parameter = Parameter.combine(argument.parameter, Parameter(**changes))
    return ArgumentCollection(sorted(found, key=lambda one: place.get(_flag(one), -1)))


def _plain(text: str, flags: Collection[str]) -> str:
    """Returns a docstring's text for a terminal: on one line, with fields as flags."""

    def spelled(found: re.Match) -> str:
        flag = found[1].replace("_", "-")
        return f"--{flag}" if flag in flags else found[1]

    return re.sub("`([^`]+)`", spelled, " ".join(text.split()))


def _flag(argument) -> str:
    return argument.name.lstrip("-")


def _is_plan(argument) -> bool:
    return not argument.children and not set(PLAN_NAMES).isdisjoint(argument.names)


def _default(value: object) -> str | bool:
    """Returns a default as people write it; False for a default that help does not show."""
    if value is None or value is False or value == () or isinstance(value, type):
        return False
    if value is True:
        return "yes"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, Path):
        here = Path.cwd()
        return str(value.relative_to(here) if value.is_relative_to(here) else value.name)
    return f"{value:g}" if isinstance(value, float) else str(value)
