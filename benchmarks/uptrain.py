"""What the loop of `headfuse uptrain` costs: `python benchmarks/uptrain.py FUSED --teacher SOURCE`.

Every step of a real run is followed by a bare one on as many tokens: forward of the teacher, forward and backward of
the student, all logits, no loss, no optimizer. Both are timed by the CPU time of this process, which other processes
disturb less than the clock; the ratio is what to look at.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from headfuse.models.loading import load_model
from headfuse.training.loop import Progress
from headfuse.training.uptrain import uptrain

SKIPPED = 2
"""Steps before the first one that counts: they allocate."""


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", default="default")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    size, length = options.batch_size, options.sequence_length
    torch.set_num_threads(options.threads)
    student = load_model(options.model, device="cpu", dtype="float32").train()
    teacher = load_model(options.teacher, device="cpu", dtype="float32").requires_grad_(False)
    batch = torch.randint(1000, (size, length), generator=torch.Generator().manual_seed(0))
    seconds = {"loop": 0.0, "teacher": 0.0, "student": 0.0}
    last = 0.0

    def bare(progress: Progress) -> None:
        nonlocal last
        step, now = progress.step, time.process_time()
        counts = SKIPPED < step < progress.steps  # the last one writes a state, too
        if counts:
            seconds["loop"] += now - last
        with torch.no_grad():
            teacher(batch, use_cache=False)
        middle = time.process_time()
        logits = student(batch, use_cache=False).logits
        logits.backward(torch.ones_like(logits))
        student.zero_grad()
        last = time.process_time()
        if counts:
            seconds["teacher"] += middle - now
            seconds["student"] += last - middle

    with tempfile.TemporaryDirectory() as name:
        uptrain(
            options.model, teacher=options.teacher, data=options.data, tokens=options.steps * size * length,
            batch_size=size, sequence_length=length, checkpoint_every=options.steps, validation_windows=1,
            device="cpu", threads=options.threads, output=Path(name) / "out", on_progress=bare,
        )  # fmt: skip
    tokens = (options.steps - 1 - SKIPPED) * size * length
    both = seconds["teacher"] + seconds["student"]
    for part, value in (*seconds.items(), ("teacher and student", both)):
        print(f"{part:<20} {tokens / value:8,.0f} tokens per second of CPU time")
    print(f"the loop takes {seconds['loop'] / both:.2f} times as long as teacher and student alone")


if __name__ == "__main__":
    main()
