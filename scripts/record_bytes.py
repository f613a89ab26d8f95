"""Records the SHA-256 of what every command writes from the bundled model, so that a refactoring can prove equal bytes.

    python scripts/record_bytes.py before.json            # on the version before
    python scripts/record_bytes.py --check before.json    # on the version after, on the same machine

Weights are hashed as files. plan.json is hashed without its version and without the checksums of the other files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MODEL = Path(__file__).parents[1] / "examples" / "mha-6m"
TEXT = ["--samples", "8", "--sequence-length", "128"]
DHA = """
budget: {total: 0.5}
method: dha
preset: fast
calibration: {samples: 8, sequence_length: 64}
dha: {search_steps: 4, fusion_steps: 8, batch_size: 4, micro_batch_size: 2, progressive: false}
"""
RECIPE = """
batch_size: 2
gradient_accumulation: 1
sequence_length: 128
validation_windows: 2
"""
VOLATILE = ("headfuse_version", "files", "seal")


def commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each command; its output has that name in `folder`."""
    (folder / "dha.yaml").write_text(DHA, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for layout in ("decoupled", "layerwise", "gqa"):
        for preset in ("fast", "balanced", "best"):
            options = ["--budget", "0.25", "--layout", layout, "--preset", preset]
            yield f"fuse-{layout}-{preset}", ["fuse", str(MODEL), *options, *TEXT]
    for allocator in ("taylor", "shapley", "dha-greedy"):
        options = ["--budget", "0.5", "--layout", "decoupled", "--allocator", allocator, "--preset", "fast"]
        yield f"fuse-{allocator}", ["fuse", str(MODEL), *options, *TEXT]
    for method, grouping in (("mean", "neighbours"), ("align", "anneal"), ("first", "cluster")):
        options = ["--budget", "0.5", "--method", method, "--grouping", grouping, "--preset", "fast", "--layout", "gqa"]
        yield f"fuse-{method}", ["fuse", str(MODEL), *options, *TEXT]
    yield "dha", ["fuse", str(MODEL), "--config", str(folder / "dha.yaml")]
    trained = ["--config", str(folder / "recipe.yaml"), "--tokens", "2k", "--data", "default", "--teacher", str(MODEL)]
    yield "uptrain", ["uptrain", str(folder / "fuse-decoupled-fast"), *trained]
    yield "export-layerwise", ["export", str(folder / "fuse-gqa-fast"), "--to", "layerwise"]
    yield "export-gqa", ["export", str(folder / "fuse-layerwise-fast"), "--to", "gqa"]
    yield "export.gguf", ["export", str(folder / "fuse-gqa-fast"), "--to", "gguf", "--type", "f32"]
    yield "analyze", ["analyze", str(MODEL), "--budget", "0.25", "--layout", "decoupled", *TEXT]


def digests(output: Path) -> dict[str, str]:
    """SHA-256 of weights, and of a plan without what differs between versions, by file name."""
    files = [output] if output.is_file() else sorted(p for p in output.iterdir() if p.suffix == ".safetensors")
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    plan = output / "plan.json"
    if plan.exists():
        kept = {key: value for key, value in json.loads(plan.read_text()).items() if key not in VOLATILE}
        found["plan.json"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return found


def record(only: list[str]) -> dict[str, dict[str, str]]:
    """Run the commands of these names, or every one where none is named; the digests of each output by its name."""
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for name, arguments in commands(Path(scratch)):
            if only and name not in only:
                continue
            output = Path(scratch) / name
            threads = [] if arguments[0] == "export" else ["--threads", "1"]
            command = [sys.executable, "-m", "headfuse", *arguments, *threads, "--output", str(output), "--quiet"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found[name] = digests(output)
            print(name, file=sys.stderr)
        return found


def main() -> int:
    """Record into a file, or check against one; 1 when a digest differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these commands alone")
    options = parser.parse_args()
    found = record(options.only)
    if not options.check:
        options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    wanted = json.loads(options.file.read_text(encoding="utf-8"))
    compared = options.only or wanted | found
    different = [name for name in compared if wanted.get(name) != found.get(name)]
    print(f"different: {', '.join(different)}" if different else f"the same bytes: {len(found)} outputs")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
