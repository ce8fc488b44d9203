"""What every figure here shares: matplotlib when it is there, colours, files written whole."""

from collections.abc import Callable
from pathlib import Path

from experiments.config import ConfigError
from jaxckpt.plans.errors import nearest

# The colours of Okabe and Ito (2008), told apart with every kind of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK)
FIGURES = (".svg", ".png")


def import_matplotlib():
    """Returns `matplotlib`, drawing to files alone.

    Raises:
      ConfigError: It is not installed.
    """
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]  an extra
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'jaxckpt[plot]'") from None
    # Text of an SVG stays text, and the same figure is the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "jaxckpt"})
    return matplotlib


def check_output(path: Path, suffixes: tuple[str, ...]):
    """Raises unless a file can be written there, in a form that is known.

    Raises:
      ConfigError: Another ending, no such folder, or a folder where the file would be.
    """
    if path.suffix.lower() not in suffixes:
        guess = nearest(path.suffix, suffixes) if path.suffix else ""
        raise ConfigError(
            f"{str(path)!r} ends in {path.suffix or 'nothing'!r}{guess}; valid: "
            f"{', '.join(suffixes)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{str(path)!r}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder; name a file")


def save(figure, path: Path):
    """Writes a figure as PNG or SVG, the whole of it or nothing."""
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    _whole(path, lambda part: figure.savefig(part, format=kind, metadata=metadata, dpi=150))


def write_text(path: Path, text: str):
    """Writes a text file, the whole of it or nothing."""
    _whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _whole(path: Path, write: Callable[[Path], object]):
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from None
