#!/usr/bin/env python3
"""Take the text decoder out of a model that sees images, and put it back when its heads are fused.

    python scripts/text_decoder.py take VISION_MODEL -o decoder
    headfuse fuse decoder --budget 1/2 --layout gqa -o fused
    python scripts/text_decoder.py put fused VISION_MODEL -o out

`out` is a model of the class of VISION_MODEL: its text decoder has fewer KV heads, everything else is copied.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headfuse.checkpoint.finish import copy_companions
from headfuse.checkpoint.inputs import read_json
from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.reader import Checkpoint
from headfuse.checkpoint.writer import SafetensorsWriter
from headfuse.errors import CheckpointError, HeadfuseError, UnsupportedModelError
from headfuse.models.families import ARCHITECTURES

TEXT_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Decoders that compute what a family does on text, where their three positions of a token are one."""
BOTH_WAYS = ("paligemma",)
EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
NO_MODEL = "give the folder of a model that sees images"


def decoder_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The name in the text model of each tensor of the decoder, by its stored name.

    Raises:
        UnsupportedModelError: when the embeddings of tokens, which tell the decoder from a vision tower, are not found.
    """
    beside = [n for n in checkpoint.shapes if n.endswith(EMBEDDINGS) and _layer(n, checkpoint) in checkpoint]
    if len(beside) != 1:
        raise UnsupportedModelError(
            f"has {len(beside)} text decoders: embeddings beside layers with separate projections",
            where=checkpoint.folder, fix=NO_MODEL,
        )  # fmt: skip
    prefix = beside[0].removesuffix(EMBEDDINGS)
    own = tuple(prefix + part for part in ("layers.", "embed_tokens.", "norm."))
    names = {name: "model." + name.removeprefix(prefix) for name in checkpoint.shapes if name.startswith(own)}
    return names | {name: HEAD for name in checkpoint.shapes if name.endswith(HEAD)}


def _layer(embeddings: str, checkpoint: Checkpoint) -> str:
    return embeddings.removesuffix(EMBEDDINGS) + "layers.0.self_attn.k_proj.weight"


def text_config(folder: Path, has_head: bool) -> dict[str, Any]:
    """config.json of the decoder as a language model of its own.

    Raises:
        UnsupportedModelError: for a family that is not supported.
    """
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder)
    if whole.model_type in BOTH_WAYS:
        raise UnsupportedModelError(
            f"the decoder of model_type {whole.model_type!r} attends in both directions: it is no language model",
            where=folder / "config.json", fix="give a model whose decoder attends to earlier tokens alone",
        )  # fmt: skip
    fields = whole.get_text_config().to_dict()
    kind = TEXT_TYPES.get(fields["model_type"], fields["model_type"])
    if kind not in ARCHITECTURES or fields["model_type"] == whole.model_type:
        raise UnsupportedModelError(
            f"its text decoder is of model_type {kind!r}", where=folder / "config.json",
            fix=f"give a model whose decoder is one of {', '.join(sorted({*ARCHITECTURES, *TEXT_TYPES}))}",
        )  # fmt: skip
    rope = {key: value for key, value in (fields.get("rope_parameters") or {}).items() if not key.startswith("mrope")}
    dropped = ("architectures", "transformers_version", "_name_or_path")
    fields = {name: value for name, value in fields.items() if name not in dropped}
    return {**fields, "model_type": kind, "rope_parameters": rope, "tie_word_embeddings": not has_head}


def take(model: Path, output: Path, overwrite: bool = False) -> None:
    """Write the decoder of a model that sees images as a language model of its own."""
    checkpoint = Checkpoint(model)
    names = decoder_names(checkpoint)
    config = text_config(model, HEAD in names.values())
    with output_folder(output, overwrite=overwrite, reads=[model]) as partial:
        _write(partial, {new: (checkpoint, old) for old, new in names.items()})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(model, partial)


def put(fused: Path, model: Path, output: Path, overwrite: bool = False) -> None:
    """Write a model that sees images with a fused decoder, of layout gqa, in the place of its own.

    Raises:
        CheckpointError: for a decoder that was not taken from this model, or has heads of another width.
    """
    checkpoint, decoder = Checkpoint(model), Checkpoint(fused)
    names, raw = decoder_names(checkpoint), read_json(model / "config.json", NO_MODEL)
    mine, theirs = text_config(model, HEAD in names.values()), read_json(fused / "config.json", "give a fused decoder")
    same = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    changed = [name for name in same if theirs.get(name) != mine.get(name)]
    missing = set(names.values()) ^ set(decoder.shapes)
    if changed or missing:
        what = f"another {changed[0]}" if changed else f"{min(missing)} on one side alone"
        raise CheckpointError(
            f"the decoder of {model.name} has {what}", where=fused,
            fix="fuse the decoder that `take` writes, with --layout gqa and without --head-dim",
        )  # fmt: skip
    raw.get("text_config", raw)["num_key_value_heads"] = theirs["num_key_value_heads"]
    tensors = {name: (decoder, names[name]) if name in names else (checkpoint, name) for name in checkpoint.shapes}
    with output_folder(output, overwrite=overwrite, reads=[fused, model]) as partial:
        _write(partial, tensors)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        copy_companions(model, partial)


def _write(partial: Path, tensors: Mapping[str, tuple[Checkpoint, str]]) -> None:
    """Copy tensors, each from a checkpoint and the name that it has there."""
    spec = {name: (source.dtypes[own], source.shapes[own]) for name, (source, own) in tensors.items()}
    writer = SafetensorsWriter(partial, spec)
    for name, (source, own) in tensors.items():
        writer.write(name, source.read(own))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, folders in (("take", ["model"]), ("put", ["fused", "model"])):
        own = commands.add_parser(command)
        for folder in folders:
            own.add_argument(folder, type=Path)
        own.add_argument("-o", "--output", type=Path, required=True)
        own.add_argument("--overwrite", action="store_true")
    given = vars(parser.parse_args())
    try:
        (take if given.pop("command") == "take" else put)(**given)
    except HeadfuseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
