#!/usr/bin/env python3
"""Write a random Llama checkpoint of any size, bfloat16, in shards, one tensor in memory at a time.

The defaults are the shape of Llama-2-7B (13.5 GB), with the tokenizer of the bundled model: what
docs/results/scaling.md measures on. The weights are noise, so its loss says nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.errors import HeadfuseError

TOKENIZER = Path(__file__).parents[1] / "examples" / "mha-6m"


def make_random_llama(folder: Path, config: LlamaConfig, seed: int = 0, overwrite: bool = False) -> None:
    """Write the checkpoint: norms are 1, everything else is normal of deviation `config.initializer_range`.

    Raises:
        OutputError: when the folder cannot be written.
    """
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    with output_folder(folder, overwrite=overwrite) as partial:
        writer = SafetensorsWriter(partial, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
        for name, shape in shapes.items():
            noise = len(shape) > 1
            scale = config.initializer_range
            writer.write(name, torch.randn(shape, generator=generator) * scale if noise else torch.ones(shape))
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / name, partial / name)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=1, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    try:
        make_random_llama(args.folder, config, args.seed, args.overwrite)
    except HeadfuseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
