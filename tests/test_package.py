"""The package as a whole: laziness, layers, the public names, the README's code."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jaxckpt
from tests import test_docs

ROOT = Path(__file__).parents[1]

# A layer may import those before it in this list, and itself.
LAYERS = (
    *("compatibility", "plans", "units", "sources", "schedules", "targets", "transforms"),
    "losses",
    *("costs", "compiled", "absent", "linen", "nnx", "models", "memory", "planner"),
)


def modules(*tops: str) -> dict[str, Path]:
    """Returns the files of some packages by their modules' names."""
    paths = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    name = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return {name(path).removesuffix(".__init__"): path for path in paths}


def imports(path: Path) -> set[str]:
    """Returns all that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def arrows(files: dict[str, Path]) -> dict[str, set[str]]:
    """Returns which modules each module imports, of those that are given."""
    found = {}
    for name, path in files.items():
        whole = {one if one in files else one.rpartition(".")[0] for one in imports(path)}
        found[name] = (whole & files.keys()) - {name}
    return found


def circle(found: dict[str, set[str]]) -> list[str]:
    """Returns modules that import one another in a circle; none if there is no circle."""
    left = dict(found)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]
    return []


def upward(found: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the imports that go from a layer to one after it."""
    floor = lambda name: LAYERS.index(name.split(".")[1])
    pairs = ((name, other) for name, others in found.items() for other in others)
    inside = ((name, other) for name, other in pairs if "jaxckpt" not in (name, other))
    return [(name, other) for name, other in inside if floor(other) > floor(name)]


def test_imports_go_downward():
    found = arrows(modules("jaxckpt"))
    assert upward(found) == []
    assert upward({"jaxckpt.plans.plan": {"jaxckpt.planner.fit"}})  # the check sees one
    folders = {name.split(".")[1] for name in found if "." in name}
    assert folders == set(LAYERS)


def test_no_file_imports_itself_by_a_detour():
    found = arrows(modules("jaxckpt", "experiments", "benchmarks"))
    assert circle(found) == []
    found["jaxckpt.plans.words"] = {"jaxckpt.plans.plan"}
    assert "jaxckpt.plans.words" in circle(found)


def test_the_library_imports_no_command():
    for path in modules("jaxckpt").values():
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"experiments", "benchmarks", "chex", "tests"}, path


@pytest.mark.parametrize("package", ["plans", "schedules", "units"])
def test_some_need_the_standard_library_alone(package):
    for name, path in modules("jaxckpt").items():
        if name.split(".")[1:2] == [package]:
            tops = {one.split(".")[0] for one in imports(path)}
            assert tops <= {"jaxckpt", *sys.stdlib_module_names}, path


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
    assert len(jaxckpt.__all__) <= 24
    for name in jaxckpt.__all__:
        assert getattr(jaxckpt, name) is not None
        assert name in dir(jaxckpt)
    for name, guess in {
        "scan_block": r" \(did you mean 'scan_blocks'\?\)$",
        "remat": "; jaxckpt.checkpoint wraps a function, .* and remat= is an argument of .* scan$",
        "flax": "$",
    }.items():
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'{guess}"):
            getattr(jaxckpt, name)


def test_readme_code_prints_what_is_shown():
    path = ROOT / "README.md"
    text = path.read_text()
    assert sum(bool(shown) for _, shown in test_docs.code_of(text)) == text.count("```python") == 1
    test_docs.run(text, path, types.ModuleType("readme"))
    assert len(text.splitlines()) < 120, "it is read in one go"
