"""Pages of the documentation that are programs: run from top to bottom, in one namespace.

A page asserts what it says. To add one, add its name.
"""

import re
import sys
import types
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("layers", "loops", "peak", "planner", "start", "your_own_model")
_HEAVY = (pytest.param("many_chips", marks=pytest.mark.heavy),)
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def code_of(text: str) -> list[str]:
    """Returns a page's Python blocks, each below as many empty lines as it has lines above."""
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1] for match in _BLOCK.finditer(text)
    ]


def run(text: str, path: Path, module: types.ModuleType):
    """Runs a page's blocks one after another in the namespace of `module`."""
    for code in code_of(text):
        exec(compile(code, str(path), "exec"), vars(module))


@pytest.mark.parametrize("page", [*PAGES, *_HEAVY])
def test_page_runs(page, monkeypatch):
    path = DOCS / f"{page}.md"
    text = path.read_text()
    blocks = code_of(text)
    assert len(blocks) == text.count("```python"), "a block that is not closed, or is indented"
    assert any("assert " in block for block in blocks), f"{path} claims nothing that can fail"
    module = types.ModuleType(f"docs_{page}")  # classes look for their module by its name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(text, path, module)


def test_a_failing_page_is_seen_at_its_line():
    text = "# A page\n\n```python\na = 1\n```\n```bash\nfalse\n```\n```python\nassert a == 2\n```\n"
    assert [code.strip() for code in code_of(text)] == ["a = 1", "assert a == 2"]
    with pytest.raises(AssertionError) as caught:
        run(text, Path("page.md"), types.ModuleType("page"))
    assert caught.traceback[-1].lineno + 1 == text.split("\n").index("assert a == 2") + 1
