"""What fusing costs on tasks: `python benchmarks/tasks.py --model NAME=FOLDER --tasks-path TASKS --data TRAIN`.

One row per model and conversion: it is fused as benchmarks/quality.py fuses it, or it is a folder that was fused so
(`--fused`), and `headfuse eval --tasks standard` compares it with its source, question by question (`--tasks`: others).
The tasks come from scripts/get_tasks.py. Rows are appended to benchmarks/results/tasks.jsonl, and those that are there
are not run again; benchmarks/overview.py shows them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quality import layout_options
from quality_page import CONVERSIONS, KEY

PROGRAM = str(Path(sys.executable).with_name("headfuse"))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", required=True, help="NAME=FOLDER")
    parser.add_argument("--budget", nargs="+", default=["1/2"])
    parser.add_argument("--layout", nargs="+", default=["latent"])
    parser.add_argument("--conversion", nargs="+", default=["balanced"], choices=CONVERSIONS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--options", default="", help="more options of headfuse fuse, such as '--random-tokens 1/4'")
    parser.add_argument("--fused", help="a folder that these options wrote; nothing is fused")
    parser.add_argument("--dtype", help="of the evaluation, as of headfuse eval")
    parser.add_argument("--tasks-path", required=True, help="folder that scripts/get_tasks.py wrote")
    parser.add_argument("--tasks", default="standard", help="as of headfuse eval")
    parser.add_argument("--limit", type=int, default=50, help="questions of every task")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/tasks.jsonl"))
    options = parser.parse_args()
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for model, budget, layout, conversion in itertools.product(
        options.model, options.budget, options.layout, options.conversion
    ):
        name, folder = model.split("=", 1)
        calibration = options.samples, options.seed, Path(options.data).name
        values = (name, budget, layout, conversion, "", *calibration, options.options)
        row = dict(zip(KEY, values, strict=True))
        row |= {"of": options.tasks, "limit": options.limit, "dtype": options.dtype or ""}
        if any(row.items() <= {"options": "", "dtype": "", **other}.items() for other in known):
            continue
        row |= measured(folder, row, options)
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(row["mean"], flush=True)


def measured(folder: str, row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Fuse, evaluate, forget: the mean accuracy of all tasks, and each task's main metric, all with standard errors."""
    with tempfile.TemporaryDirectory() as scratch:
        fused = options.fused or fuse(folder, row, options, Path(scratch) / "fused")
        found = against_source(fused, folder, options.tasks, options.tasks_path, options.limit, options.dtype)
    main = [task for task in found["tasks"] if task["main"]]
    sides = ("model", "baseline", "difference")
    return {
        "mean": {"tasks": found["tasks_mean"]["tasks"], **{side: found["tasks_mean"][side] for side in sides}},
        "tasks": {task["task"]: {"metric": task["metric"], **{side: task[side] for side in sides}} for task in main},
    }


def against_source(
    fused: str, folder: str, tasks: str, tasks_path: str, limit: int, dtype: str | None
) -> dict[str, Any]:
    """The document of `headfuse eval`: tasks of a fused folder and of its source, question by question."""
    line = [PROGRAM, "eval", fused, "--baseline", folder, "--samples", "2", "--sequence-length", "512", "--json"]
    line += ["--tasks", tasks, "--tasks-path", tasks_path, "--limit", str(limit)]
    line += ["--dtype", dtype] if dtype else []
    found: dict[str, Any] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)
    return found


def fuse(folder: str, row: dict[str, Any], options: argparse.Namespace, output: Path) -> str:
    """The folder of a row's conversion."""
    line = [PROGRAM, "fuse", folder, "-o", str(output), "--quiet", "--budget", row["budget"], "--data", options.data]
    line += [*layout_options(row["layout"]), "--samples", str(row["samples"]), "--seed", str(row["seed"])]
    subprocess.run([*line, *CONVERSIONS[row["conversion"]], *shlex.split(row["options"])], check=True)
    return str(output)


if __name__ == "__main__":
    main()
