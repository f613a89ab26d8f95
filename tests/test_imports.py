"""Imports go one way, and only the work itself pays for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import headfuse

PACKAGE = Path(headfuse.__file__).parent
# A room imports only from rooms above its own line.
ORDER = [
    ["errors", "choices", "estimates"],
    ["plan_checks"],
    ["plan", "modeling"],
    ["config", "checkpoint"],
    ["text"],
    ["models"],
    ["fusion", "layouts"],
    ["planning", "reporting", "evaluation"],
    ["training"],
    ["dha"],
    ["conversion"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Modules that a module imports, at its top or inside a function; what only a type checker sees is left out."""
    path, found = MODULES[name], set[str]()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source)
    return found


def own(name: str) -> set[str]:
    """The modules of this package that a module imports; the root holds only the version and lazy names."""
    return {other for other in imports(name) if other in MODULES and other != "headfuse"}


def unit(name: str) -> str:
    return name.split(".")[1]


def test_imports_go_one_way() -> None:
    inner = MODULES.keys() - {"headfuse"}
    assert {unit(name) for name in inner} == LEVEL.keys(), "every room has its place in ORDER"
    wrong = [
        f"{name} imports {other}"
        for name in inner
        for other in own(name)
        if unit(name) != unit(other) and LEVEL[unit(other)] >= LEVEL[unit(name)]
    ]
    assert not wrong


def test_no_cycles() -> None:
    assert tuple(TopologicalSorter({name: own(name) for name in MODULES}).static_order())


def test_one_room_opens_weight_files() -> None:
    users = {name for name in MODULES if any(other.split(".")[0] == "safetensors" for other in imports(name))}
    assert {unit(name) for name in users} == {"checkpoint"}


def test_fusion_sees_tensors_alone() -> None:
    """No files and no transformers: the mathematics can be checked on small matrices."""
    for name in (name for name in MODULES if name.startswith("headfuse.fusion")):
        used = imports(name)
        assert not any(other.startswith(("headfuse.checkpoint", "headfuse.text", "transformers")) for other in used), (
            name
        )


def test_shipped_model_code_needs_only_torch_and_transformers() -> None:
    shipped = [name for name in MODULES if name.startswith("headfuse.modeling.")]
    assert shipped
    for name in shipped:
        roots = {other.split(".")[0] for other in imports(name) if not other.startswith("headfuse.modeling.")}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "transformers"}, name


LIGHT = ", ".join(
    f"headfuse.{name}"
    for name in (
        "errors",
        "choices",
        "estimates",
        "plan",
        "planning.budget",
        "config.fuse",
        "evaluation.gates",
        "evaluation.ci_reports",
        "reporting.report",
        "checkpoint.plan_file",
    )
)


@pytest.mark.parametrize(
    "command",
    [
        f"import headfuse, {LIGHT}",
        "from headfuse.cli.app import app; app(['--help'])",
        "from headfuse.cli.app import app; app(['doctor', '--help'])",
    ],
)
def test_light_imports_and_help_load_no_torch(command: str) -> None:
    script = f"""
import sys
try:
    {command}
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "transformers", "datasets", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_of_the_package_is_shipped() -> None:
    """A wheel holds only the data files that pyproject.toml names."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["headfuse"]
    data = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert data
    assert not {str(path.relative_to(PACKAGE)) for path in data if path not in shipped}


def test_every_name_of_the_package_is_there() -> None:
    assert all(callable(getattr(headfuse, name)) for name in headfuse.__all__ if name != "__version__")
