"""What activations take with and without gradient checkpointing: `python benchmarks/checkpointing.py MODEL...`.

For every kind of `gradient_checkpointing`, one forward and one backward pass of the decoder on a CPU: by how much the
process grows until the backward pass, what `uptrain` says beforehand (training/footprint.py), and the time, relative to
that without checkpointing in the same run. Every pass runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from headfuse.config.uptrain import UptrainConfig
from headfuse.models.heap import release_freed_blocks
from headfuse.models.loading import load_model
from headfuse.training.footprint import footprint
from headfuse.training.optimizer import prepare_training

KINDS: tuple[Any, ...] = (False, "selective", True)


def measure(folder: Path, kind: Any, windows: int, length: int) -> dict[str, float]:
    """Megabytes that are kept and that were counted, and the seconds of both passes."""
    recipe = UptrainConfig(
        data={"text": 1.0}, tokens=length, batch_size=windows, sequence_length=length, gradient_checkpointing=kind
    )
    student = load_model(folder, device="cpu", dtype="float32").train()
    prepare_training(student, recipe)
    batch = torch.randint(0, student.config.vocab_size, (windows, length))
    for parameter in student.parameters():
        parameter.sum()  # files are read at the first use
    before = _resident()
    start = time.perf_counter()
    output = student.model(batch).last_hidden_state
    kept = _resident() - before
    output.sum().backward()
    seconds = time.perf_counter() - start
    counted = footprint(student, None, recipe, 1, False).activations
    return {"kept": kept / 1e6, "counted": counted / 1e6, "seconds": seconds}


def _resident() -> int:
    release_freed_blocks()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # of the processes that measure
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.model[0], json.loads(options.kind), options.windows, options.length)))
        return
    print(
        "| model | `gradient_checkpointing` | kept, MB | counted before, MB | time |", "|---|---|---|---|---|", sep="\n"
    )
    sizes = ["--windows", str(options.windows), "--length", str(options.length)]
    for model in options.model:
        first = None
        for kind in KINDS:
            line = [sys.executable, __file__, str(model), *sizes, "--kind", json.dumps(kind)]
            found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
            first = first or found["seconds"]
            figures = f"{found['kept']:,.0f} | {found['counted']:,.0f} | {found['seconds'] / first:.2f}"
            print(f"| {model.name} | `{json.dumps(kind).strip(chr(34))}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
