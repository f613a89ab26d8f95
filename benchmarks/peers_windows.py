"""Token ids for peers.py: `python benchmarks/peers_windows.py --model FOLDER --text NAME=FILE --data FILE --out DIR`.

The code of peers needs older versions of transformers than headfuse. So the same windows reach them as token ids:
those that `headfuse fuse --samples 128 --seed 0` calibrates on, and those that `headfuse eval --samples 24
--sequence-length 512` reads. `--out` also gets the model with a `config.json` that these versions understand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from headfuse.evaluation.perplexity import evaluation_text
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import varied_windows

LENGTH = 512


def main() -> None:
    """Write `windows.pt` and the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", nargs="+", required=True, help="NAME=FILE to evaluate on")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(options.model))
    texts = {}
    for entry in options.text:
        name, path = entry.split("=", 1)
        texts[name] = evaluation_text(read_documents(path), tokenizer, LENGTH, options.windows, LENGTH, path).windows
    documents = read_documents(options.data, seed=0)
    calibration = varied_windows(documents, tokenizer, LENGTH, options.samples, 0)
    torch.save({"calibration": calibration, "texts": texts}, options.out / "windows.pt")
    older_model(options.model, options.out)


def older_model(source: Path, output: Path) -> None:
    """Copy a model in float32, its RoPE base where transformers 4 looks for it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", None) and "float32"
    (output / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
