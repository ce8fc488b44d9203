"""What a user can mend is one line and code 2; a fault of the program keeps its traceback."""

import dataclasses
import importlib
import pkgutil
from typing import Annotated

import pytest
from cyclopts import Parameter

import experiments
import jaxckpt
from experiments.cli import main
from experiments.config import ConfigError, RunError, TrainConfig
from experiments.data.sources import DataError
from experiments.data.tokenizer import Tokenizer
from experiments.fit import fit
from experiments.fitting.row import FitRow
from jaxckpt.absent.launch import WorkerError, WorkerRefusal
from jaxckpt.plans.errors import UserError

FAULTS = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AssertionError)


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def users_errors() -> set[type]:
    """Returns every error class of the package and its commands that is a user's."""
    for package in (jaxckpt, experiments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("worker"):
                importlib.import_module(module.name)
    return {one for one in subclasses(UserError) if one.__module__.startswith(("jax", "exp"))}


def raised_by(error: Exception, *flags: str):
    """Runs a command that raises an error two calls deep."""

    def train():
        """Do nothing."""
        _deep(error)

    main(train, list(flags))


def _deep(error: Exception):
    raise error


def made(kind: type) -> Exception:
    error = kind.__new__(kind)  # whatever its constructor takes
    error.args = ("given 3;\n  valid: 4",)
    return error


def test_a_users_error_is_one_line_and_code_2(capsys):
    names = {kind.__name__ for kind in users_errors()}
    assert {"PlanError", "ConfigError", "DataError", "BudgetError", "MeshError"} <= names
    assert {"ModelError", "TargetError", "Unavailable", "WorkerRefusal"} <= names
    for kind in users_errors():
        with pytest.raises(SystemExit) as stop:
            raised_by(made(kind))
        assert stop.value.code == 2, kind
        assert capsys.readouterr().err == "error: given 3; valid: 4\n", kind


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_program_is_never_a_users_error(kind):
    with pytest.raises(kind):
        raised_by(kind("something of ours"))


def test_a_fault_while_flags_are_read_is_none_either():
    @dataclasses.dataclass(frozen=True)
    class Flags:
        steps: int

        def __post_init__(self):
            raise (ConfigError if self.steps == 1 else ValueError)("steps")

    def train(flags: Annotated[Flags, Parameter(name="*")]):
        """Do nothing."""

    with pytest.raises(SystemExit, match="2"):
        main(train, ["--steps=1"])
    with pytest.raises(ValueError, match="steps"):
        main(train, ["--steps=2"])


def test_what_ends_a_run_is_one_line_and_code_1(capsys):
    with pytest.raises(SystemExit) as stop:
        raised_by(RunError("the disk is full"))
    assert stop.value.code == 1 and capsys.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_debug_shows_where_a_line_comes_from(kind, capsys):
    error = kind("cannot be read")
    error.__cause__ = OSError("the first of all")
    with pytest.raises(SystemExit):
        raised_by(error, "--debug")
    err = capsys.readouterr().err
    assert "OSError: the first of all" in err and ", in _deep" in err
    assert err.endswith("\nerror: cannot be read\n")


def test_debug_is_in_the_help(capsys):
    main(fit, ["--help"])
    assert "--debug prints the traceback" in capsys.readouterr().out


def test_what_a_package_raised_is_kept(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="is not a readable tokenizer") as caught:
        Tokenizer(path)
    assert caught.value.__cause__ is not None


def test_a_row_knows_whose_failure_it_is():
    asked = {"config": TrainConfig(), "target": "v5e-1"}
    for kind in (WorkerError, WorkerRefusal):
        error = kind("v5e-1: no", kind="K", detail="no", traceback="File worker.py, line 3")
        row = FitRow(**asked, failure=error)
        assert row.is_refused == (kind is WorkerRefusal) and row.error == "v5e-1: no"
        assert "In the process that compiles:\nFile worker.py, line 3" in row.as_json()["traceback"]
