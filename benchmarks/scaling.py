#!/usr/bin/env python3
"""What a conversion costs as a model grows: processor time, peak memory and bytes read, in processes of their own.

    python benchmarks/scaling.py sweep            # against layers, tokens and hidden size, on random models
    python benchmarks/scaling.py measure MODEL    # one model, beside one forward pass over the same text
    python benchmarks/scaling.py paper            # counted, not measured: Llama shapes up to 70B

Times are processor seconds of one thread: on a busy machine they do not grow as the clock's do. What starting Python
and its libraries takes is measured apart and subtracted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

BASE = {"layers": 2, "hidden": 768, "tokens": 4096}
SWEEPS = {"layers": [2, 4, 8], "tokens": [2048, 4096, 8192], "hidden": [384, 768, 1536]}
HEAD_DIM, LENGTH = 64, 512
PROGRAM = [sys.executable, "-m", "headfuse"]


@dataclass(frozen=True)
class Cost:
    """Processor seconds, peak resident bytes, and bytes asked of and given to the file system, by one process."""

    seconds: float
    memory: int
    read: int
    written: int


def cost(command: list[str]) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: when it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but /proc still tells
    io = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"failed: {' '.join(command)}")
    memory = usage.ru_maxrss * 1024
    return Cost(usage.ru_utime + usage.ru_stime, memory, int(io["rchar"]), int(io["wchar"]))


def conversion(model: Path, out: Path, samples: int, *more: str) -> list[str]:
    """The command that converts a model with preset fast, in layout decoupled."""
    options = ["--layout", "decoupled", "--preset", "fast", "--samples", str(samples), "--threads", "1"]
    options += ["--sequence-length", str(LENGTH)]
    return [*PROGRAM, "fuse", str(model), "-o", str(out), "--overwrite", "-q", *options, *more]


def forward(model: str, samples: int) -> None:
    """Read every weight once and run the windows through every layer and the head."""
    import torch

    from headfuse.config.fuse import FuseConfig, load_config
    from headfuse.models.source import Source
    from headfuse.models.streamed import StreamedModel

    torch.set_num_threads(1)
    source = Source.open(model)
    config: FuseConfig = load_config(None, {"calibration.samples": samples, "calibration.sequence_length": LENGTH})
    windows = source.calibration_text(config.calibration, config.seed)
    everything = torch.cat([windows.statistics, windows.held_out])
    streamed = StreamedModel(source.checkpoint, source.config, torch.device("cpu"))
    states = streamed.embed(everything)
    for layer in streamed.walk((), [states]):
        states = layer.outputs[0]
    streamed.nll(states, everything)


def start_up() -> float:
    """Processor seconds until everything is imported and nothing is done."""
    return cost(
        [sys.executable, "-c", "import headfuse.conversion.convert, transformers.models.llama.modeling_llama"]
    ).seconds


def measure(model: Path, samples: int, out: Path) -> dict[str, Any]:
    """One conversion, one forward pass and the estimate of `--dry-run`, start-up subtracted from the times."""
    dry_run = conversion(model, out, samples, "--dry-run", "--json")
    estimate = json.loads(subprocess.run(dry_run, check=True, capture_output=True).stdout)["estimate"]
    imports, fused = start_up(), cost(conversion(model, out, samples))
    once = cost([sys.executable, __file__, "forward", str(model), str(samples)]).seconds - imports
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {
        "model": model.name,
        "bytes": size,
        "tokens": samples * LENGTH,
        "seconds": fused.seconds - imports,
        "forward": once,
        "passes": (fused.seconds - imports) / once,
        "memory": fused.memory,
        "read": fused.read / size,
        "written": fused.written / size,
        "estimated seconds": estimate["seconds"],
        "estimated memory": estimate["memory_bytes"],
    }


def sweep() -> None:
    """Cost against layers, tokens and hidden size, and the exponent of each."""
    from make_random_llama import make_random_llama
    from transformers import LlamaConfig

    imports = start_up()
    with tempfile.TemporaryDirectory() as folder:
        for name, values in SWEEPS.items():
            seconds, memory = [], []
            for value in values:
                size = {**BASE, name: value}
                config = LlamaConfig(
                    vocab_size=4096, hidden_size=size["hidden"], intermediate_size=8 * size["hidden"] // 3,
                    num_hidden_layers=size["layers"], num_attention_heads=size["hidden"] // HEAD_DIM, eos_token_id=1,
                    max_position_embeddings=LENGTH, architectures=["LlamaForCausalLM"], dtype="bfloat16",
                )  # fmt: skip
                model = Path(folder) / f"{name}-{value}"
                make_random_llama(model, config)
                result = cost(conversion(model, Path(folder) / "out", size["tokens"] // LENGTH))
                seconds.append(result.seconds - imports)
                memory.append(result.memory)
                print(json.dumps({name: value, **asdict(result), "start-up": imports}), flush=True)
            print(
                f"{name}: time ~ {name}^{exponent(values, seconds):.2f}, memory ~ {name}^{exponent(values, memory):.2f}"
            )


PAPER = {
    "Llama-2-7B": {},
    "Llama-2-13B": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    },
    "LLaMA-65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Llama-2-70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def paper() -> None:
    """What `--dry-run` would count for the shapes of PAPER: 8 x 512 tokens, preset fast, a quarter of the cache."""
    from types import SimpleNamespace

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from headfuse.config.fuse import load_config
    from headfuse.conversion.cost import count
    from headfuse.models.heads import head_layout

    for (name, shape), layout in itertools.product(PAPER.items(), ("latent", "decoupled")):
        settings = load_config(None, {"layout": layout, "preset": "fast", "calibration.samples": 8})
        config = LlamaConfig(
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008, **shape}
        )
        with torch.device("meta"):
            tensors = AutoModelForCausalLM.from_config(config).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        heads, weights = head_layout(config), sum(tensor.numel() for tensor in tensors.values())
        source: Any = SimpleNamespace(heads=heads, config=config, checkpoint=SimpleNamespace(shapes=shapes))
        memory, work = count(source, settings)
        once = 8 * LENGTH * (2 * weights + 4 * config.hidden_size * LENGTH * config.num_hidden_layers)
        figures = {"memory GB": memory / 1e9, "passes": work / once, "read GB": 4 * weights / 1e9, "work": work}
        print(json.dumps({"model": name, "layout": layout, "weights": weights, **figures}))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sweep")
    commands.add_parser("paper")
    for name in ("measure", "forward"):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path)
        command.add_argument("samples", type=int, nargs="?", default=8)
        if name == "measure":
            command.add_argument("--output", type=Path, help="default: beside the model")
    args = parser.parse_args()
    if args.command == "sweep":
        sweep()
    elif args.command == "paper":
        paper()
    elif args.command == "forward":
        forward(str(args.model), args.samples)
    else:
        out = args.output or args.model.with_name(args.model.name + "-fused")
        print(json.dumps(measure(args.model, args.samples, out), indent=1))


if __name__ == "__main__":
    main()
