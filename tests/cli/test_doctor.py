"""`headfuse doctor`: one screen, a document, and an exit code for scripts."""

from __future__ import annotations

import builtins
import json
import re
from importlib import metadata
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headfuse.cli import doctor
from headfuse.cli.app import app
from headfuse.models import speed
from tests.support.commands import run


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of packages that stand in for the installed ones."""
    other: dict[str, str] = {}
    installed = metadata.version

    def version(name: str) -> str:
        if other.get(name) == "missing":
            raise metadata.PackageNotFoundError(name)
        return other.get(name) or installed(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    return other


def test_all_is_on_one_screen() -> None:
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"}).output
    assert len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 80
    assert f"torch            {metadata.version('torch')}" in shown
    assert "GB free in this folder" in shown
    assert re.search(r"products, TFLOP/s: [\d.e-]+ in float32, [\d.e-]+ in bfloat16", shown)


def test_packages_outside_the_versions_that_work_are_faults(versions: dict[str, str]) -> None:
    versions["transformers"] = "4.40.0"
    versions["filelock"] = "missing"
    document = json.loads(run("doctor", "--json", code=1))
    first, second = sorted(document["faults"], key=lambda fault: str(fault["what"]))
    assert first["what"].startswith("filelock is missing; headfuse needs filelock>=")
    assert second["what"].startswith("transformers is 4.40.0; headfuse needs transformers")
    assert second["fix"].startswith("pip install 'transformers")
    assert "fault: transformers is 4.40.0" in run("doctor", code=1)


def test_a_gpu_that_torch_does_not_see_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"name": "cpu", "kind": "2 cores", "memory_bytes": None}
    gpu = {"name": "cuda:0", "kind": "an NVIDIA GPU", "memory_bytes": 80 * 10**9}
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    assert "does not see it" in doctor.device_faults([cpu])[0]["what"]
    assert doctor.device_faults([cpu, gpu]) == []


def test_a_device_that_does_not_compute_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for which torch has no kernels, or a full one; the rest of the report stays."""

    def measured(device: torch.device, dtype: str) -> float:
        if dtype == "bfloat16":
            raise RuntimeError("CUDA error: no kernel image is available\nSearch for it in the manual")
        return 1e12

    monkeypatch.setattr(speed, "measured_speed", measured)
    document = json.loads(run("doctor", "--json", code=1))
    assert document["devices"][0]["flops"] == {"float32": 1e12, "bfloat16": None}
    (fault,) = (fault for fault in document["faults"] if "cpu" in fault["what"])
    assert fault["what"] == "cpu does not multiply in bfloat16: CUDA error: no kernel image is available"
    said = run("doctor", code=1)
    assert "products, TFLOP/s: 1 in float32, failed in bfloat16" in said
    assert "fault: cpu does not multiply in bfloat16" in said
    assert "GB free in this folder" in said


def test_a_torch_that_does_not_load_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    document = json.loads(run("doctor", "--json", code=1))
    assert document["devices"] == []
    assert "torch does not load: libcudart.so.12" in document["faults"][-1]["what"]
    assert f"torch            {metadata.version('torch')}" in run("doctor", code=1)


def test_extras_that_are_not_there_are_shown_and_no_fault(versions: dict[str, str]) -> None:
    before: list[Any] = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["faults"]
    versions["peft"] = "missing"
    document = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert document["extras"]["lora"] is None
    assert document["faults"] == before
    assert "pip install 'headfuse[lora]'" in CliRunner().invoke(app, ["doctor"]).output
