"""What all figures share: matplotlib, if it is installed, and colours."""

import io
from pathlib import Path

from experiments import files
from experiments.config import ConfigError

# The colours of Okabe and Ito (2008), told apart with every kind of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK)
FIGURES = (".svg", ".png")


def import_matplotlib():
    """Returns `matplotlib`, drawing to files alone; raises `ConfigError` without it."""
    matplotlib = files.import_extra("matplotlib", "figures need matplotlib", "plot")
    # Text of an SVG stays text, and the same figure is the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "jaxckpt"})
    return matplotlib


def save(figure, path: Path):
    """Writes a whole figure as PNG or SVG, or nothing; raises `ConfigError` if it cannot."""
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None, "Creator": files.MARK} if kind == "svg" else {"Software": files.MARK}
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata=metadata, dpi=150)
    try:
        files.write_whole(path, drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {files.reason(error)}") from None
