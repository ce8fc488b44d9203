"""Notebooks: the .ipynb is what its text makes, as jupytext would make it."""

import json

import pytest

from notebooks import make


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def test_notebooks_are_what_their_text_makes():
    assert make.stale() == [], "python notebooks/make.py writes them anew"
    assert sorted(make.NAMES) == sorted(p.stem for p in make.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", make.NAMES)
def test_a_notebook_installs_with_one_line_and_claims_something(name):
    notebook = json.loads((make.FOLDER / f"{name}.ipynb").read_text())
    code = [source for kind, source in cells(notebook) if kind == "code"]
    installs = [line for source in code for line in source.split("\n") if line.startswith("%pip")]
    assert len(installs) == 1 and "jaxckpt" in installs[0]
    assert any("assert " in source for source in code)


@pytest.mark.parametrize("name", make.NAMES)
def test_outputs_are_kept(name):
    """Of cells that print or draw, none of them an error, and none of the cell that installs."""
    for cell in json.loads((make.FOLDER / f"{name}.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shows = "\nprint(" in source or source.startswith("print(") or "tight_layout" in source
            assert bool(cell["outputs"]) >= shows, source
            assert not cell["outputs"] or "%pip" not in source
            assert all(one["output_type"] != "error" for one in cell["outputs"])


def test_outputs_are_of_their_own_cells(monkeypatch, tmp_path):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    path = tmp_path / "one.ipynb"
    (tmp_path / "one.py").write_text("# %%\nprint(1)\n# %%\nprint(2)\n")
    shown = {"output_type": "stream", "name": "stdout", "text": ["/home/me/ipykernel_1/2.py:3\n"]}
    ran = json.loads(make.text_of("one"))
    ran["cells"][0] |= {"outputs": [shown], "execution_count": 7, "metadata": {"execution": {}}}
    path.write_text(json.dumps(ran))
    first, second = json.loads(make.text_of("one"))["cells"]
    assert (first["outputs"], first["execution_count"], first["metadata"]) == (
        [shown | {"text": ["2.py:3\n"]}],
        1,
        {},
    )
    assert second["outputs"] == []
    (tmp_path / "one.py").write_text("# %%\nprint(3)\n# %%\nprint(2)\n")
    assert all(cell["outputs"] == [] for cell in json.loads(make.text_of("one"))["cells"])


@pytest.mark.parametrize("name", make.NAMES)
def test_the_first_cell_says_what_to_do_outside_of_a_checkout(name, monkeypatch, tmp_path):
    source = next(s for k, s in cells(json.loads(make.text_of(name))) if "%pip" in s)
    code = "\n".join(line for line in source.split("\n") if not line.startswith("%pip"))
    monkeypatch.chdir(make.FOLDER)
    exec(code, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"not in a checkout of jaxckpt; .*set SOURCE"):
        exec(code, {})


def test_a_changed_text_is_seen(monkeypatch, tmp_path):
    for name in make.NAMES:
        for ending in ("py", "ipynb"):
            text = (make.FOLDER / f"{name}.{ending}").read_text()
            (tmp_path / f"{name}.{ending}").write_text(text)
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    assert make.stale() == []
    text = (tmp_path / "train.py").read_text()
    (tmp_path / "train.py").write_text(text.replace("STEPS = 60", "STEPS = 61"))
    assert make.stale() == [tmp_path / "train.ipynb"]
    assert make.main(["--check"]) == 1 and make.stale()
    assert make.main([]) == 0 and make.stale() == []


def test_text_before_the_first_cell_is_refused():
    with pytest.raises(ValueError, match="begins with a cell"):
        make.notebook("import jax\n# %%\nprint(1)\n")


@pytest.mark.parametrize("name", make.NAMES)
def test_a_repository_with_an_address_has_badges(name, monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project.urls]\nRepository = "https://github.com/someone/jaxckpt"\n')
    monkeypatch.setattr(make, "PROJECT", project)
    badge, *rest = cells(json.loads(make.text_of(name)))
    assert badge[0] == "markdown" and badge[1].startswith("[![Open in Colab](https://colab.")
    assert f"/github/someone/jaxckpt/blob/main/notebooks/{name}.ipynb)" in badge[1]
    plain = cells(make.notebook((make.FOLDER / f"{name}.py").read_text()))
    assert len(rest) == len(plain)
    changed = [source for source in rest if source not in plain]
    assert len(changed) == 1  # the cell that installs
    assert 'SOURCE = "git+https://github.com/someone/jaxckpt"' in changed[0][1]


def test_an_address_that_colab_cannot_open_is_refused(monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text('[project.urls]\nRepository = "https://example.org/jaxckpt"\n')
    monkeypatch.setattr(make, "PROJECT", project)
    with pytest.raises(ValueError, match=r"example\.org/jaxckpt'; valid: https://github\.com/"):
        make.text_of("train")


@pytest.mark.heavy
@pytest.mark.parametrize("name", make.NAMES)
def test_jupytext_makes_the_same_cells(name):
    jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[notebooks]'")
    want = jupytext.read(make.FOLDER / f"{name}.py", fmt="py:percent")
    assert cells(make.notebook((make.FOLDER / f"{name}.py").read_text())) == cells(want)
