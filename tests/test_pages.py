"""The documentation's pages: their tables, what they have to name, and the build of the site."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxckpt
from benchmarks import pages, tables

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def urls(project: Path) -> dict[str, str]:
    return tomllib.loads(project.read_text())["project"].get("urls", {})


def codes_of_findings() -> set[str]:
    """Returns the code of every `Finding(...)` that the library can make."""
    found = set()
    for path in (ROOT / "jaxckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                found.update(k.value.value for k in node.keywords if k.arg == "code")
    return found


def test_tables_are_what_their_data_says():
    assert pages.stale() == [], "python -m benchmarks.pages writes them anew"
    used = re.findall(r"<!-- table: (\S+) -->", "".join(p.read_text() for p in DOCS.glob("*.md")))
    assert sorted(used) == sorted(pages.TABLES)


def test_a_changed_number_makes_its_page_stale(monkeypatch, tmp_path):
    record = tables.load("peaks_h100.json")
    assert "| 9.99 | 107.7 |" in page("choose")
    record["rows"][4]["seconds"] *= 1.01  # `full`
    monkeypatch.setattr(tables, "load", lambda name: record)
    assert "| 9.99 | 108.8 |" in tables.plans()
    (tmp_path / "choose.md").write_text(page("choose"))
    monkeypatch.setattr(pages, "filled", lambda text: text.replace("107.7", "108.8"))
    assert pages.stale(tmp_path) == [tmp_path / "choose.md"]


def test_every_target_has_a_row_with_its_source():
    text = page("targets")
    for chip in tables.CHIPS.values():
        assert text.count(f"| `{chip.name}` |") == 2 and chip.source in text


def test_a_table_that_nobody_makes_is_named():
    text = "<!-- table: targtes -->\n<!-- end table -->"
    with pytest.raises(ValueError, match=r"no table 'targtes'.*did you mean 'targets'"):
        pages.filled(text)
    with pytest.raises(ValueError, match="begun and not ended"):
        pages.filled(text.split("\n")[0])


def test_plans_to_choose_from_are_in_the_order_of_their_measured_times_and_peaks():
    table = page("choose").split("| need |")[1].split("\n\n")[0]
    rows = tables.load("peaks_h100.json")["rows"]
    rows = {row["plan"]: row for row in rows if (row["batch_size"], row["seq_len"]) == (8, 1024)}
    named = [plan for plan in re.findall(r"`([^`]+)`", table) if plan in rows]
    assert len(named) >= 5
    seconds = [rows[plan]["seconds"] for plan in named]
    peaks = [rows[plan]["runtime_bytes"] for plan in named]
    assert seconds == sorted(seconds) and peaks == sorted(peaks, reverse=True)


def test_every_finding_has_its_cure():
    codes = codes_of_findings()
    assert len(codes) >= 6
    assert set(re.findall(r"^### `([a-z-]+)`", page("peak"), re.MULTILINE)) == codes


def texts_of_the_code() -> str:
    """Returns every text in the sources of the library and its programs, a line each."""
    nodes = (
        node
        for top in ("jaxckpt", "experiments")
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )
    return "\n".join(
        node.value for node in nodes if isinstance(node, ast.Constant) and type(node.value) is str
    )


def test_every_error_in_the_troubleshooting_is_one_that_is_printed():
    """By its section's output, which `test_docs` compares with the code's, or by the sources."""
    sections = re.split(r"^### ", page("troubleshooting"), flags=re.MULTILINE)[1:]
    quoted = [section for section in sections if re.match(r"`[^`]+`\n", section)]
    assert len(quoted) >= 15
    texts = texts_of_the_code()
    for section in quoted:
        error = section[1 : section.index("`", 1)]
        shown = "".join(re.findall(r"```text\n(.*?)```", section, re.DOTALL))
        assert error in shown or error in texts or hasattr(jax.errors, error), error


def test_plans_of_the_documentation_are_plans():
    others = {"sqrtt", "..."}  # shown as an error; any plan
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    plans = set(re.findall(r'remat="([^"]+)"|--(?:remat|plan)=?[ "]?([\w:@,*+/.-]+)', text))
    plans = {plan for pair in plans for plan in pair if plan} - others
    assert len(plans) > 15
    for plan in plans:
        jaxckpt.Plan.parse(plan)


def test_every_public_name_is_in_the_api():
    text = "".join(path.read_text() for path in DOCS.glob("api/*.md"))
    for name in jaxckpt.__all__:
        assert re.search(rf"^\.\. auto\w+:: jaxckpt\.{name}\b", text, re.MULTILINE), name


def test_every_page_is_in_the_table_of_contents():
    tables = re.findall(r"```{toctree}\n(.*?)```", page("index") + page("api"), re.DOTALL)
    listed = [line for table in tables for line in table.split("\n") if line and line[0] != ":"]
    there = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    there |= {f"api/{path.stem}" for path in DOCS.glob("api/*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == there


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS.rglob("*.md")], ids=lambda p: p.stem)
def test_links_and_records_are_there(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)
    records = [(name, "") for name in re.findall(r"`(measured/\w+\.json)`", text)]
    for name, anchor in (*links, *records):
        there = path.parent / name if name else path
        assert there.exists(), name
        assert not anchor or anchor in anchors(there), f"{name}#{anchor}"


def test_pages_say_what_the_field_says():
    """Words of the checkout's own dialect, of which the field has plain ones."""
    for path in (*DOCS.glob("*.md"), *DOCS.glob("api/*.md")):
        if path.stem != "claims":  # written by a command
            text = re.sub(r"```.*?```|<!-- .*?<!-- end", "", path.read_text(), flags=re.DOTALL)
            found = re.findall(r"\brun again\b|not there\b|spares?\b|computed again", text)
            assert not found, (path.name, found)


def test_the_planners_page_is_short():
    assert len(page("planner").split()) < 900


@pytest.mark.heavy
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx_book_theme", reason="pip install -e '.[docs]'")
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for group, name in (("stacks", "scan_blocks"), ("memory", "measure"), ("planner", "fit")):
        assert f"jaxckpt.{name}" in (tmp_path / "api" / f"{group}.html").read_text()
    index = (tmp_path / "index.html").read_text()
    assert len(re.findall(r"<button[^>]*search-button-field", index)) == 1
    assert ("repository-button" in index) == ("Repository" in urls(ROOT / "pyproject.toml"))
    assert "Google Cloud, TPU v5e" in (tmp_path / "targets.html").read_text()
    assert json.loads((ROOT / "notebooks" / "train.ipynb").read_text())["cells"]
    assert (tmp_path / "notebooks" / "train.html").exists()
