"""What every command line here shares: flags over a TOML file over defaults, errors in one line.

A refused command line prints one plain line on stderr, exits with code 2, and has not imported JAX.
What is refused is a `UserError`; any other error is a fault of the program, with its traceback and
code 1. `--debug` shows where a line comes from, too.
"""

import contextlib
import importlib.metadata
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, config

from experiments.config import PERMISSIONS, ConfigError, RunError, expanded, load_toml
from experiments.weights.load import shape_flags
from jaxckpt.absent import launch
from jaxckpt.plans.errors import UserError

_DEBUG = "--debug"
_PATIENCE_SECONDS = 0.5


def main(command: Callable, tokens: Sequence[str] | None = None, *, package: str = "experiments"):
    """Runs `command` with a command line, and turns what a user got wrong into one line.

    Args:
      command: A function named like its module; its parameters are the flags, its docstring the
        help.
      tokens: The command line without the program's name; `sys.argv` by default.
      package: Where the command's module is.

    Raises:
      SystemExit: With code 2 after an error of the user's, 1 after one that ends a run, 130 or 143
        where Ctrl-C or SIGTERM did.
      Exception: A fault of the program.
    """
    given = list(sys.argv[1:] if tokens is None else tokens)
    tokens = [token for token in given if token != _DEBUG]
    is_debugged = len(tokens) < len(given)
    app = App(
        name=f"python -m {package}.{command.__name__}",
        version=lambda: importlib.metadata.version("jaxckpt"),
        help_format="plaintext",
        help_epilogue=f"{_DEBUG} prints the traceback of an error above its line.",
    )
    app.default(command)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show ends no run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        taken = [one for one in app.assemble_argument_collection() if one.parse]
        flags = _file_flags(tokens, {name for one in taken for name in one.names})
        app.config = (config.Dict(flags, source="the configuration file"),)
        function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        values = {name: _expanded(value, name) for name, value in bound.kwargs.items()}
        with _terminated_in_order():
            function(*(_expanded(value, "path") for value in bound.args), **values)
    except (CycloptsError, UserError, RunError) as error:
        if is_debugged:
            traceback.print_exception(error)
        fail(error, code=error.code if isinstance(error, RunError) else 2)
    except KeyboardInterrupt as error:
        _leave(f"interrupted: {error}" if str(error) else "interrupted", code=130)
    except Terminated:
        fail("terminated", code=128 + signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM came. Like `KeyboardInterrupt` it is not an `Exception`."""


@contextlib.contextmanager
def _terminated_in_order():
    """A context that SIGTERM leaves by an exception, so that what is half-written is removed.

    Whoever else has a use for the signal, around or inside, keeps it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    is_free = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_free:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if is_free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_):
    raise Terminated


def fail(error: Exception | str, code: int = 2):
    """Prints one line on stderr and exits."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    raise SystemExit(code)


def _leave(line: str, code: int):
    """Prints a line on stderr and exits, though a thread may be inside the compiler."""
    try:
        fail(line, code)
    finally:
        threads = [one for one in threading.enumerate() if one.name.startswith(launch.THREADS)]
        for one in threads:
            one.join(_PATIENCE_SECONDS)
        if any(one.is_alive() for one in threads):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the compiler cannot be told to stop


def _expanded(value: Any, name: str) -> Any:
    """Returns an argument; paths with `~` as the user's home."""
    if isinstance(value, tuple):
        return tuple(_expanded(one, name) for one in value)
    return expanded(value, name) if isinstance(value, Path) else value


def _file_flags(tokens: Sequence[str], known: Collection[str]) -> dict[str, Any]:
    """Returns the flags that the file named by `--config` sets, over those of `--init`'s model.

    Settings of the file that this command has no use for, but another has, are left out.

    Args:
      tokens: The command line.
      known: The command's flags.
    """
    path = _value_of("--config", tokens)
    flags = {} if path is None else load_toml(expanded(Path(path), "config"))
    for name in PERMISSIONS:
        if flags.pop(name, False):
            raise ConfigError(f"{path} sets {name}, which is for one time: give it as --{name}")
    folder = _value_of("--init", tokens) or flags.get("init")
    if folder is not None:
        flags = shape_flags(expanded(Path(folder), "init")) | flags
    return {name: value for name, value in flags.items() if f"--{name}" in known}


def _value_of(flag: str, tokens: Sequence[str]) -> str | None:
    for position, token in enumerate(tokens):
        if token.startswith(f"{flag}="):
            return token.partition("=")[2]
        if token == flag and position + 1 < len(tokens):
            return tokens[position + 1]
    return None
