"""The report as one HTML file: a template, its style and its scripts, and the rows as JSON.

Data never becomes markup: it is JSON in a block that no browser runs, with every `<`, `>` and `&`
escaped, and the scripts set text alone. A content security policy names the hashes of the style
and the script, so that nothing else in the file could run or be fetched.
"""

import base64
import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.files import MARK
from experiments.reporting.groups import Group, Line
from experiments.reporting.reading import Found

_FILES = Path(__file__).parent / "files"
_SCRIPTS = ("svg.js", "charts.js", "page.js")


def page(found: Found, groups: Sequence[Group], lines: Sequence[Line], title: str) -> str:
    """Returns the file's text."""
    style = _file("page.css")
    script = '"use strict";\n' + "\n".join(map(_file, _SCRIPTS))
    parts = {
        "@MARK@": MARK,
        "@TITLE@": html.escape(title),
        "@POLICY@": _policy(style, script),
        "@STYLE@": style,
        "@SCRIPT@": script,
        "@DATA@": _json(found, groups, lines),
    }
    # In one pass, so that nothing in a part can be taken for a mark.
    return re.sub("@[A-Z]+@", lambda mark: parts[mark[0]], _file("page.html"))


def _file(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _json(found: Found, groups: Sequence[Group], lines: Sequence[Line]) -> str:
    content = {
        "groups": [dataclasses.asdict(group) for group in groups],
        "lines": [dataclasses.asdict(line) for line in lines],
        "failed": found.failed,
        "skipped": found.skipped,
    }
    text = json.dumps(content, allow_nan=False)  # ASCII, so no separator that ends a line of code
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
