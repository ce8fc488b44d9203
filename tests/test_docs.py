"""Pages of the documentation that are programs: run from top to bottom, in one namespace.

A page asserts what it says, and shows in a `text` block below its code what the code prints. To add
a page, add its name.
"""

import contextlib
import doctest
import io
import math
import re
import sys
import types
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    *("any_function", "coming_from", "glossary", "index", "layers", "loops", "peak", "planner"),
    *("start", "state", "troubleshooting", "which_call", "your_own_model"),
    *(f"api/{path.stem}" for path in sorted(DOCS.glob("api/*.md"))),
)
_HEAVY = (pytest.param("many_chips", marks=pytest.mark.heavy),)
_QUICK = ("api/plans", "api/schedules", "glossary", "index", "peak")
# Numbers that pages show were printed by this JAX.
PRINTED_BY = "0.10.2"
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<shown>.*?)^```$)?", re.DOTALL | re.MULTILINE
)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_CLOCK = re.compile(r"\S+ (?:us|ms|s)\b")


def code_of(text: str) -> list[tuple[str, str]]:
    """Returns a page's Python blocks and what is shown as printed.

    Each has as many empty lines above it as the page has lines above the block.
    """
    return [
        ("\n" * text.count("\n", 0, match.start("code")) + match["code"], match["shown"] or "")
        for match in _BLOCK.finditer(text)
    ]


def differs(shown: str, printed: str, *, by_number: bool) -> str:
    """Returns how the shown output differs from the printed one; nothing if it does not.

    `...` stands for any lines, and times are not compared.

    Args:
      shown: What the page shows.
      printed: What its code printed.
      by_number: Whether numbers are compared, to a tenth; otherwise any number will do.
    """
    shown, printed = (_CLOCK.sub("TIME", text) for text in (shown, printed))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    words = [_NUMBER.sub("#", text) for text in (shown, printed)]
    if not doctest.OutputChecker().check_output(*words, flags):
        return f"shown:\n{shown}\nprinted:\n{printed}"
    if by_number and "..." not in shown:
        for one, other in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True):
            if not math.isclose(*(float(n.replace(",", "")) for n in (one, other)), rel_tol=0.1):
                return f"{one} is shown, {other} was printed"
    return ""


def run(text: str, path: Path, module: types.ModuleType):
    """Runs a page's blocks one after another in the namespace of `module`.

    Raises:
      AssertionError: A block of the page raises it, or prints something else than the page shows.
    """
    for code, shown in code_of(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(path), "exec"), vars(module))
        found = differs(shown, printed.getvalue(), by_number=jax.__version__ == PRINTED_BY)
        assert not found, f"{path.name}:{code.count(chr(10))}: {found}"


@pytest.mark.parametrize(
    "page",
    [
        *(one if one in _QUICK else pytest.param(one, marks=pytest.mark.slow) for one in PAGES),
        *_HEAVY,
    ],
)
def test_page_runs(page, monkeypatch):
    path = DOCS / f"{page}.md"
    text = path.read_text()
    blocks = code_of(text)
    assert len(blocks) == text.count("```python"), "a block that is not closed, or is indented"
    assert any(shown or "assert " in code for code, shown in blocks), (
        f"{path} claims nothing that can fail"
    )
    module = types.ModuleType(f"docs_{path.stem}")  # classes look for their module by its name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(text, path, module)


def test_a_failing_page_is_seen_at_its_line():
    text = "# A page\n\n```python\na = 1\n```\n```bash\nfalse\n```\n```python\nassert a == 2\n```\n"
    assert [code.strip() for code, _ in code_of(text)] == ["a = 1", "assert a == 2"]
    with pytest.raises(AssertionError) as caught:
        run(text, Path("page.md"), types.ModuleType("page"))
    assert caught.traceback[-1].lineno + 1 == text.split("\n").index("assert a == 2") + 1


def test_an_output_that_is_not_what_is_shown_is_seen():
    page = "```python\nprint('two  bytes', 2_000, 3.5, 'ms')\n```\n\n```text\n{}\n```\n"
    for shown in ("two bytes 2010 9.1 ms", "two bytes 2,000 3.5 ms"):
        run(page.format(shown.replace("2,000", "2000")), Path("page.md"), types.ModuleType("page"))
    for shown in ("three bytes 2000 3.5 ms", "two bytes 2000 3.5", ""):
        with pytest.raises(AssertionError, match=r"was printed|printed:"):
            run(page.format(shown), Path("page.md"), types.ModuleType("page"))
    assert differs("2000 bytes", "3000 bytes", by_number=True) == "2000 is shown, 3000 was printed"
    assert not differs("2000 bytes", "3000 bytes", by_number=False)
    assert not differs("a\n...\n", "a\nb\nc\n", by_number=True)
