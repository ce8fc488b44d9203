"""The configuration of a training run: frozen data, its TOML form, and its checks.

Every field is a flag (`batch_size` is `--batch-size`); a TOML file groups them in tables:

    steps = 200
    [model]
    num_blocks = 8
    [optimizer]
    learning_rate = 3e-3

Nothing here imports JAX.
"""

import contextlib
import dataclasses
import difflib
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from jaxckpt.losses.sizes import chunk_positions, divisors
from jaxckpt.models.config import TransformerConfig
from jaxckpt.models.mesh import MeshShape
from jaxckpt.planner.budgets import given_bytes, host_bytes
from jaxckpt.plans import Plan
from jaxckpt.plans.errors import CUTOFF, UserError, check_word, nearest


class RunError(RuntimeError):
    """An error that ends a run after it has begun: one line.

    Attributes:
      code: The exit code of the process.
    """

    def __init__(self, message: str, *, code: int = 1):
        super().__init__(message)
        self.code = code


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run: one line with what is valid and the nearest guess."""


def at_least(config, least: int, *names: str):
    """Raises `ConfigError` unless these attributes are at least `least`."""
    check_least(least, **{name: getattr(config, name) for name in names})


def check_least(least: int, **values: float):
    """Raises `ConfigError` unless values, given by name, are at least `least`."""
    for name, value in values.items():
        if not value >= least:
            raise ConfigError(f"{name} is {value}; the least is {least}")


def _at_most(config, most: int, *names: str):
    for name in names:
        if not getattr(config, name) <= most:
            raise ConfigError(f"{name} is {getattr(config, name)}; the most is {most}")


@contextlib.contextmanager
def _refusing(start: str = "", end: str = ""):
    """A context whose `ValueError` becomes a `ConfigError`, with text before and behind its own."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{start}{error}{end}") from None


_AnyPath = TypeVar("_AnyPath", str, Path)


def expanded(path: _AnyPath, name: str) -> _AnyPath:
    """Returns a path, or a glob, with `~` as the user's home; `name` is the setting, for errors.

    Raises:
      ConfigError: There is no home folder, or no record could hold the path's name.
    """
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if found == text and text.partition("/")[0] == "~":
        raise ConfigError(f"{name} {text!r}: there is no home folder; set HOME, or write it out")
    try:
        is_utf8 = found.encode() == os.fsencode(found) and "\0" not in found
    except UnicodeError:
        is_utf8 = False
    if not is_utf8:
        raise ConfigError(
            f"{name} {text!r} has a name that is no UTF-8, so no record can hold it; use another "
            "one, or a link"
        )
    return type(path)(found)


_STORED = ("float32", "bfloat16")
# Decays of the first and second moment that each optimizer has, and their defaults.
_BETAS = {
    "adamw": (0.9, 0.95),
    "adafactor": (None, None),
    "lion": (0.9, 0.99),
    "sgd": (0.9, None),
    "muon": (0.95, 0.95),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer with linear warm-up, cosine decay to a tenth, and clipping by the global norm.

    Attributes:
      kind: The optimizer. Muon updates the stack's matrices, and Adam all else.
      learning_rate: Learning rate at the end of the warm-up.
      warmup_steps: Steps in which the learning rate grows from 0.
      weight_decay: Decoupled weight decay of the matrices; scales of norms do not decay.
      beta1: Decay of the first moment or the momentum; by default 0.9, for muon 0.95. Adafactor
        has none.
      beta2: Decay of the second moment (lion: of the momentum it keeps); by default 0.95, for lion
        0.99. Adafactor and sgd have none.
      moment_dtype: Dtype of the first moment or the momentum; the second moment stays float32.
      clip_norm: Largest global norm of the gradients; larger ones are scaled down to it.
      decay_steps: Steps of warm-up and decay together; 0 means all of `steps`.
    """

    kind: Annotated[
        Literal["adamw", "adafactor", "lion", "sgd", "muon"], Parameter(name="--optimizer")
    ] = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float | None = None
    beta2: float | None = None
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    clip_norm: float = 1.0
    decay_steps: int = 0

    def __post_init__(self):
        check_word("optimizer", self.kind, tuple(_BETAS), ConfigError)
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "decay_steps")
        check_word("moment_dtype", self.moment_dtype, _STORED, ConfigError)
        if self.moment_dtype != "float32" and self.kind == "adafactor":
            raise ConfigError("moment_dtype needs an optimizer with a momentum; adafactor has none")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm is {self.clip_norm}; it is above 0, such as 1.0")
        for place, name in enumerate(("beta1", "beta2")):
            value = getattr(self, name)
            if value is None:
                continue
            if _BETAS[self.kind][place] is None:
                having = [kind for kind, betas in _BETAS.items() if betas[place] is not None]
                raise ConfigError(
                    f"{name} is {value}, but optimizer {self.kind} has none; these have one: "
                    f"{', '.join(having)}"
                )
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is a decay in [0, 1), not {value}")

    @property
    def betas(self) -> tuple[float | None, float | None]:
        """Both decays, as given or by default; None where the optimizer has none."""
        given, usual = (self.beta1, self.beta2), _BETAS[self.kind]
        first, second = (b if a is None else a for a, b in zip(given, usual, strict=True))
        return first, second


_PATHS = ("init", "data", "out", "compile_cache")
# Permissions hold for one command. In a record they would hold for every later command too.
PERMISSIONS = ("overwrite", "resume")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
      model: Shapes of the Transformer.
      optimizer: The optimizer and its settings.
      init: Folder of a Qwen3 as Hugging Face's transformers saves it. The run starts from its
        weights; its config.json sets the model's shape, its tokenizer.json turns text into tokens.
      data: A text file, a folder, a quoted glob, or a token file (.npy, .bin); by default the
        source text of Python's standard library.
      token_dtype: Type of the numbers in a .bin token file.
      pack: Pack whole documents into each sequence; attention does not cross their boundaries. A
        document is a text file, a line of JSON Lines ({"text": ...} or {"tokens": [...]}), or the
        tokens up to an `end_token`.
      end_token: Token that ends a document; by default the eos_token_id of `init`, or none.
      remat: The checkpointing plan, such as sqrt, uniform:4+dots or 4xfull/none; auto takes the
        fastest plan within `budget`.
      budget: Memory limit per device, e.g. 15GiB, or auto for all that the device can use. The run
        is refused if the compiled step needs more.
      host_budget: Limit, per device, of the host memory that a plan may move values to, e.g. 32GiB.
        By default auto moves nothing, and a plan that you name moves what it says.
      calibrate: Time a block on this device once, so that auto plans with measured seconds.
      unroll: Blocks unrolled in each trip of the stack's loop; 0 takes the number that is fastest
        for the plan and the chip.
      mesh: Devices that each step is spread over, e.g. data=2,fsdp=4,tensor=2: data and fsdp cut
        the batch, fsdp the parameters and the optimizer state, tensor the heads and widths.
      steps: Training steps.
      batch_size: Sequences per step.
      accumulate: Microbatches of each batch; their gradients are accumulated.
      update_in_backward: Update each block as soon as its gradient is complete, so that the
        gradients of the stack are never in memory together. Gradients are then clipped by the last
        step's norm.
      param_dtype: Dtype of the blocks' trained parameters. bfloat16 is rounded stochastically by
        `seed`; embedding, head and the optimizer's arithmetic stay float32.
      seq_len: Tokens per sequence.
      loss_chunk_tokens: Tokens whose logits are in memory at once, over all sequences of a
        microbatch; 0 takes a number that suits the shapes.
      z_loss: Weight of the squared log-partition function in the training loss, e.g. 1e-4.
      trainable: Globs over the paths of the parameters to train, e.g. layers/self_attn/*; all
        others are frozen. By default everything is trained.
      seed: Seed of the parameters, the order of the data and dropout.
      validate_every: Validate every N steps; 0 validates only at the end.
      validation_batches: Batches per validation.
      out: Folder of the run's metrics, configuration and checkpoints; by default runs/ and the
        time.
      overwrite: Replace the run that `out` holds.
      resume: Continue from the last checkpoint in `out`; the plan may be another one.
      save_every: Save every N steps; 0 saves only when the run is interrupted.
      keep: Number of checkpoints to keep.
      max_skipped: End the run after N steps in a row with non-finite gradients.
      explain: Print the residuals of one block, and what the plan does with them.
      sample: Print a few lines that the trained model writes.
      tensorboard: Also write TensorBoard event files to `out`.
      compile_cache: Folder of compiled steps, so that the next run starts sooner; by default
        jaxckpt/compiled in your cache folder.
    """

    model: Annotated[TransformerConfig, Parameter(name="*")] = TransformerConfig()
    optimizer: Annotated[OptimizerConfig, Parameter(name="*")] = OptimizerConfig()
    init: Path | None = None
    data: str | None = None
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    pack: bool = False
    end_token: int | None = None
    remat: str = "sqrt"
    budget: str | None = None
    host_budget: str | None = None
    calibrate: bool = False
    unroll: int = 0
    mesh: str | None = None
    steps: int = 100
    batch_size: int = 16
    accumulate: int = 1
    update_in_backward: Annotated[bool, Parameter(negative="")] = False
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    seq_len: int = 128
    loss_chunk_tokens: int = 0
    z_loss: float = 0.0
    trainable: tuple[str, ...] = ()
    seed: int = 0
    validate_every: int = 0
    validation_batches: int = 8
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False
    save_every: int = 0
    keep: int = 3
    max_skipped: int = 10
    explain: bool = False
    sample: bool = False
    tensorboard: bool = False
    compile_cache: Path | None = None

    def __post_init__(self):
        for name in _PATHS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expanded(value, name))
        at_least(self, 1, "steps", "batch_size", "seq_len", "validation_batches")
        at_least(self, 1, "accumulate", "keep", "max_skipped")
        at_least(self, 0, "unroll", "validate_every", "seed", "save_every")
        at_least(self, 0, "loss_chunk_tokens", "z_loss")
        _at_most(self, 2**32 - 1, "seed")  # JAX's keys ignore higher bits
        _at_most(self, 2**31 - 1, "steps", "batch_size", "seq_len")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}; "
                f"valid: {', '.join(map(str, divisors(self.batch_size)))}"
            )
        with _refusing():
            if self.mesh_shape is not None:
                self.mesh_shape.check(self.model, self.batch_size, self.accumulate)
        check_word("param_dtype", self.param_dtype, _STORED, ConfigError)
        if self.param_dtype != "float32" and self.mesh is not None:
            raise ConfigError("--param-dtype=bfloat16 is for one device; leave it or --mesh out")
        if self.update_in_backward:
            self._check_update_in_backward()
        if self.end_token is not None and not (self.pack and 0 <= self.end_token < 2**32):
            raise ConfigError(f"end_token is {self.end_token}; it is a token id, and needs --pack")
        if self.loss_chunk_tokens:
            rows = self.batch_size // self.accumulate
            with _refusing("loss_"):
                chunk_positions((rows, self.seq_len), self.loss_chunk_tokens)
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a run, --overwrite replaces it; name one")
        if self.budget is not None and self.budget != "auto":
            with _refusing(end="; auto is all that the device can use"):
                given_bytes(self.budget)
        if self.host_budget is not None:
            with _refusing():
                host_bytes(self.host_budget)
        if self.is_auto and self.budget is None:
            raise ConfigError(
                "plan 'auto' needs a budget: --budget=auto is all that the device can use, "
                "--budget=15GiB a number of bytes"
            )

    def _check_update_in_backward(self):
        if self.accumulate > 1:
            raise ConfigError(
                f"--update-in-backward updates a block when its gradient is complete, and with "
                f"--accumulate={self.accumulate} that is after the last microbatch; leave one out"
            )
        if self.mesh is not None:
            raise ConfigError("--update-in-backward is for one device; leave it or --mesh out")
        if self.model.dtype == "float16":
            raise ConfigError(
                "--update-in-backward cannot skip a step whose gradients overflow, as float16 "
                "needs; use --dtype=bfloat16 or float32, or leave it out"
            )

    @property
    def mesh_shape(self) -> MeshShape | None:
        """The mesh's axes; None without a mesh."""
        return None if self.mesh is None else MeshShape.parse(self.mesh)

    @property
    def is_auto(self) -> bool:
        """Whether the planner is to choose the plan."""
        return self.plan.stages[0].schedule == "auto"

    @property
    def plan(self) -> Plan:
        """The plan, bound to the model's number of blocks.

        Raises:
          PlanError: The plan does not parse, or does not fit the number of blocks.
        """
        return Plan.parse(self.remat).bind(self.model.num_blocks)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as records hold them: TOML and JSON values, paths absolute.

        Unset fields and permissions are left out.
        """

        def plain(value) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items() if item is not None}
            return list(value) if isinstance(value, tuple) else value

        fields = dataclasses.asdict(self)
        kept = {name: value for name, value in fields.items() if name not in PERMISSIONS}
        return plain(kept | {name: absolute(name, kept[name]) for name in _PATHS})


def absolute(name: str, value: Any) -> Any:
    """Returns the value of a field; a path becomes absolute text."""
    return os.path.abspath(value) if name in _PATHS and value is not None else value


def load_toml(path: Path) -> dict[str, Any]:
    """Returns the flags that a configuration file sets, as `{"batch-size": 16, ...}`.

    Raises:
      ConfigError: No such file, not TOML, an unknown key or table, or a value of another type.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(
            f"cannot read configuration {str(path)!r}: {reason}{_other_files(path)}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration {str(path)!r} is not UTF-8 text") from None
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"configuration {str(path)!r} is not TOML: {error}") from None
    return dict(_flags(tables, TrainConfig, str(path)))


def _other_files(path: Path) -> str:
    """Returns the nearest guess and the list of configuration files, for a missing one."""
    folders = dict.fromkeys(one for one in (path.parent, Path("configs")) if one.is_dir())
    files = [file for folder in folders for file in sorted(folder.glob("*.toml"))]
    names = {str(file): file.stem for file in files if file.name != "pyproject.toml"}
    near = difflib.get_close_matches(path.stem, names.values(), n=1, cutoff=CUTOFF)
    guesses = [name for name, stem in names.items() if stem in near]
    guess = f" (did you mean {guesses[0]!r}?)" if guesses else ""
    return f"{guess}; there are: {', '.join(names)}" if names else ""


def _flags(table: dict[str, Any], owner: type, place: str):
    """Yields `(flag, value)` of every key, in nested tables too."""
    hints = typing.get_type_hints(owner)
    if {"plan", "remat"} <= table.keys():
        raise ConfigError(f"{place} sets plan and remat, which are one setting; keep one of them")
    for key, value in table.items():
        key = "remat" if key == "plan" else key  # as --plan and --remat are one flag
        if key not in hints:
            raise ConfigError(
                f"{place} has an unknown key {key!r}{nearest(key, hints)}; "
                f"valid: {', '.join(hints)}"
            )
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(f"{place}: {key} is a table, written [{key}]")
            yield from _flags(value, hints[key], f"{place} [{key}]")
        else:
            yield flag_of(key, owner), _typed(key, value, inner, place)


def flag_of(key: str, owner: type) -> str:
    """Returns the flag of a field: its own name, or the one its annotation gives it."""
    hint = typing.get_type_hints(owner, include_extras=True)[key]
    names = [name for item in getattr(hint, "__metadata__", ()) for name in item.name or ()]
    return names[0].removeprefix("--") if names else key.replace("_", "-")


def _typed(key: str, value: object, hint, place: str):
    """Returns `value` if it has the field's type; text of a TOML file never becomes a number."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{place}: {key} = {value!r} is no list of text")
        return value
    if isinstance(hint, types.UnionType):  # an optional field
        hint = next(item for item in typing.get_args(hint) if item is not types.NoneType)
    wanted = {"int": int, "float": (int, float), "bool": bool}.get(
        getattr(hint, "__name__", ""), str
    )
    right = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if not right:
        name = getattr(hint, "__name__", "str") if wanted is not str else "str"
        raise ConfigError(
            f"{place}: {key} = {value!r} is {type(value).__name__}, where {name} is needed"
        )
    return value
