"""A row before it is run: a configuration on a target, its key, and the command lines for it."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from pathlib import Path

from experiments.config import PERMISSIONS, OptimizerConfig, TrainConfig, flag_of
from experiments.files import versions
from experiments.flags import is_used
from jaxckpt.models.config import TransformerConfig

LOCAL = "local"
_TABLES = {"model": TransformerConfig(), "optimizer": OptimizerConfig()}
# The name of a run's folder, and the files in it, change no number.
_OF_RECORD = ("save_every", "explain", "validate_every", "validation_batches")
_NOT_OF_ROW = (*PERMISSIONS, "out", "compile_cache", "keep", "sample", "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A plan on a target at a depth.

    Attributes:
      config: The whole configuration; the learning rate's schedule is over its `steps`.
      target: `"local"`, or a chip that need not be there.
      run_steps: Steps that a row on `local` trains.
    """

    config: TrainConfig
    target: str
    run_steps: int

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.config.model.num_blocks

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits, the same for cases whose rows would be the same."""
        settings = self.config.to_dict()
        settings = {name: value for name, value in settings.items() if name not in _NOT_OF_ROW}
        asked = [settings, self.target, versions(), os.environ.get("JAX_PLATFORMS")]
        asked += [self.run_steps] if self.target == LOCAL else []
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """A name for people and for the run's folder."""
        plan = re.sub(r"[^A-Za-z0-9_.+-]+", "-", self.config.remat)[:60]
        return f"{self.target}-{self.depth}-{plan}-{self.key[:6]}"

    def training_flags(self, compile_cache: Path) -> list[str]:
        """Returns the flags of `experiments.train` for this row's own run.

        `compile_cache` is an empty folder: a program from a cache names no buffers.
        """
        decay = self.config.optimizer.decay_steps or self.config.steps
        optimizer = dataclasses.replace(self.config.optimizer, decay_steps=decay)
        changes = {"optimizer": optimizer, "validation_batches": 1, "compile_cache": compile_cache}
        return flags_of(dataclasses.replace(self.config, steps=self.run_steps, **changes))

    def command(self) -> str:
        """Returns the command that trains this row, or compiles it for an absent chip."""
        # The plan is always given; other flags are given where they differ from the defaults.
        plan, rest = self.config.remat, dataclasses.replace(self.config, remat=TrainConfig().remat)
        flags = [f"--target={self.target}", f"--plan={plan}"]
        program = "fit"
        if self.target == LOCAL:
            flags, program = [f"--remat={plan}"], "train"
        flags += flags_of(rest, program)
        return shlex.join(["python", "-m", f"experiments.{program}", *flags])


def about(config: TrainConfig) -> str:
    """Returns the model without its depth, the batch and the optimizer, as people say them."""
    model = config.model
    return (
        f"a Transformer of width {model.d_model}, batches of {config.batch_size} x "
        f"{config.seq_len} tokens, {config.optimizer.kind}"
    )


def settings_of(config: TrainConfig) -> str:
    """Returns the flags of a configuration, without its plan, depth and folders."""
    usual = TrainConfig()
    changes = {name: getattr(usual, name) for name in (*_NOT_OF_ROW, "remat", "budget")}
    changes |= {name: getattr(usual, name) for name in _OF_RECORD}
    model = dataclasses.replace(config.model, num_blocks=usual.model.num_blocks)
    return shlex.join(flags_of(dataclasses.replace(config, model=model, **changes)))


def flags_of(config: TrainConfig, command: str = "train") -> list[str]:
    """Returns the flags that make a configuration out of the defaults.

    Args:
      config: The configuration.
      command: The command that takes the flags, such as `fit`.
    """
    found: list[str] = []
    for owner, values, usual in (
        (TrainConfig, config, TrainConfig()),
        (TransformerConfig, config.model, _TABLES["model"]),
        (OptimizerConfig, config.optimizer, _TABLES["optimizer"]),
    ):
        for field in dataclasses.fields(owner):
            value, flag = getattr(values, field.name), flag_of(field.name, owner)
            is_changed = field.name not in _TABLES and value != getattr(usual, field.name)
            if is_changed and is_used(flag, command):
                found += _flag(flag, value)
    return found


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}={item}" for item in value]
    return [f"--{name}={value}"]
