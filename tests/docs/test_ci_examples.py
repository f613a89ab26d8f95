"""The examples of docs/guides/ci.md, run as they are: a good model passes, a bad one is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.support.tiny_models import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples/ci"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tiny_model(tmp_path / "model")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in (("headfuse", f'exec {sys.executable} -m headfuse "$@"'), ("pip", ":")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    small = {"SAMPLES": "4", "SEQUENCE_LENGTH": "32", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent.parent)}
    return {**os.environ, **small, "PATH": f"{programs}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": ""}


FUSE = "--budget 0.5 --preset fast --samples 8 --sequence-length 32"


@pytest.mark.long
def test_the_script_refuses_a_bad_model(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = ["model", "text.txt", "text.txt", "compressed", *FUSE.split()]
    environment["GATES"] = "kv_ratio<=0.5,ppl_ratio<=0.5"
    script = [str(EXAMPLES / "release.sh"), *arguments]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "gates failed: ppl_ratio<=0.5" in done.stderr
    assert not list(tmp_path.glob("compressed*"))
    suite = ElementTree.parse(tmp_path / "reports/junit.xml").getroot()
    assert [len(case.findall("failure")) for case in suite.iter("testcase")] == [0, 1]
    assert "ppl_ratio&lt;=0.5" in (tmp_path / "reports/report.html").read_text()


@pytest.mark.long
def test_the_workflow_compresses_a_good_model(tmp_path: Path, environment: dict[str, str]) -> None:
    job = yaml.safe_load((EXAMPLES / "compress.yml").read_text())["jobs"]["compress"]
    shutil.copytree(EXAMPLES, tmp_path / "examples/ci")
    environment |= job["env"]
    environment |= {"CALIBRATION": "text.txt", "TEST": "text.txt", "OPTIONS": FUSE, "GITHUB_STEP_SUMMARY": "summary.md"}
    environment["GATES"] = "kv_ratio<=0.5,ppl_ratio<=1000"
    for step in job["steps"]:
        if "run" in step:
            command = ["bash", "-eo", "pipefail", "-c", step["run"]]  # as GitHub's runners call it
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    assert (tmp_path / "compressed/config.json").is_file()
    assert (tmp_path / "compressed.tar").is_file()
    assert "| `kv_ratio<=0.5` | passed |" in (tmp_path / "summary.md").read_text()
