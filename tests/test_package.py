"""The package as a whole: laziness, layers, the public names, the README's code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxckpt

ROOT = Path(__file__).parents[1]

# A package may import those to the left of itself in this list, and itself.
LAYERS = ("plans", "transforms", "memory", "losses", "planner", "linen", "nnx", "models")


def modules(package: str) -> list[Path]:
    path = ROOT / "jaxckpt" / package
    return [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_imports_go_downward(package):
    allowed = LAYERS[: LAYERS.index(package) + 1]
    for path in modules(package):
        if not path.exists():
            continue
        for name in imports(path):
            if name.startswith("jaxckpt."):
                assert name.split(".")[1] in allowed, f"{path} imports {name}"
            assert not name.startswith(("experiments", "chex")), f"{path} imports {name}"


def test_plans_need_the_standard_library_alone():
    for path in modules("plans"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top == "jaxckpt" or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_jax_internals_are_not_touched():
    for path in (ROOT / "jaxckpt").rglob("*.py"):
        assert not any("_src" in name for name in imports(path)), path


def test_plans_and_schedules_do_not_import_jax():
    code = (
        "import sys, jaxckpt\n"
        "jaxckpt.Plan.parse('14xfull/attention').bind(28)\n"
        "jaxckpt.schedules.simulate(jaxckpt.schedules.binomial(32, slots=4))\n"
        "from jaxckpt.models import TransformerConfig\n"
        "print([m for m in ('jax', 'jaxlib', 'flax', 'numpy', 'optax') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_is_there():
    assert len(jaxckpt.__all__) <= 20
    for name in jaxckpt.__all__:
        assert getattr(jaxckpt, name) is not None
        assert name in dir(jaxckpt)
    with pytest.raises(AttributeError, match="has no attribute 'scan_block'"):
        jaxckpt.scan_block  # noqa: B018


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


@pytest.mark.parametrize("code", readme_blocks())
def test_readme_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})
