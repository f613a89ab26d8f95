#!/usr/bin/env python3
"""Train a small Llama model with plain multi-head attention from text files, on a CPU.

The defaults are the recipe of examples/mha-6m: 5.87 M parameters, which took 95 minutes on two cores. `--data default`
is the text that ships with headfuse.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from muon import Muon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headfuse.checkpoint.output import output_folder
from headfuse.checkpoint.weight_files import SINGLE
from headfuse.config.values import data_name
from headfuse.errors import DataError, HeadfuseError
from headfuse.text.documents import read_documents
from headfuse.text.windows import cut, token_windows

BOS, EOS = "<s>", "</s>"
MATRIX_LR, OTHER_LR = 0.02, 3e-3
MATRIX_DECAY = 0.1
"""Weight decay of the matrices under AdamW; Muon and the embeddings and norms go without."""
WARM_UP_STEPS, FINAL_LR = 50, 0.02
GRADIENT_NORM = 1.0
DEFAULT_TOKENS = 6_200_000

PIECE_CHARACTERS = 20_000
"""Longer documents are cut, so that even a single book can be held out in part."""
HELD_OUT = 50
"""One in so many pieces is held out."""
VALIDATION_WINDOWS, VALIDATION_BATCH = 128, 16
LOG_STEPS = 25
CARD = Path(__file__).with_name("example_model_card.md")


def read_pieces(data: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """The documents of all files, cut into pieces and shuffled: those to train on, and those held out.

    Raises:
        DataError: when a file cannot be read or there is only one piece.
    """
    pieces = [piece for name in data for document in read_documents(name) for piece in cut(document, PIECE_CHARACTERS)]
    if len(pieces) < 2:
        raise DataError("the text is too short to hold some of it out", fix=f"give over {PIECE_CHARACTERS} characters")
    random.Random(seed).shuffle(pieces)
    held_out = max(1, len(pieces) // HELD_OUT)
    return pieces[held_out:], pieces[:held_out]


def train_tokenizer(pieces: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, the first two of them BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=context)


def batches(windows: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches `[size, window]` without end, every epoch in a new order; an incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield windows[order[start : start + size]]


def make_optimizers(model: LlamaForCausalLM, name: str) -> list[torch.optim.Optimizer]:
    """The optimizers for the matrices of the layers and for the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for key, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "layers." in key else rest).append(parameter)
    others = torch.optim.AdamW(rest, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)
    if name == "muon":
        return [Muon(matrices, lr=MATRIX_LR), others]
    return [torch.optim.AdamW(matrices, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=MATRIX_DECAY), others]


def schedule(step: int, progress: float) -> float:
    """The factor of the learning rates: warm-up, constant for half the time, then linear to its final value."""
    decay = 1 - (1 - FINAL_LR) * max(0.0, 2 * progress - 1)
    return decay * min(1.0, (step + 1) / WARM_UP_STEPS)


@dataclass(frozen=True)
class Outcome:
    """What a training run did: its length, and the losses of its last steps."""

    steps: int
    tokens: int
    minutes: float
    last_losses: list[float]


def train(model: LlamaForCausalLM, windows: torch.Tensor, options: argparse.Namespace) -> Outcome:
    """Train `model` until the tokens or the minutes are spent.

    Raises:
        HeadfuseError: when the loss is no longer a number.
    """
    optimizers = make_optimizers(model, options.optimizer)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    losses: list[float] = []
    start, tokens = time.monotonic(), 0
    for step, batch in enumerate(batches(windows, options.batch, options.seed)):
        minutes = (time.monotonic() - start) / 60
        progress = minutes / options.minutes if options.minutes else tokens / options.tokens
        if losses and progress >= 1:
            break
        factor = schedule(step, progress)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if losses[-1] != losses[-1]:
            raise HeadfuseError(f"the loss is not a number after {step + 1} steps", fix="try --optimizer adamw")
        tokens += batch.numel()
        if (step + 1) % LOG_STEPS == 0:
            mean = sum(losses[-LOG_STEPS:]) / LOG_STEPS
            print(f"step {step + 1:5d}  tokens {tokens:,}  {progress:4.0%}  loss {mean:.3f}", flush=True)
    return Outcome(len(losses), tokens, (time.monotonic() - start) / 60, losses[-LOG_STEPS:])


@torch.inference_mode()
def mean_nll(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Mean NLL per token of `windows`."""
    losses = [
        model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
        for batch in windows.split(VALIDATION_BATCH)
    ]
    return sum(losses) / len(windows)


def build(options: argparse.Namespace, folder: Path) -> None:
    """Train tokenizer and model, and write both with their card into `folder`."""
    pieces, held_out = read_pieces(options.data, options.seed)
    tokenizer = train_tokenizer(pieces, options.vocabulary, options.context)
    windows = token_windows(pieces, tokenizer, options.sequence_length, required=options.batch)
    validation = token_windows(held_out, tokenizer, options.sequence_length, VALIDATION_WINDOWS)
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads or options.heads,
        head_dim=options.hidden // options.heads,
        max_position_embeddings=options.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {windows.numel():,} tokens of text", flush=True)
    outcome = train(model.train(), windows, options)
    model = model.eval().half()
    model.save_pretrained(folder)
    # safetensors creates its file for the owner alone
    (folder / SINGLE).chmod((folder / "config.json").stat().st_mode)
    tokenizer.save_pretrained(folder)
    nll = mean_nll(model.float(), validation)  # of the weights as they were rounded to float16
    print(f"held out: {nll:.3f}", flush=True)
    (folder / "README.md").write_text(card(options, model, windows, validation, outcome, nll), encoding="utf-8")


def card(
    options: argparse.Namespace,
    model: LlamaForCausalLM,
    windows: torch.Tensor,
    validation: torch.Tensor,
    outcome: Outcome,
    nll: float,
) -> str:
    """The model card; data is named without its folders."""
    config = model.config
    if options.optimizer == "muon":
        optimizer = f"Muon in float32 (LR {MATRIX_LR}) on the matrices of the layers, AdamW (LR {OTHER_LR}) on the rest"
    else:
        optimizer = f"AdamW (LR {OTHER_LR}, weight decay {MATRIX_DECAY} on the matrices of the layers)"
    recipe = (
        f"`scripts/train_example_model.py`, seed {options.seed}: {outcome.tokens:,} tokens in {outcome.steps} steps"
        f" ({outcome.tokens / windows.numel():.2f} passes, {outcome.minutes:.1f} minutes on {torch.get_num_threads()}"
        f" CPU threads), windows of {options.sequence_length}, batch {options.batch}; {optimizer}; gradients clipped to"
        f" norm {GRADIENT_NORM}; {WARM_UP_STEPS} warm-up steps, constant for half the time, then linear to"
        f" {FINAL_LR:.0%}."
    )
    last = len(outcome.last_losses)
    return CARD.read_text(encoding="utf-8").format(
        license=options.license,
        name=options.output.name,
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        window=options.sequence_length,
        data="\n".join(f"- `{data_name(name)}`" for name in options.data),
        recipe=recipe,
        last=last,
        training=sum(outcome.last_losses) / last,
        windows=len(validation),
        validation=f"{nll:.3f}",
        held_out=f"Held out is one in {HELD_OUT} of the documents, those over {PIECE_CHARACTERS:,} characters cut into"
        " pieces: of a long document some pieces may be trained on and others held out.",
    )


def count(text: str) -> int:
    """A whole number above zero, also as `500k` or `6.2M`."""
    scale = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    number = round(float(text[:-1] if scale > 1 else text) * scale)
    if number < 1:
        raise ValueError(text)
    return number


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help='.jsonl ({"text": ...}) or .txt files, or `default`')
    add("--output", type=Path, required=True, help="the folder to write; it appears only when complete")
    add("--overwrite", action="store_true", help="replace an existing output")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=count, default=DEFAULT_TOKENS, help="how long to train, as 6.2M (default)")
    length.add_argument("--minutes", type=float, help="how long to train; not repeatable to the bit")
    add("--layers", type=count, default=6)
    add("--hidden", type=count, default=256)
    add("--intermediate", type=count, default=704, help="size of the MLP")
    add("--heads", type=count, default=8)
    add("--key-value-heads", type=count, help="default: as many as heads")
    add("--vocabulary", type=count, default=4096)
    add("--context", type=count, default=1024, help="longest input that the config promises")
    add("--sequence-length", type=count, default=256, help="of the training windows")
    add("--batch", type=count, default=32)
    add("--optimizer", choices=("muon", "adamw"), default="muon")
    add("--license", default="other", help="licence in the model card; mind the terms of the text")
    add("--seed", type=int, default=0)
    add("--threads", type=count, help="CPU threads; default: what torch chooses")
    options = parser.parse_args(arguments)
    if options.minutes is not None and not options.minutes > 0:
        parser.error("--minutes must be above 0")
    if options.hidden % options.heads or options.hidden // options.heads % 2:
        parser.error("--hidden must be an even multiple of --heads")
    if options.key_value_heads and options.heads % options.key_value_heads:
        parser.error("--heads must be a multiple of --key-value-heads")
    if options.vocabulary < 258:
        parser.error("--vocabulary must be at least 258: 256 bytes and two special tokens")
    return options


def main() -> int:
    """Run the script; returns the exit code."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with output_folder(options.output, overwrite=options.overwrite) as folder:
            build(options, folder)
    except HeadfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
