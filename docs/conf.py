"""Sphinx's configuration: `sphinx-build -W docs docs/_build` (pip install -e '.[docs]')."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks.pages, and jaxckpt where it is not installed

import jaxckpt  # noqa: E402
from benchmarks import pages  # noqa: E402

project = "jaxckpt"
author = copyright = "the jaxckpt authors"
version = release = jaxckpt.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are run by .ci/full, on Colab's versions
exclude_patterns = ["_build", "notebooks/README.md"]

# Docstrings speak of code in single backticks, as Markdown does.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signature's docstring, with shapes and units

html_theme = "sphinx_book_theme"
html_title = "jaxckpt"
# One search, beside each page; by default there is one above it too.
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
html_sidebars = {
    "**": [
        "navbar-logo.html",
        "icon-links.html",
        "search-button-field.html",
        "sbt-sidebar-nav.html",
    ]
}
urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
if "Repository" in urls:
    html_theme_options |= {
        "repository_url": urls["Repository"],
        "path_to_docs": "docs",
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
    }


def setup(app):
    """Makes the tables of every page anew from their data."""
    app.connect("source-read", _fill)


def _fill(app, docname: str, source: list[str]):
    source[0] = pages.filled(source[0])
