"""What every command line here shares: flags over a TOML file over defaults, errors in one line.

A refused command line prints one plain line on stderr, exits with code 2, and has not imported JAX.
What is refused is a `UserError`; any other error is a fault of the program, with its traceback and
code 1. `--debug` shows where a line comes from, too.
"""

import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, config

from experiments.config import load_toml
from experiments.init import shape_flags
from experiments.record import RunError
from jaxckpt.plans.errors import UserError

_DEBUG = "--debug"


def main(command: Callable, tokens: Sequence[str] | None = None):
    """Runs `command` with a command line, and turns what a user got wrong into one line.

    Args:
      command: A function named like its module; its parameters are the flags, its docstring the
        help.
      tokens: The command line without the program's name; `sys.argv` by default.

    Raises:
      SystemExit: With code 2 after an error of the user's, 1 after one that ends a run.
      Exception: A fault of the program.
    """
    given = list(sys.argv[1:] if tokens is None else tokens)
    tokens = [token for token in given if token != _DEBUG]
    is_debugged = len(tokens) < len(given)
    app = App(
        name=f"python -m experiments.{command.__name__}",
        version=lambda: importlib.metadata.version("jaxckpt"),
        help_format="plaintext",
        help_epilogue=f"{_DEBUG} prints the traceback of an error above its line.",
    )
    app.default(command)
    try:
        app.config = (config.Dict(_file_flags(tokens), source="the configuration file"),)
        function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        function(*bound.args, **bound.kwargs)
    except (CycloptsError, UserError, RunError) as error:
        if is_debugged:
            traceback.print_exception(error)
        fail(error, code=1 if isinstance(error, RunError) else 2)


def fail(error: Exception | str, code: int = 2):
    """Prints one line on stderr and exits."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(code)


def _file_flags(tokens: Sequence[str]) -> dict[str, Any]:
    """Returns the flags that the file named by `--config` sets, over those of `--init`'s model."""
    path = _value_of("--config", tokens)
    flags = {} if path is None else load_toml(Path(path))
    folder = _value_of("--init", tokens) or flags.get("init")
    return flags if folder is None else shape_flags(Path(folder)) | flags


def _value_of(flag: str, tokens: Sequence[str]) -> str | None:
    for position, token in enumerate(tokens):
        if token.startswith(f"{flag}="):
            return token.partition("=")[2]
        if token == flag and position + 1 < len(tokens):
            return tokens[position + 1]
    return None
