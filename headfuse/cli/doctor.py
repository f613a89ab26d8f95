"""`headfuse doctor`: versions, devices, memory, extras and the most common faults on one screen."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from headfuse import __version__, choices
from headfuse.cli import options
from headfuse.cli.execute import Document, execute
from headfuse.cli.say import say
from headfuse.models.host_memory import free_host_bytes

SHOWN = ("torch", "transformers", "safetensors", "accelerate", "datasets", "huggingface_hub")
"""Required packages whose versions are shown."""
EXTRAS = {"tasks": "lm-eval", "gguf": "gguf", "lora": "peft", "trackers": "tensorboard"}
"""Extra -> the package that it brings."""
_INSTALL = "install a torch build for this machine and its driver: https://pytorch.org/get-started/locally"
Fault = dict[str, str]
"""`what` is wrong, and the `fix`."""


def doctor(json_output: options.Json = False, quiet: options.Quiet = False, verbose: options.Verbose = False) -> None:
    """Show versions, devices, memory and extras, and any faults in them. Exit code 1 if something is."""
    found = Document()

    def work() -> Document:
        found.update(examine())
        return found

    execute(work, render, json_output, quiet, verbose)
    if found["faults"]:
        raise typer.Exit(1)


def examine() -> Document:
    """Collect facts about the machine and the environment."""
    devices, faults = _devices()
    return {
        "schema_version": 1,
        "command": "doctor",
        "output": None,
        "headfuse": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in SHOWN},
        "extras": {extra: _version(name) for extra, name in EXTRAS.items()},
        "devices": devices,
        "memory_bytes": _memory(),
        "disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "faults": [*_package_faults(), *device_faults(devices), *faults],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[list[dict[str, Any]], list[Fault]]:
    """What torch can compute on, with the memory of each GPU, and how fast each multiplies matrices; and the faults.

    A speed is None where the device does not compute.
    """
    faults = list[Fault]()
    with _as_fault(faults, "torch does not load", _INSTALL):
        import torch
    if faults:
        return [], faults
    from headfuse.models import speed

    found: list[dict[str, Any]] = [{"name": "cpu", "kind": f"{os.cpu_count()} cores", "memory_bytes": None}]
    for index in range(torch.cuda.device_count()):
        found.append({"name": f"cuda:{index}", "kind": "NVIDIA GPU", "memory_bytes": None})
        with _as_fault(faults, f"cuda:{index} does not answer", _INSTALL):
            gpu = torch.cuda.get_device_properties(index)
            found[-1] |= {"kind": gpu.name, "memory_bytes": gpu.total_memory}
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "kind": "Apple GPU", "memory_bytes": None})
    for device in found:
        speeds = device["flops"] = dict.fromkeys(get_args(choices.ComputeDtype))
        for dtype in speeds:
            what = f"{device['name']} does not multiply in {dtype}"
            with _as_fault(faults, what, f"free its memory, or {_INSTALL}"):
                speeds[dtype] = speed.measured_speed(torch.device(device["name"]), dtype)
    return found, faults


@contextlib.contextmanager
def _as_fault(faults: list[Fault], what: str, fix: str) -> Iterator[None]:
    """Turn an error into a fault, so that the report goes on; the first line of its message says enough."""
    try:
        yield
    except Exception as error:  # those of drivers and of libraries are of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        faults.append({"what": f"{what}: {reason}", "fix": fix})


def _memory() -> dict[str, int] | None:
    """Main memory in bytes: all of it, and what is free for a new process, within limits of its container."""
    available = free_host_bytes()
    if available is None:
        return None
    import psutil

    return {"total": psutil.virtual_memory().total, "available": available}


def _package_faults() -> list[Fault]:
    """Required packages that are missing, or outside the versions that headfuse works with."""
    from packaging.requirements import Requirement  # comes with transformers

    try:
        required = metadata.requires("headfuse") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []
    faults = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted, version = requirement.name, requirement.specifier, _version(requirement.name)
        if version is None or not wanted.contains(version, prereleases=True):
            what = f"{name} is {version or 'missing'}; headfuse needs {name}{wanted}"
            faults.append({"what": what, "fix": f"pip install '{name}{wanted}'"})
    return faults


def device_faults(devices: list[dict[str, Any]]) -> list[Fault]:
    """An NVIDIA GPU that torch does not see."""
    if not Path("/dev/nvidia0").exists() or any(device["name"].startswith("cuda") for device in devices):
        return []
    return [
        {
            "what": f"this machine has an NVIDIA GPU, but torch {_version('torch')} does not see it",
            "fix": _INSTALL,
        }
    ]


def render(document: Mapping[str, Any], console: Console) -> None:
    """Print one screen."""
    table = Table.grid(padding=(0, 2))
    system = f"{document['headfuse']} on Python {document['python']}, {document['system']}"
    table.add_row("headfuse", system)
    for name, version in document["versions"].items():
        table.add_row(name, version or "missing")
    for device in document["devices"]:
        memory = f", {device['memory_bytes'] / 1e9:.1f} GB" if device["memory_bytes"] else ""
        table.add_row(device["name"], device["kind"] + memory)
        speeds = (f"{speed / 1e12:.2g} in {d}" if speed else f"failed in {d}" for d, speed in device["flops"].items())
        table.add_row("", "products, TFLOP/s: " + ", ".join(speeds))
    memory = document["memory_bytes"]
    if memory:
        table.add_row("memory", f"{memory['available'] / 1e9:.1f} GB free of {memory['total'] / 1e9:.1f} GB")
    table.add_row("disk", f"{document['disk_bytes'] / 1e9:.1f} GB free in this folder")
    for extra, version in document["extras"].items():
        table.add_row(f"extra {extra}", version or f"not installed: pip install 'headfuse[{extra}]'")
    console.print(table, highlight=False)
    for fault in document["faults"]:
        say(console, f"fault: {fault['what']}")
        say(console, f"  {fault['fix']}")
    if not document["faults"]:
        console.print("No faults found.")
