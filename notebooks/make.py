"""`python notebooks/make.py`: makes each notebook (.ipynb) from its text (.py).

The text is jupytext's percent form: `# %%` begins a cell of code, `# %% [markdown]` one of prose
in comments, and a line `# %pip ...` is a magic. The standard library does for these; a heavy test
compares with jupytext itself. `--check` writes nothing and ends with code 1 if a notebook is not up
to date.

Outputs are kept: a cell of code whose text has not changed has the outputs of the notebook that is
there. `pytest --nbmake --overwrite notebooks/NAME.ipynb` runs a notebook, and this command then writes
it in its own form. The cell that installs has none.

Once pyproject.toml says where the repository is (`[project.urls]`, `Repository`, on GitHub), each
notebook begins with a badge that opens it in Colab, and installs from there.
"""

import argparse
import json
import re
import tomllib
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("train", "will_it_fit", "your_own_block", "out_of_memory")
PROJECT = FOLDER.parent / "pyproject.toml"
_GITHUB = re.compile(r"https://github\.com/(?P<repository>[\w.-]+/[\w-]+)(\.git)?/?")
_CHECKOUT = "SOURCE = pathlib.Path.cwd().parent.as_uri()"
_COLAB = "https://colab.research.google.com"
_FOLDER = re.compile(r"/\S*/ipykernel_\d+/")  # where a kernel puts the text of its cells
_CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", re.MULTILINE)


def notebook(text: str) -> dict:
    """Returns a notebook's JSON values for a text in percent form.

    Raises:
      ValueError: Something stands before the first cell.
    """
    starts = list(_CELL.finditer(text))
    if not starts or starts[0].start():
        raise ValueError("a notebook's text begins with a cell: '# %%' or '# %% [markdown]'")
    ends = [match.start() for match in starts[1:]] + [len(text)]
    cells = [
        _cell(place, text[match.end() : end].strip("\n"), bool(match["markdown"]))
        for place, (match, end) in enumerate(zip(starts, ends, strict=True))
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cell(place: int, body: str, is_markdown: bool) -> dict:
    lines = body.split("\n")
    prefix = r"^# ?" if is_markdown else r"^# (?=%pip )"
    source = "\n".join(re.sub(prefix, "", line) for line in lines).splitlines(keepends=True)
    cell = {"id": f"cell-{place}", "metadata": {}, "source": source}
    if is_markdown:
        return {"cell_type": "markdown", **cell}
    return {"cell_type": "code", "execution_count": None, "outputs": [], **cell}


def repository() -> str | None:
    """Returns `owner/name` of the project's repository on GitHub, None while it has no address.

    Raises:
      ValueError: The address is not one on GitHub, from where Colab could open a notebook.
    """
    project = tomllib.loads(PROJECT.read_text())["project"]
    address = project.get("urls", {}).get("Repository")
    if address is None:
        return None
    found = _GITHUB.fullmatch(address)
    if found is None:
        raise ValueError(
            f"[project.urls] Repository is {address!r}; valid: https://github.com/OWNER/NAME"
        )
    return found["repository"]


def opened_in_colab(text: str, name: str, repository: str) -> str:
    """Returns a notebook's text with a badge above it, which installs from the repository."""
    address = f"{_COLAB}/github/{repository}/blob/main/notebooks/{name}.ipynb"
    badge = f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({address})"
    source = f'SOURCE = "git+https://github.com/{repository}"'
    return f"# %% [markdown]\n# {badge}\n\n{text.replace(_CHECKOUT, source)}"


def text_of(name: str) -> str:
    """Returns the file text of the notebook that `name`.py makes, with the outputs it has now."""
    text, where = (FOLDER / f"{name}.py").read_text(), repository()
    made = notebook(text if where is None else opened_in_colab(text, name, where))
    path = FOLDER / f"{name}.ipynb"
    _keep_outputs(made["cells"], json.loads(path.read_text())["cells"] if path.exists() else [])
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


def _keep_outputs(cells: list[dict], old: list[dict]):
    """Gives cells of code the outputs of old cells with the same text."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = {"".join(cell["source"]): cell.get("outputs", []) for cell in old}
    for number, cell in enumerate(code, start=1):
        source = "".join(cell["source"])
        if "%pip" not in source and outputs.get(source):
            cell["outputs"] = [_lasting(one) for one in outputs[source]]
            cell["execution_count"] = number


def _lasting(output: dict) -> dict:
    """Returns an output without what differs from run to run."""
    count = {"execution_count": None} if "execution_count" in output else {}
    text = {"text": [_FOLDER.sub("", line) for line in output["text"]]} if "text" in output else {}
    return output | count | text


def stale() -> list[Path]:
    """Returns the notebooks that are not what their text makes."""
    paths = {name: FOLDER / f"{name}.ipynb" for name in NAMES}
    return [
        path
        for name, path in paths.items()
        if not path.exists() or path.read_text() != text_of(name)
    ]


def main(argv: list[str] | None = None) -> int:
    """Writes the notebooks, or with `--check` only names those that are out of date."""
    parser = argparse.ArgumentParser(prog="python notebooks/make.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    found = stale()
    for path in found:
        if not check:
            path.write_text(text_of(path.stem))
        print(f"{'out of date' if check else 'written'}: {path.name}")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
