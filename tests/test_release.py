"""A release: sdist and wheel are built, described as PyPI wants it, and work where the checkout is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

import headfuse

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(*command: object, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=variables or None, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE) == [headfuse.__version__]
    assert citation["version"] == headfuse.__version__
    assert re.findall(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[0] == headfuse.__version__


def test_forms_and_workflows_are_yaml() -> None:
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    assert len(files) >= 6
    assert all(isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict) for file in files)
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        named = re.findall(r"\./scripts/\w+\.sh", workflow.read_text(encoding="utf-8"))
        assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, and of the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("release")
    kept = ("pyproject.toml", "README.md", "LICENSE", "headfuse", "configs")
    run("cp", "-r", *(ROOT / name for name in kept), folder, folder=folder)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ".", folder=folder)
    return folder / "dist"


@pytest.mark.slow
def test_pypi_takes_the_descriptions(distributions: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: it comes with the extra dev")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir(), folder=distributions)
    assert said.count("PASSED") == 2


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "headfuse").rglob("*.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert wanted | {"README.md", "LICENSE", "pyproject.toml", "headfuse/data/prose.txt"} <= names


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(distributions: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment, which are too large to be installed again."""
    (wheel,) = distributions.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv/bin"
    run(programs / "python", "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    variables = {"PYTHONPATH": sysconfig.get_path("purelib"), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    place = run(programs / "python", "-c", "import headfuse; print(headfuse.__file__)", folder=tmp_path, **variables)
    assert Path(place.strip()).is_relative_to(tmp_path / "venv")
    assert (
        run(programs / "headfuse", "--version", folder=tmp_path, **variables).strip()
        == f"headfuse {headfuse.__version__}"
    )
    found = json.loads(run(programs / "headfuse", "doctor", "--json", folder=tmp_path, **variables))
    assert found["faults"] == []
    model = ROOT / "examples/mha-6m"
    fused = run(programs / "headfuse", "fuse", model, "--config", "gqa-25", "--dry-run", folder=tmp_path, **variables)
    assert "layout gqa" in fused
