"""Checkpoints of a run by Orbax: atomic, asynchronous, the last few kept.

A checkpoint is the train state and, as JSON beside it, its origin: configuration, corpus hash, data
position and versions. Orbax writes to a temporary folder and renames it when it is complete, so a
killed run leaves its last complete checkpoint.
"""

import contextlib
import functools
import glob
import json
import logging
import operator
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import ConfigError, RunError, TrainConfig
from experiments.files import reason, versions
from experiments.training.step import TrainState

FOLDER = "checkpoints"
_DECAY = "optimizer.decay_steps"


class Checkpoints:
    """The checkpoints of one run's folder.

    Attributes:
      folder: The folder of the checkpoints, which the first save creates.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = (folder / FOLDER).absolute()
        self._keep = keep
        self._opened = None
        self._writing = False

    def latest(self) -> int | None:
        """Returns the step of the last complete checkpoint, or None."""
        if not self.folder.is_dir():
            return None
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, state: TrainState, about: dict[str, Any]):
        """Starts to save `state`, which is copied to the host before this returns.

        It first waits for the save before this one, so every save is written.

        Raises:
          RunError: The save before this one failed, or this one cannot start.
        """
        if not self._writing:
            # Incomplete checkpoints of a killed run are removed by writers, never by readers.
            self.close()
            self._opened, self._writing = self._open(writing=True), True
        self.wait()
        step = int(state.step)
        save = functools.partial(self._checkpointer.save_async, force=True, custom_metadata=about)
        self._do("save", step, save, step, state)

    def wait(self):
        """Waits until everything is on disk; raises `RunError` if it cannot be written."""
        if self._opened is not None:
            self._do("save", None, self._opened.wait)

    def check_own(self):
        """Raises `ConfigError` for a folder that is named like a step and was not saved by a run.

        Orbax would take it for a checkpoint of this run, and remove it as an old one.
        """
        for path in self._steps():
            try:
                about = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
                is_own = "corpus_sha256" in about
            except (OSError, ValueError, LookupError, TypeError):
                is_own = False
            if not is_own:
                raise ConfigError(
                    f"{path} is no checkpoint of experiments.train; move it away, or name another "
                    "--out"
                )

    def remove_all(self):
        """Removes the checkpoints of the run that this one replaces, after `check_own`.

        Raises:
          RunError: One cannot be removed.
        """
        for path in self._steps():
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise RunError(f"cannot remove {path}: {reason(error)}") from None

    def _steps(self) -> list[Path]:
        """Returns the folders that are named like checkpoints."""
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if path.name.isdecimal()]

    def about(self, step: int) -> dict[str, Any]:
        """Returns the JSON saved with a step; raises `ConfigError` if it cannot be read."""
        try:
            found = self._checkpointer.metadata(step).custom_metadata
        except Exception as error:  # Orbax and TensorStore raise many types for a torn file
            raise self._unreadable(step, error) from error
        if not isinstance(found, dict) or "config" not in found:
            raise self._unreadable(step, "it was not written by experiments.train")
        return found

    def load(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of a step.

        Args:
          step: From `latest`.
          like: The abstract state. Its shardings place the arrays, whatever mesh they were saved
            on; arrays without a sharding go to this process's first device.

        Raises:
          ConfigError: The checkpoint cannot be read or holds other arrays.
        """
        placed = lambda x: _on_first_device(x) if x.sharding is None else x
        try:
            # A run may switch `update_in_backward` on or off; only with it is a norm saved.
            saved: Any = self._checkpointer.metadata(step).metadata
            has_norm = saved.get("gradient_norm") is not None
            asked, scalar = like.gradient_norm, like.step
            norm = None
            if has_norm:
                norm = jax.ShapeDtypeStruct((), "float32", sharding=scalar.sharding)
            wanted = jax.tree.map(placed, like._replace(gradient_norm=norm))
            found = self._checkpointer.load(step, wanted)
        except Exception as error:  # see `about`
            raise self._unreadable(step, error) from error
        if asked is None or has_norm:
            return found if asked is not None else found._replace(gradient_norm=None)
        return found._replace(gradient_norm=jax.device_put(np.float32(0), asked.sharding))

    def parameter(self, step: int, path: tuple[str, ...]) -> np.ndarray:
        """Returns one parameter of a step, without reading the others.

        Args:
          step: The step of a complete checkpoint.
          path: Such as `("layers", "mlp", "up_proj", "kernel")`.

        Raises:
          ConfigError: The checkpoint cannot be read or has no such parameter.
        """
        wanted = tuple(jax.tree_util.DictKey(name) for name in ("params", *path))
        # Orbax reads nothing for `...`.
        like = lambda place, leaf: _on_first_device(leaf) if place == wanted else ...
        try:
            saved = self._checkpointer.metadata(step).metadata
            tree = self._checkpointer.load(step, jax.tree_util.tree_map_with_path(like, saved))
        except Exception as error:  # see `about`
            raise self._unreadable(step, error) from error
        try:
            return np.asarray(functools.reduce(operator.getitem, path, tree["params"]))
        except KeyError as error:
            raise self._unreadable(step, f"it has no parameter {'/'.join(path)}") from error

    def close(self):
        """Closes the folder; `save` and `wait` have raised the errors of saving."""
        if self._opened is not None:
            with contextlib.suppress(Exception):  # it raises the error of a failed save again
                self._opened.close()
            self._opened = None

    @property
    def _checkpointer(self):
        if self._opened is None:
            self._opened = self._open(writing=False)
        return self._opened

    def _open(self, *, writing: bool):
        # Orbax logs tracebacks of errors that are also raised here.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        from orbax.checkpoint import v1  # slow to import, and most runs never save

        latest: Any = v1.training.preservation_policies.LatestN(self._keep)
        return v1.training.Checkpointer(
            _literal(self.folder),
            preservation_policy=latest,
            cleanup_tmp_directories=writing,
        )

    def _do(self, verb: str, step: int | None, call, *args):
        try:
            call(*args)
        except Exception as error:  # a full disk surfaces as one of many types
            which = "the checkpoint" if step is None else f"the checkpoint of step {step}"
            raise RunError(f"cannot {verb} {which} in {self.folder}: {_line(error)}") from error

    def _unreadable(self, step: int, error: Exception | str) -> ConfigError:
        return ConfigError(
            f"checkpoint {step} in {self.folder} cannot be read: {_line(error)}; where another "
            f"program cannot read it either, move {self.folder / str(step)} away to go on from an "
            "earlier one"
        )


def _on_first_device(leaf) -> jax.ShapeDtypeStruct:
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _literal(folder: Path) -> Any:
    """Returns a path of Orbax's kind whose own name is never taken for a pattern.

    Orbax looks for the parts of a checkpoint by a glob below its folder, and etils makes one
    pattern of both: in a folder named `r[1]` it would find none, and save what cannot be read.
    """
    from etils import epath

    class LiteralPath(type(epath.Path(folder))):
        def glob(self, pattern: str):
            return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))

    return LiteralPath(folder)


def about_run(
    config: TrainConfig, corpus_sha256: str, step: int, planned_for: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the JSON of a checkpoint; `planned_for` says what its plan was chosen for."""
    return {
        "planned_for": planned_for,
        "config": config.to_dict(),
        "corpus_sha256": corpus_sha256,
        "data_position": step * config.batch_size,
        "seed": config.seed,
        "versions": versions(),
    }


def check_same_run(config: TrainConfig, corpus_sha256: str, about: dict[str, Any]) -> list[str]:
    """Raises unless a run may go on from a checkpoint; returns a line for each allowed change.

    The arithmetic of a step does not depend on plan, unrolling, accumulation, mesh, processes,
    folders and validation, so these may differ. The learning rate's decay may differ where it
    follows the steps, that is without `decay_steps`. All other settings have to be the same.

    Raises:
      ConfigError: Naming every difference.
    """
    before, now = about["config"], config.to_dict()
    saved, given = identity(before), identity(now)
    saved["corpus"], given["corpus"] = about["corpus_sha256"][:12], corpus_sha256[:12]
    changed = []
    was, is_now = (settings.pop(_DECAY) for settings in (saved, given))
    if was != is_now and not (before["optimizer"]["decay_steps"] or config.optimizer.decay_steps):
        changed.append(
            f"the learning rate decays over {is_now} steps, before over {was}: it follows --steps "
            f"(--decay-steps={was} keeps it)"
        )
    elif was != is_now:
        saved[_DECAY], given[_DECAY] = was, is_now
    names = {False: "after the backward pass", True: "in it, clipped by the last step's norm"}
    was, is_now = before.get("update_in_backward", False), now["update_in_backward"]
    if was != is_now:
        changed.append(f"the optimizer's step is {names[is_now]}; before, it was {names[was]}")
    different = [
        f"{key} was {saved.get(key)!r}, is {given.get(key)!r}"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key)
    ]
    if different:
        raise ConfigError(
            f"cannot resume, the checkpoint is of another run: {'; '.join(different)}"
        )
    return changed


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that decide a step's arithmetic, flat: model, optimizer, batch, seed."""
    kept = {key: config[key] for key in ("batch_size", "seq_len", "seed")}
    # Checkpoints of earlier versions lack these settings.
    kept |= {"z_loss": config.get("z_loss", 0.0), "trainable": config.get("trainable", [])}
    kept["pack"] = config.get("pack", False)
    for table in ("model", "optimizer"):
        kept.update({f"{table}.{key}": value for key, value in config[table].items()})
    kept.setdefault("optimizer.moment_dtype", "float32")
    kept["param_dtype"] = config.get("param_dtype", "float32")
    kept.pop("model.mlp_tiles", None)  # it changes the order of sums alone, as accumulation does
    kept[_DECAY] = config["optimizer"]["decay_steps"] or config["steps"]
    return kept


def _line(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
