"""What all command lines share: flags over a TOML file over defaults, errors in one line.

A refused command line prints one plain line on stderr, exits with code 2, and has not imported JAX.
A user's mistake is a `UserError`; any other error is a fault of the program, with its traceback and
code 1. `--debug` shows the traceback of a mistake too.
"""

import contextlib
import difflib
import importlib.metadata
import io
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import (
    App,
    ArgumentCollection,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnknownOptionError,
    UnusedCliTokensError,
    config,
)

from experiments import flags as table
from experiments.config import PERMISSIONS, ConfigError, RunError, expanded, load_toml
from experiments.weights.load import shape_flags
from jaxckpt.absent import launch
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import CUTOFF, PlanError, UserError

ConfigFile = Annotated[Path | None, Parameter(help="TOML file of settings; flags win over it.")]
_DEBUG, _HELP_ALL = "--debug", "--help-all"
_PATIENCE_SECONDS = 0.5
_EXAMPLES = 3  # in a command's help


def main(command: Callable, tokens: Sequence[str] | None = None, *, package: str = "experiments"):
    """Runs `command` with a command line; a user's mistake becomes one line.

    Args:
      command: A function named like its module; its parameters are the flags, its docstring the
        help.
      tokens: The command line without the program's name; `sys.argv` by default.
      package: The package of the command's module.

    Raises:
      SystemExit: With code 2 after an error of the user's, 1 after one that ends a run, 130 or 143
        after Ctrl-C or SIGTERM.
      Exception: A fault of the program.
    """
    given = list(sys.argv[1:] if tokens is None else tokens)
    tokens = [token for token in given if token != _DEBUG]
    is_debugged = len(tokens) < len(given)
    with_rare = _HELP_ALL in tokens
    app = _app(command, package, with_rare=with_rare)
    tokens = ["--help"] if with_rare else tokens
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        flags = _file_flags(tokens, app)
        app.config = (config.Dict(flags, source="the configuration file"),)
        function, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        values = {name: _expanded(value, name) for name, value in bound.kwargs.items()}
        with _terminated_in_order():
            function(*(_expanded(value, "path") for value in bound.args), **values)
    except (CycloptsError, UserError, RunError) as error:
        if is_debugged:
            traceback.print_exception(error)
        text = app.reason(error) if isinstance(error, CycloptsError) else error
        fail(text, code=error.code if isinstance(error, RunError) else 2)
    except KeyboardInterrupt as error:
        _leave(f"interrupted: {error}" if str(error) else "interrupted", code=130)
    except Terminated:
        fail("terminated", code=128 + signal.SIGTERM)


class _App(App):
    """A command with its flags as the table of flags arranges them.

    Attributes:
      word: The last part of its module's name.
      with_rare: Whether help shows rare flags.
    """

    # cyclopts makes `--help` and `--version` as apps of this class too, without arguments.
    word, with_rare = "", False

    def assemble_argument_collection(self, **options) -> ArgumentCollection:
        """Returns the command's flags."""
        found = super().assemble_argument_collection(**options)
        return table.arranged(found, self.word, with_rare=self.with_rare)

    def reason(self, error: CycloptsError) -> str:
        """Returns the fault of a command line, with the nearest guess."""
        if isinstance(error, MissingArgumentError) and error.argument is not None:
            ours = self.assemble_argument_collection(parse_docstring=True)
            argument = next(one for one in ours if one.name == error.argument.name)
            is_there = error.keyword is not None or error.argument.tokens
            what = "requires an argument" if is_there else "is missing"
            return f"{_spelled(argument)} {what}: {argument.parameter.help}"
        if isinstance(error, UnknownOptionError):
            return self._unknown(error.token.keyword or error.token.value)
        if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
            return self._unused(error.unused_tokens[0])
        return str(error)

    def _unknown(self, given: str) -> str:
        flag = given.partition("=")[0]
        users = table.USED_BY.get(flag.strip("-").removeprefix("no-"), ())
        if users and self.word not in users:
            where = " and ".join(f"experiments.{name}" for name in users)
            return f"{flag} is a flag of {where}; {self.name[0].split()[-1]} has no use for it"
        arguments = self.assemble_argument_collection()
        known = [name for one in arguments if one.parse for name in one.names]
        # Leading dashes do not make two flags similar.
        bare = {name.lstrip("-"): name for name in known}
        near = difflib.get_close_matches(flag.lstrip("-"), bare, n=1, cutoff=CUTOFF)
        guess = f"Did you mean {bare[near[0]]}?" if near else f"{_HELP_ALL} lists all."
        return f"Unknown option: {flag}. {guess}"

    def _unused(self, given: str) -> str:
        takes_plan = any("--plan" in one.names for one in self.assemble_argument_collection())
        try:
            Plan.parse(given)
        except PlanError:
            takes_plan = False
        guess = f" (did you mean --remat={given}?)" if takes_plan else ""
        return f"{given!r} belongs to no flag{guess}"


def _app(command: Callable, package: str, *, with_rare: bool) -> _App:
    app = _App(
        name=f"python -m {package}.{command.__name__}",
        version=lambda: importlib.metadata.version("jaxckpt"),
        help_format="plaintext",
        group_commands=Group("Help", sort_key=len(table.PANELS)),
    )
    app.word, app.with_rare = command.__name__, with_rare
    app.default(command)
    arguments = app.assemble_argument_collection()
    rare = sum(one.parse and one.parameter.show is False for one in arguments)
    lines = _examples(sys.modules[command.__module__].__doc__ or "")
    lines += [f"{_HELP_ALL} lists {rare} more flags."] if rare else []
    lines += [f"{_DEBUG} prints the traceback of an error above its line."]
    app.help_epilogue = "\n".join(lines)
    return app


def _spelled(argument) -> str:
    """Returns how an argument is given: `PLAN`, or `--folder (-o)`."""
    if argument.index is not None:
        return argument.name.lstrip("-").upper()
    first, *others = argument.names
    return f"{first} ({', '.join(others)})" if others else first


def _examples(text: str) -> list[str]:
    """Returns the first command lines of a module's docstring, with a headline."""
    joined = text.replace("\\\n", "")
    lines = [line for line in joined.splitlines() if line.startswith("python -m ")]
    shown = [" ".join(line.partition(" #")[0].split()) for line in lines[:_EXAMPLES]]
    # A narrow terminal gets a command over several lines, joined by backslashes to be copied.
    wrap = lambda text: textwrap.wrap(text, 72, break_long_words=False, break_on_hyphens=False)
    found = ["  " + " \\\n    ".join(wrap(command)) for command in shown]
    return ["Examples:", *found, ""] if found else []


class Terminated(BaseException):
    """SIGTERM came. Like `KeyboardInterrupt` it is not an `Exception`."""


@contextlib.contextmanager
def _terminated_in_order():
    """A context in which SIGTERM raises an exception, so that half-written files are removed.

    A handler of SIGTERM that somebody else has set is kept.
    """

    def terminate(*_):
        raise Terminated

    in_main = threading.current_thread() is threading.main_thread()
    is_free = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_free:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if is_free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def _file_flags(tokens: Sequence[str], app: _App) -> dict[str, Any]:
    """Returns the flags that the file named by `--config` sets, over the shape of `--init`'s model.

    Settings that only other commands use are left out.
    """
    path = _value_of("--config", tokens)
    flags = {} if path is None else load_toml(expanded(Path(path), "config"))
    for name in PERMISSIONS:
        if flags.pop(name, False):
            raise ConfigError(f"{path} sets {name}, which is for one time: give it as --{name}")
    folder = _value_of("--init", tokens) or flags.get("init")
    if folder is not None:
        flags = shape_flags(expanded(Path(folder), "init")) | flags
    known = {name for one in app.assemble_argument_collection() if one.parse for name in one.names}
    if app.word == "sweep" or (app.word == "fit" and flags.get("remat") != "auto"):
        flags.pop("remat", None)  # these commands compare plans, and a file has a single one
    return {name: value for name, value in flags.items() if f"--{name}" in known}


def _value_of(flag: str, tokens: Sequence[str]) -> str | None:
    for position, token in enumerate(tokens):
        if token.startswith(f"{flag}="):
            return token.partition("=")[2]
        if token == flag and position + 1 < len(tokens):
            return tokens[position + 1]
    return None
