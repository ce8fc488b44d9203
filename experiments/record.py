"""What a run leaves behind: `metrics.jsonl`, one JSON object a line, and `config.toml`."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path

import tomli_w

from experiments.config import ConfigError, TrainConfig

METRICS = "metrics.jsonl"
CONFIG = "config.toml"


def run_folder(config: TrainConfig) -> Path:
    """Returns the folder a run writes to, without making it.

    Raises:
      ConfigError: It holds a run already, or cannot be a folder.
    """
    folder = config.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {str(folder)!r} is a file; name a folder")
    if (folder / METRICS).exists() and not config.overwrite:
        raise ConfigError(
            f"--out {str(folder)!r} already holds a run; --overwrite replaces it, or name another"
        )
    return folder


class Record:
    """Appends one JSON object a line to `metrics.jsonl`; every line is on disk once written."""

    def __init__(self, folder: Path, config: TrainConfig, header: dict[str, object]):
        """Makes the folder, writes the configuration as run and the first object.

        Args:
          folder: From `run_folder`.
          config: The configuration as run.
          header: What the first object says beside versions and platform.
        """
        self.path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(tomli_w.dumps(config.to_dict()), encoding="utf-8")
        self._file = self.path.open("w", encoding="utf-8", buffering=1)
        self.write({"versions": versions(), "platform": platform.platform(), **header})

    def write(self, row: dict[str, object]):
        """Appends one object."""
        self._file.write(json.dumps(row) + "\n")

    def close(self):
        """Closes the file."""
        self._file.close()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a run's numbers."""
    packages = ("jaxckpt", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
