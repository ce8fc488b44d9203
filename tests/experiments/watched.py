"""Runs a training command that is killed at a moment of its own, however fast the machine is.

`python -m tests.experiments.watched KILL_AT COUNT FOLDER FLAG ...` is `experiments.train FLAG ...`,
ended by SIGKILL just before its operation KILL_AT on a file of FOLDER: an open, a rename, a new
folder. A run that comes to its end writes how many there were to the file COUNT.
"""

import itertools
import os
import runpy
import signal
import sys
from pathlib import Path

_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main(kill_at: int, count: Path, folder: str, flags: list[str]):
    """Runs the command."""
    operations = itertools.count(1)
    last = 0

    def watch(event: str, args: tuple):
        nonlocal last
        if event in _OPERATIONS and str(args[0]).startswith(folder):
            last = next(operations)
            if last == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = ["experiments.train", *flags]
    runpy.run_module("experiments.train", run_name="__main__")
    count.write_text(str(last))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
