"""The files of a run: `metrics.jsonl`, one JSON object a line, and `config.toml`."""

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from experiments import files
from experiments.config import ConfigError, RunError, TrainConfig

METRICS = "metrics.jsonl"
CONFIG = "config.toml"


@contextlib.contextmanager
def run_folder(config: TrainConfig, *, is_first: bool) -> Iterator[Path]:
    """A context with the absolute path of a run's folder, in which no other process writes there.

    Of several processes only the first one, which writes, locks the folder.

    Raises:
      ConfigError: The folder holds a run already, holds no run to resume, is foreign, or cannot be
        made.
    """
    if config.resume and config.out is None:
        raise ConfigError("--resume needs --out, the folder of the run to go on with")
    wanted = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if os.sep == "/" and "\\" in str(wanted.absolute()):
        # TensorStore reads a backslash as a slash, and would save outside of the folder.
        raise ConfigError(f"--out {str(wanted)!r}: no checkpoint can be kept below a backslash")
    own = files.own_folder(wanted, "experiments.train", METRICS, is_new=config.out is None)
    with own if is_first else contextlib.nullcontext(wanted.absolute()) as folder:
        holds_run = (folder / METRICS).is_file()
        if config.resume and not holds_run:
            raise ConfigError(f"--out {str(wanted)!r} holds no run to resume; leave --resume out")
        if holds_run and not (config.resume or config.overwrite):
            raise ConfigError(
                f"--out {str(wanted)!r} already holds a run; --resume goes on with it, --overwrite "
                "replaces it, or name another folder"
            )
        yield folder


def check_tensorboard():
    """Raises `ConfigError` unless the package that writes TensorBoard files is installed."""
    why = "--tensorboard needs the package tensorboardX"
    files.import_extra("tensorboardX", why, "tensorboard")


class Record:
    """Appends one JSON object a line to `metrics.jsonl`; every line is on disk once written.

    Attributes:
      path: The file.
      validations: Validation losses already on record when the run began, by step.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, header: dict[str, Any] | None, resumed: int | None
    ):
        """Writes the configuration of the run, and the record's first object.

        Args:
          folder: From `run_folder`.
          config: The configuration, with the chosen plan.
          header: The fields of the first object, without versions and platform. None in all
            processes but the first, which write nothing.
          resumed: The step that the run goes on from; rows of later steps are removed.

        Raises:
          RunError: The folder cannot be written.
        """
        self.path, self._file = folder / METRICS, None
        try:
            lines = [] if resumed is None else _rows_until(self.path, resumed)
            rows = map(json.loads, lines)
            self.validations: dict[int, float] = {
                row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row
            }
            if header is None:
                return
            files.write_whole(folder / CONFIG, tomli_w.dumps(config.to_dict()))
            files.write_whole(self.path, "".join(lines))
            # Without a buffer, closing the file writes nothing, so it cannot fail.
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(f"cannot write to {folder}: {files.reason(error)}") from None
        row = {"versions": files.versions(), "platform": platform.platform(), **header}
        row["date"] = time.strftime("%Y-%m-%d")
        self.write(row if resumed is None else row | {"resumed_from_step": resumed})

    def write(self, row: dict[str, Any]):
        """Appends one object, with null for infinities and NaN; raises `RunError` if it cannot."""
        if self._file is None:
            return
        is_finite = lambda value: not isinstance(value, float) or math.isfinite(value)
        row = {key: value if is_finite(value) else None for key, value in row.items()}
        try:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {files.reason(error)}") from None

    def close(self):
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def _rows_until(path: Path, step: int) -> list[str]:
    """Returns the lines of a record up to a step, without a line that a killed run left open."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("step", row.get("resumed_from_step", 0)) <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    return kept
