"""Runs a console script on the pretended device, and prints or writes what was counted."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from importlib.metadata import entry_points
from pathlib import Path

from tests.support.pretended_cuda import Transfers, peak, start
from tests.support.pretended_cuda.transfers import table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.pretended_cuda")
    parser.add_argument("--report", type=Path, help="write what was counted as JSON")
    parser.add_argument("--limit-gb", type=float, default=80.0, help="memory of the device")
    parser.add_argument("--no-count", action="store_true")
    parser.add_argument("--no-float64", action="store_true", help="as on MPS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    start(int(options.limit_gb * 2**30), float64=not options.no_float64)
    (script,) = entry_points(group="console_scripts", name=command[0])
    work, sys.argv = script.load(), command
    counted = Transfers()
    try:
        with contextlib.nullcontext() if options.no_count else counted:
            work()
    finally:
        found = {**counted.report(), "peak_bytes": peak()}
        if options.report:
            options.report.write_text(json.dumps(found, indent=1))
        if not options.no_count:
            print(table(found), f"peak of the device: {peak() / 1e6:.1f} MB", sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
