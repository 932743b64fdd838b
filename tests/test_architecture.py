"""The house's arrows: no import cycles, packages import only what lies below them, one name for one thing."""

from __future__ import annotations

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    ("sanrt.version", "sanrt.arrays", "sanrt.errors", "sanrt.extras", "sanrt.files", "sanrt.geometry", "sanrt.wording"),
    ("sanrt.model", "sanrt.runtime.host"),
    ("sanrt.kernels",),
    ("sanrt.runtime.pictures", "sanrt.runtime.video"),
    ("sanrt.runtime.artifacts",),
    ("sanrt.runtime.backends",),
    ("sanrt.runtime.tiling",),
    ("sanrt.runtime.runs",),
    ("sanrt.export",),
    ("sanrt",),
)
"""From the bottom up: what a package may import lies below it, or in itself; the longest name that fits counts."""


def modules() -> dict[str, Path]:
    """Every module of the package, by the name that it is imported as."""
    found = {}
    for folder, name in (
        (ROOT / "src" / "sanrt", "sanrt"),
        *((ROOT / p, f"sanrt.{p}") for p in ("export", "kernels", "runtime")),
    ):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The sanrt modules that a file imports, at its top, inside functions, or for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names}
    return found & known


def layer(module: str) -> int:
    fits = [
        (len(name), index) for index, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")
    ]
    return max(fits)[1]


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, set(known)) - {name} for name, path in known.items()}


def test_every_module_is_found_with_what_it_imports(arrows):
    assert len(arrows) > 90
    assert "sanrt.runtime.backends.protocol" in arrows["sanrt.runtime.backends.native"]
    assert "sanrt.export.onnx" in arrows["sanrt.cli.export"]  # inside a function


def test_no_module_imports_itself_by_way_of_others(arrows):
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


def test_packages_import_only_what_lies_below_them(arrows):
    upward = [
        f"{name} -> {other}" for name, used in sorted(arrows.items()) for other in sorted(used) if layer(other) > layer(name)
    ]
    assert not upward, "\n".join(upward)


def test_few_modules_lie_directly_in_runtime():
    assert len(list((ROOT / "runtime").glob("*.py"))) <= 3


def test_one_file_is_called_winograd():
    listed = subprocess.run(["git", "ls-files", "*winograd.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line for line in listed.split() if Path(line).name == "winograd.py"] == ["kernels/cpu/winograd.py"]
