"""GGUF files: what llama.cpp computes with them is what transformers computes with the folder."""

from __future__ import annotations

import builtins
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

import headfuse
from headfuse.layouts.gguf import tokenizer as gguf_tokenizer
from headfuse.layouts.gguf import writer as gguf
from tests.support.commands import fuse, run
from tests.support.llama_cpp import LlamaCpp, assert_same
from tests.support.tiny_models import VOCABULARY, tiny_model

TEXTS = [
    "the head of a key reads what value it was given",
    "  It's   12345 o'clock,\n\n\tWE'LL see: x=1+2;  naïve café — 東京 🙂 \r\n end ",
    "",
    " ",
    "don't\u00a0stop!!!   \n   \n",
]
TEXT = " ".join(TEXTS) * 3


def adapted(folder: Path, **changes: Any) -> Path:
    """The model with other values in config.json; every layer attends to all tokens."""
    config = json.loads((folder / "config.json").read_text())
    config.update({"sliding_window": None, "use_sliding_window": False, **changes})
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def export(folder: Path, file: Path, *options: object) -> dict[str, Any]:
    line = run("export", folder, "--to", "gguf", "-o", file, "--json", *options)
    document: dict[str, Any] = json.loads(line.splitlines()[-1])
    return document


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("family", sorted(gguf.FAMILIES))
def test_a_source_model_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family))
    document = export(model, tmp_path / "m.gguf", "--type", "f32")
    assert document["architecture"] == gguf.FAMILIES[family].name
    assert document["kv_bytes_per_token"] == {"before": 256, "after": 256}
    assert_same(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_layers_with_counts_of_their_own_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8, layers=3))
    (tmp_path / "options.yaml").write_text("budget: {key_heads: [2, 4, 1], value_heads: [2, 4, 1]}\npreset: fast\n")
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml", "--layout", "layerwise")
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert document["architecture"] == "deci"
    assert document["num_key_value_heads"] == [2, 4, 1]
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_fused_stock_model_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8))
    fuse(model, tmp_path / "out", "--layout", "gqa", "--budget", "0.5", "--preset", "fast")
    assert export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")["num_key_value_heads"] == [2, 2]
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_heads_of_another_width_with_a_table_of_frequencies_in_llama_cpp(tmp_path: Path, family: str) -> None:
    model = adapted(tiny_model(tmp_path / "model", family, query_heads=8))
    fuse(model, tmp_path / "out", "--layout", "gqa", "--head-dim", "16", "--budget", "0.5", "--preset", "fast")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]["rope_type"] == "longrope"
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert document["num_key_value_heads"] == [1, 1]
    assert document["kv_bytes_per_token"] == {"before": 128, "after": 128}
    assert_same(tmp_path / "out", tmp_path / "m.gguf", length=100)


def test_decoupled_heads_where_a_stock_layer_computes_the_same(tmp_path: Path) -> None:
    model = adapted(tiny_model(tmp_path / "model", query_heads=8))
    options = "budget: {key_heads: [1, 2], value_heads: [2, 2]}\nmethod: mean\ngrouping: neighbours\npreset: fast\n"
    (tmp_path / "options.yaml").write_text(options)
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    document = export(tmp_path / "out", tmp_path / "m.gguf", "--type", "f32")
    assert (document["architecture"], document["num_key_value_heads"]) == ("llama", [2, 2])
    assert document["kv_bytes_per_token"] == {"before": 7 * 16, "after": 8 * 16}
    assert_same(tmp_path / "out", tmp_path / "m.gguf")


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"rms_norm_eps": 1e-2},
    ],
    ids=["llama3", "linear", "epsilon"],
)
def test_what_the_config_says_reaches_llama_cpp(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = adapted(tiny_model(tmp_path / "model", query_heads=8), **changes)
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert_same(model, tmp_path / "m.gguf", length=100)


def test_tied_embeddings_are_there_once(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = adapted(tiny_model(tmp_path / "model"), tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert "output.weight" not in {tensor.name for tensor in reader(tmp_path / "m.gguf").tensors}
    assert_same(model, tmp_path / "m.gguf")


@pytest.mark.parametrize(("file_type", "tolerance", "most"), [("f16", 0.02, 0.51), ("q8_0", 0.3, 0.35)])
def test_smaller_numbers(tmp_path: Path, file_type: str, tolerance: float, most: float) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = adapted(tiny_model(tmp_path / "model", query_heads=8))
    options = [] if file_type == "f16" else ["--type", file_type]
    export(model, tmp_path / "m.gguf", *options)
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader(tmp_path / "m.gguf").tensors}
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == file_type.upper()
    # rows of 48 numbers are no multiple of the blocks of q8_0
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    sizes = [4 * int(tensor.n_elements) for tensor in tensors.values()]
    assert sum(int(tensor.n_bytes) for tensor in tensors.values()) < most * sum(sizes)
    assert_same(model, tmp_path / "m.gguf", tolerance)


# ---------------------------------------------------------------- tokenizers


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


# ---------------------------------------------------------------- outputs and refusals


def test_the_file_appears_whole_or_not_at_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.gguf"

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", full_disk)
        assert "free some space" in run("export", model, "--to", "gguf", "-o", out, code=1)
    assert not list(tmp_path.iterdir())
    run("export", model, "--to", "gguf", "-o", out, "-q")
    before = out.read_bytes()
    assert "already exists" in run("export", model, "--to", "gguf", "-o", out, code=1)
    with monkeypatch.context() as patched:
        patched.setattr("gguf.GGUFWriter.write_tensor_data", full_disk)
        run("export", model, "--to", "gguf", "-o", out, "--overwrite", code=1)
    assert out.read_bytes() == before
    run("export", model, "--to", "gguf", "-o", out, "--overwrite", "--type", "f32", "-q")
    assert len(out.read_bytes()) > len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    (tmp_path / "folder").mkdir()
    assert "is a folder" in run("export", model, "--to", "gguf", "-o", tmp_path / "folder", "--overwrite", code=1)


def test_two_exports_to_one_file(model: Path, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "m.gguf.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in run("export", model, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert (tmp_path / "m.gguf.partial").exists()


def test_without_the_package(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    message = run("export", model, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert 'pip install "headfuse[gguf]"' in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_does_not_compute(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = adapted(tiny_model(tmp_path / "model"), **changes)
    assert message in run("export", folder, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    assert not (tmp_path / "m.gguf").exists()


def test_layers_of_families_that_deci_is_not(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen3", query_heads=8)
    options = "budget: {key_heads: [1, 2], value_heads: [1, 2]}\nmethod: mean\ngrouping: neighbours\npreset: fast\n"
    (tmp_path / "options.yaml").write_text(options)
    fuse(model, tmp_path / "out", "--config", tmp_path / "options.yaml")
    assert "--layout gqa" in run("export", tmp_path / "out", "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)


def test_other_families_and_numbers_that_f16_does_not_hold(tmp_path: Path) -> None:
    gemma = tiny_model(tmp_path / "gemma", "gemma")
    assert "convert_hf_to_gguf" in run("export", gemma, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    folder = tiny_model(tmp_path / "model")
    weights = headfuse.load(folder)
    with torch.no_grad():
        weights.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    weights.save_pretrained(folder)
    assert "write f32" in run("export", folder, "--to", "gguf", "-o", tmp_path / "m.gguf", code=1)
    export(folder, tmp_path / "m.gguf", "--type", "f32")


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader
    model = tiny_model(tmp_path / "model", "mistral")
    export(model, tmp_path / "m.gguf", "--type", "f32")
    assert reader(tmp_path / "m.gguf").get_field("llama.context_length").contents() == 16
    # n_ctx is asked for; the file only says what the model was made for
    assert_same(model, tmp_path / "m.gguf", length=15)


def test_rows_in_the_order_of_llama_cpp() -> None:
    rows = torch.arange(2 * 8)[:, None]
    expected: Sequence[int] = [0, 4, 1, 5, 2, 6, 3, 7]
    assert gguf.interleave(rows, 2)[:, 0].tolist() == [*expected, *(row + 8 for row in expected)]
