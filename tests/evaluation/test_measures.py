"""What eval measures beside the NLL of independent windows: strides, agreement, retrieval, memory, speed."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import headfuse
from headfuse.config.values import parse_memory
from headfuse.estimates import clustered_mean, mean, paired_stderr
from headfuse.evaluation.capacity import fit
from headfuse.evaluation.passkey import passkey_prompts, retrieve
from headfuse.evaluation.perplexity import predict
from tests.support.commands import run
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measures")
    tiny_model(folder / "model")
    tiny_model(folder / "other", kv_heads=2)
    words = (folder / "text.txt").read_text().split()
    lines = [
        json.dumps({"text": " ".join(words[i : i + 40]), "source": ["book", "code"][i // 40 % 2]})
        for i in range(0, 800, 40)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


def evaluate(folder: Path, *args: object, code: int = 0) -> dict[str, Any]:
    data = ("--data", folder / "text.jsonl", "--samples", 6, "--sequence-length", 32)
    output = run("eval", folder / "model", *data, *args, "--json", code=code)
    document: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return document


def tokens(folder: Path, count: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids: list[int] = []
    for line in (folder / "text.jsonl").read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids[:count])


def test_a_stride_gives_every_prediction_its_context(folder: Path) -> None:
    document, ids = evaluate(folder, "--stride", 8), tokens(folder, 32 + 5 * 8)
    model = headfuse.load(folder / "model")
    losses = []
    for start in range(0, 41, 8):
        window = ids[start : start + 32]
        with torch.no_grad():
            loss = F.cross_entropy(model(window[None]).logits[0, :-1], window[1:], reduction="none")
        losses += (loss if start == 0 else loss[-8:]).tolist()
    assert document["predictions"] == len(losses) == 31 + 5 * 8
    assert document["model"]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert "one every 8 tokens" in document["protocol"]
    assert "not between 1 and" in evaluate(folder, "--stride", 33, code=1)["error"]["what"]


@pytest.mark.parametrize("model_type", ["llama", "granite", "cohere", "mixtral"])
def test_states_and_head_give_the_logits(tmp_path: Path, model_type: str) -> None:
    model = headfuse.load(tiny_model(tmp_path / "model", model_type))
    windows = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    predictions = predict(model, windows)
    with torch.no_grad():
        wanted = model(windows).logits[:, :-1]
        assert torch.allclose(predictions.logits(predictions.states[1]), wanted[1], atol=1e-5)


def test_agreement_by_domain_and_position(folder: Path) -> None:
    document = evaluate(folder, "--baseline", folder / "other")
    parts, ids = document["agreement"], tokens(folder, 6 * 32).view(6, 32)
    with torch.no_grad():
        logits = [headfuse.load(folder / name)(ids).logits[:, :-1].double() for name in ("model", "other")]
    mine, theirs = (F.log_softmax(x, -1) for x in logits)
    kl = (theirs.exp() * (theirs - mine)).sum(-1)
    assert parts["overall"]["kl"]["value"] == pytest.approx(kl.mean().item(), rel=1e-4)
    same = (mine.argmax(-1) == theirs.argmax(-1)).double()
    assert parts["overall"]["top1_agreement"]["value"] == pytest.approx(same.mean().item())
    first = next(part for part in parts["positions"] if part["part"] == "1-15")
    assert first["kl"]["value"] == pytest.approx(kl[:, :15].mean().item(), rel=1e-4)
    assert {part["part"] for part in parts["domains"]} == {"book", "code"}
    assert sum(part["kl"]["samples"] for part in parts["domains"]) == kl.numel()
    whole = sum(part["kl"]["samples"] * part["kl"]["value"] for part in parts["domains"])
    assert whole / kl.numel() == pytest.approx(kl.mean().item(), rel=1e-4)


def test_a_model_agrees_with_itself(folder: Path) -> None:
    gates = "kl<=1e-6,kl@book<=1e-6,top1_agreement>=1,top1_agreement@16-31>=1,nll<=1*baseline"
    document = evaluate(folder, "--baseline", folder / "model", "--gate", gates)
    assert all(gate["passed"] for gate in document["gates"])
    assert evaluate(folder, "--gate", "kl<=9", code=3)["gates"][0]["value"] is None


def test_passkey(folder: Path) -> None:
    document = evaluate(folder, "--passkey", 128, "--passkey-trials", 2, "--baseline", folder / "other", code=1)
    assert "are too few" in document["error"]["what"]  # the test's own text, letter by letter, is longer
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples/mha-6m")
    prompts = passkey_prompts(tokenizer, 300, 4)
    assert [len(ids) for ids, _ in prompts] == [300] * 4
    texts = [tokenizer.decode(ids) for ids, _ in prompts]
    places = [text.index("The pass key is") for text in texts]
    assert places == sorted(places)
    for (ids, size), text in zip(prompts, texts, strict=True):
        assert tokenizer.decode(ids[-size:]).strip() in text[: text.rindex("What is")]


def llama_like(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters and of two spaces, which puts a space before a text, as that of Llama-2 does."""
    letters = ["▁", "▁▁", "\n", *string.ascii_letters, *string.digits, *".?,"]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [("▁", "▁")]))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("scheme", ["prepend", "metaspace"])
def test_the_answer_has_the_tokens_of_the_fact(scheme: str) -> None:
    """The key by itself begins with two spaces there, which no model sees before a key."""
    tokenizer = llama_like(scheme)
    for ids, size in passkey_prompts(tokenizer, 600, 3):
        assert len(ids) == 600
        words = tokenizer.convert_ids_to_tokens(ids)
        assert words[-size] == "▁"
        assert size == 6
        answer = "".join(words[-size:])
        assert f"is{answer}." in "".join(words[: -size - 40])


def test_the_key_of_a_tokenizer_that_puts_nothing_before_a_text_is_as_it_was() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples/mha-6m")
    for seed in range(3):
        for ids, size in passkey_prompts(tokenizer, 300, 2, seed):
            key = tokenizer.decode(ids[-size:])
            assert ids[-size:] == tokenizer(key, add_special_tokens=False).input_ids


def test_the_nll_of_a_key_is_that_of_logits_within_their_bound(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "gemma2")  # whose logits are within 5
    model, tokenizer = headfuse.load(folder), AutoTokenizer.from_pretrained(folder)
    (found,) = retrieve(model, tokenizer, [400], 1)
    ((ids, size),) = passkey_prompts(tokenizer, 400, 1)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -size - 1 : -1]
    assert found.nll == pytest.approx(F.cross_entropy(logits, torch.tensor(ids[-size:])).item(), rel=1e-5)


def test_memory(folder: Path) -> None:
    document = evaluate(folder, "--memory", "1MB", "--baseline", folder / "other")
    fits, kv = document["model"]["fit"], document["model"]["kv_bytes_per_token"]
    room = 10**6 - document["model"]["weight_bytes"]
    assert (fits["longest_context"], fits["largest_batch"]) == (room // kv, room // (kv * 32))
    assert "weight bytes" in document["memory_formula"]
    assert "are too few for" in evaluate(folder, "--memory", "1KB", code=1)["error"]["what"]
    assert [parse_memory(t) for t in ("24GB", "16 GiB", "1.5k", "7")] == [24 * 10**9, 16 * 2**30, 1500, 7]
    for bad in ("", "GB", "-1GB", "0", "4XB"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_memory(bad)
    assert fit(100, 20, 8, 5, None).largest_batch == 2


def test_memory_is_compared_with_the_weights_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headfuse.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert "are too few for" in evaluate(folder, "--memory", "1KB", code=1)["error"]["what"]


def test_a_baseline_that_does_not_fit_leaves_room_for_nothing(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = tiny_model(tmp_path / "large", layers=8)
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    document = evaluate(folder, "--memory", f"{size + 1000}", "--baseline", large)
    mine, theirs = document["model"]["fit"], document["baseline"]["fit"]
    assert (theirs["longest_context"], theirs["largest_batch"]) == (0, 0)
    assert mine["longest_context"] > 0
    assert f"large: {size + 1000:,} bytes are too few for {theirs['weight_bytes']:,} bytes of weights" in caplog.text


def test_speed(folder: Path) -> None:
    speed = evaluate(folder, "--speed", "--baseline", folder / "other")["speed"]
    assert speed["model"] > 0 < speed["baseline"]
    assert speed["rounds"] == 5
    assert "--speed" in evaluate(folder, "--speed", code=1)["error"]["where"]


def test_speed_at_the_end_of_learned_positions(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "opt")
    options = ("--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 128, "--json")
    document = run("eval", model, "--baseline", model, "--speed", *options)
    assert json.loads(document.splitlines()[-1])["speed"]["context"] == 128 - 18


def test_errors_of_means() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found = clustered_mean(values, torch.ones(7, 5, dtype=torch.bool))
    assert found is not None
    assert found.stderr == pytest.approx(values.mean(1).std().item() / math.sqrt(7))
    assert clustered_mean(values, torch.zeros(7, 5, dtype=torch.bool)) is None
    a, b = values[:, 0].tolist(), values[:, 1].tolist()
    difference = mean([x - y for x, y in zip(a, b, strict=True)]).stderr
    direct = mean([x - 0.9 * y for x, y in zip(a, b, strict=True)]).stderr
    assert paired_stderr(mean(a).stderr, mean(b).stderr, difference, 0.9) == pytest.approx(direct)
    assert mean([1.0]).stderr is None


def test_the_seed_draws_other_passkeys(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    options = ("--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16, "--passkey", 400, "--json")
    first, again, other = (
        json.loads(run("eval", model, *options, *seed).splitlines()[-1])["passkey"]
        for seed in ((), ("--seed", 0), ("--seed", 1))
    )
    assert first == again != other
