"""The documentation builds: no broken link, no page that nothing leads to."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    mkdocs = shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("mkdocs is not installed: pip install 'headfuse[docs]', or ./scripts/docs.sh")
    command = [mkdocs, "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "headfuse_format" not in done.stdout
    assert "Fuse the heads of a model" in (tmp_path / "site/reference/commands/index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a page that nothing leads to", "a broken link"])
def test_a_fault_stops_the_build(tmp_path: Path, fault: str) -> None:
    for name in ("docs", "headfuse"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    if fault == "a broken link":
        page = tmp_path / "docs/index.md"
        page.write_text(page.read_text() + "\n[nowhere](absent.md)\n")
    else:
        (tmp_path / "docs/orphan.md").write_text("# Alone\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0
