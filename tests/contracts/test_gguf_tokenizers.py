"""Tokenizers in GGUF files: llama.cpp makes the same tokens of a text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

import headfuse
from headfuse.layouts.gguf import tokenizer as gguf_tokenizer
from tests.support.commands import run
from tests.support.llama_cpp import LlamaCpp, export
from tests.support.tiny_models import VOCABULARY, tiny_model

TEXTS = [
    "the head of a key reads what value it was given",
    "  It's   12345 o'clock,\n\n\tWE'LL see: x=1+2;  naïve café — 東京 🙂 \r\n end ",
    "",
    " ",
    "don't\u00a0stop!!!   \n   \n",
]
TEXT = " ".join(TEXTS) * 3


def byte_level(pre: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer with one of the pre-tokenizers of the table."""
    wanted, whole_words = gguf_tokenizer.PRE_TOKENIZERS[pre]
    make: dict[str, Callable[[Any], Any]] = {
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "Digits": lambda individual: pre_tokenizers.Digits(individual_digits=individual),
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
    }
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([make[kind](option) for kind, option in wanted])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentencepiece(prepend: str) -> PreTrainedTokenizerFast:
    """BPE with byte fallback whose merges are generated from the pieces, as transformers does for SentencePiece."""
    special = ["<unk>", "<s>", "</s>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    words.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCABULARY - 259, limit_alphabet=12))
    pieces = sorted(words.get_vocab(), key=words.get_vocab().__getitem__, reverse=True)
    pieces.sort(key=lambda piece: len(piece) == 1)  # merged pieces first, as SentencePiece has them
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {piece: index for index, piece in enumerate(names)}
    scores = {piece: -float(index) for piece, index in vocab.items()}
    merges = generate_merges(vocab, scores, skip_tokens=special)
    if prepend == "class":
        return LlamaTokenizer(vocab=vocab, merges=merges)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prepend == "always" else steps)
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tokenizers") / "model")


def with_tokenizer(model: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model / name)
    tokenizer.save_pretrained(folder)
    return folder


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{pre: lambda pre=pre: byte_level(pre) for pre in gguf_tokenizer.PRE_TOKENIZERS},  # type: ignore[misc]
    **{f"SentencePiece {scheme}": lambda s=scheme: sentencepiece(s) for scheme in ("always", "never", "class")},  # type: ignore[misc]
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens_of_a_text(model: Path, tmp_path: Path, kind: str) -> None:
    folder = with_tokenizer(model, tmp_path / "model", TOKENIZERS[kind]())
    export(folder, tmp_path / "m.gguf")
    tokenizer, llama = AutoTokenizer.from_pretrained(folder), LlamaCpp(tmp_path / "m.gguf")
    for text in TEXTS:
        if kind == "SentencePiece class" and text.startswith(" "):
            continue  # transformers puts no mark before such a text, unlike SentencePiece (docs/runtimes.md)
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text) == expected, repr(text)
    whole = tokenizer(TEXTS[0]).input_ids
    assert llama.tokenize(TEXTS[0], special=True) == whole
    assert len(whole) < len(TEXTS[0]), "the tokenizer merges something"


def _package(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    return Path(found.origin).parent if found and found.origin else None


@pytest.mark.slow
@pytest.mark.skipif(
    not (_package("mistral_common") and _package("sentencepiece")),
    reason="mistral-common, which holds the tokenizer of Mistral 7B, and sentencepiece are not installed",
)
def test_the_tokenizer_of_mistral(tmp_path: Path) -> None:
    folder, data = tmp_path / "tokenizer", _package("mistral_common")
    assert data is not None
    folder.mkdir()
    (folder / "tokenizer.model").symlink_to(data / "data/tokenizer.model.v1")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "m.gguf")
    llama = LlamaCpp(tmp_path / "m.gguf")
    text = (Path(headfuse.__file__).parent / "data/prose.txt").read_text(encoding="utf-8")
    pieces = [text[start : start + 2000].lstrip(" ") for start in range(0, 60000, 2000)]
    for piece in [*pieces, *(text for text in TEXTS if not text.startswith(" "))]:
        assert llama.tokenize(piece, special=True) == tokenizer(piece).input_ids


def test_special_tokens_and_the_chat_template(model: Path, tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}{% endfor %}"
    folder = with_tokenizer(model, tmp_path / "model", tokenizer)
    export(folder, tmp_path / "m.gguf")
    llama, messages = LlamaCpp(tmp_path / "m.gguf"), [{"role": "user", "content": "the key"}]
    prompt = llama.chat_prompt(messages)
    assert prompt == tokenizer.apply_chat_template(messages, tokenize=False)
    assert llama.tokenize(prompt) == tokenizer(prompt).input_ids
    assert tokenizer(prompt).input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def _metaspace_words() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece("class")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def _lossy_merges() -> PreTrainedTokenizerFast:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "b": 257, "c": 258, "ab": 259, "bc": 260}
    vocab["abc"] = 261
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "c"), ("ab", "c")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _pre_tokenized(step: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_level("gpt-2").backend_tokenizer
    tokenizer.pre_tokenizer = step
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _lower() -> PreTrainedTokenizerFast:
    tokenizer = byte_level("gpt-2").backend_tokenizer
    tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))), "WordLevel"),
        (lambda: _pre_tokenized(pre_tokenizers.Whitespace()), "pre-tokenizer (Whitespace)"),
        (lambda: _pre_tokenized(pre_tokenizers.ByteLevel(add_prefix_space=True)), "changes the text"),
        (_lower, "changes the text"),
        (_metaspace_words, "SentencePiece"),
        (_lossy_merges, "merges are not those of SentencePiece"),
    ],
)
def test_other_tokenizers_are_refused(
    model: Path, tmp_path: Path, make: Callable[[], PreTrainedTokenizerFast], message: str
) -> None:
    folder = with_tokenizer(model, tmp_path / "model", make())
    assert message in " ".join(run("export", folder, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1).split())
    assert not list(tmp_path.glob("m.gguf*"))
