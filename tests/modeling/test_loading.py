"""Layout `decoupled`: folders, remote code and configs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from headfuse.modeling import AUTO_MAP, MODELING_FILES, HeadfuseConfig, HeadfuseForCausalLM, HeadfuseModel
from tests.modeling.random_models import (
    HEAD_DIM,
    LAYERS,
    QUERIES,
    SOURCES,
    close,
    fused_config,
    random_model,
    rotary_table,
    tokens,
)


def test_shapes_on_disk() -> None:
    weights = random_model(fused_config(SOURCES["qwen2"](), "free")).state_dict()
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (2 * HEAD_DIM, 36)
    assert weights["model.layers.1.self_attn.v_proj.weight"].shape == (4 * HEAD_DIM, 36)
    assert weights["model.layers.1.self_attn.v_proj.bias"].shape == (4 * HEAD_DIM,)
    assert weights["model.layers.1.self_attn.q_proj.weight"].shape == (QUERIES * HEAD_DIM, 36)


@pytest.mark.parametrize("source", ["llama", "qwen2"])
def test_save_and_reload(source: str, tmp_path: Path) -> None:
    config = fused_config(SOURCES[source](), "free")
    config.rotary_slots = [rotary_table(3, seed=0), None, None]
    model = random_model(config)
    logits = model(tokens()).logits
    for round_trip in ("first", "second"):
        folder = tmp_path / round_trip
        model.save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        assert saved["model_type"] == "headfuse"
        assert saved["architectures"] == ["HeadfuseForCausalLM"]
        assert saved["auto_map"] == AUTO_MAP
        assert saved["source_config"]["model_type"] == source
        assert saved["source_config"]["num_key_value_heads"] == QUERIES
        assert all((folder / file.name).read_text() == file.read_text() for file in MODELING_FILES)
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        assert isinstance(model, HeadfuseForCausalLM)
        assert torch.equal(model(tokens()).logits, logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert half.dtype == torch.bfloat16
    assert half(tokens()).logits.isfinite().all()
    base, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(base, HeadfuseModel)
    assert not report["missing_keys"]
    close(base(tokens()).last_hidden_state, model.model(tokens()).last_hidden_state)


def test_loads_what_the_converter_writes(tmp_path: Path) -> None:
    source = random_model(SOURCES["qwen2"]())
    config = fused_config(source.config, "free", [rotary_table(3, seed=0), None, None])
    weights = {name: tensor for name, tensor in source.state_dict().items() if name != "lm_head.weight"}
    weights["lm_head.weight"] = source.lm_head.weight.detach().clone()
    for layer_idx in range(LAYERS):
        for name, counts in (("k_proj", config.num_key_heads), ("v_proj", config.num_value_heads)):
            for tensor in ("weight", "bias"):
                key = f"model.layers.{layer_idx}.self_attn.{name}.{tensor}"
                weights[key] = weights[key][: counts[layer_idx] * HEAD_DIM].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = ("num_key_heads", "num_value_heads", "key_head_of_query", "value_head_of_query", "rotary_slots")
    written = {
        "model_type": "headfuse",
        "architectures": ["HeadfuseForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "headfuse_format": 1,
        "source_config": {**source.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        **{name: getattr(config, name) for name in fields},
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    built = random_model(config)
    built.load_state_dict(weights)
    assert torch.equal(model(tokens()).logits, built(tokens()).logits)


REMOTE = """
import sys
sys.modules["headfuse"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, out = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert AutoModel.from_config(model.config, trust_remote_code=True).config.num_key_heads == [3, 2, 6]
ids = torch.tensor([[5, 6, 7, 8]])
model.save_pretrained(out + "/resaved")
again, report = AutoModelForCausalLM.from_pretrained(out + "/resaved", trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert torch.equal(model(ids).logits, again(ids).logits)
torch.save(model(ids).logits.detach(), out + "/logits.pt")
torch.save(model.generate(ids, max_new_tokens=5, do_sample=False), out + "/tokens.pt")
"""


def test_loads_as_remote_code_without_headfuse(tmp_path: Path) -> None:
    model = random_model(fused_config(SOURCES["mistral"](), "free", [rotary_table(3, seed=0), None, None]))
    folder, out = tmp_path / "a-model-0.25", tmp_path / "out"
    out.mkdir()
    model.save_pretrained(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", REMOTE, folder, out], cwd=tmp_path, env=environment, check=True)
    assert all((out / "resaved" / file.name).read_text() == file.read_text() for file in MODELING_FILES)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(torch.load(out / "logits.pt"), model(ids).logits.detach())
    assert torch.equal(torch.load(out / "tokens.pt"), model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("source", ["llama", "qwen2"])
def test_a_whole_model_can_be_pickled_and_copied(source: str, tmp_path: Path) -> None:
    model = random_model(fused_config(SOURCES[source](), "free", [rotary_table(3, seed=0), None, None]))
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert type(again.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        assert torch.equal(*(m.generate(tokens(), max_new_tokens=4, do_sample=False) for m in (again, model)))


PICKLE = """
import sys
sys.modules["headfuse"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, file, step = sys.argv[1:]
ids = torch.tensor([[5, 6, 7, 8]])
if step == "save":
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save((model, model(ids).logits), file)
else:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)  # finds the folder's code
    model, logits = torch.load(file, weights_only=False)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert torch.equal(model(ids).logits, logits)
"""


@pytest.mark.long
def test_a_model_of_remote_code_can_be_pickled(tmp_path: Path) -> None:
    folder, file = tmp_path / "a-model-0.25", tmp_path / "model.pt"
    random_model(fused_config(SOURCES["qwen2"](), "free")).save_pretrained(folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for step in ("save", "load"):
        subprocess.run([sys.executable, "-c", PICKLE, folder, file, step], cwd=tmp_path, env=environment, check=True)


def test_config_reads_through_to_the_source() -> None:
    config = fused_config(SOURCES["mistral"](), "free", dtype="bfloat16")
    assert config.hidden_size == 36
    assert config.sliding_window == 4
    assert config.num_key_value_heads == 6
    assert config.pad_token_id == 0
    assert config.dtype == torch.bfloat16
    assert GenerationConfig.from_model_config(config).pad_token_id == 0
    config.source_config.quantization_config = {"quant_method": "fp8"}
    assert not hasattr(config, "quantization_config")
    del config.source_config.quantization_config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = config.no_such_thing
    config.vocab_size = 101
    again = HeadfuseConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.vocab_size, again.source_config.vocab_size) == (101, 97)
    assert again.to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"headfuse_format": 2}, "headfuse_format: 2"),
        ({"source_config": None}, "source_config: is missing"),
        ({"source_config": {"model_type": "mpt"}}, "source_config: model_type 'mpt'"),
        ({"num_key_heads": [3, 2]}, "num_key_heads: must be a list of 3"),
        ({"num_value_heads": None}, "num_value_heads: must be a list of 3"),
        ({"num_value_heads": [2, 4, 2]}, r"value_head_of_query\[2\]: reads heads \[0\], but num_value_heads\[2\] is 2"),
        ({"num_key_heads": [3, 1, 6]}, r"key_head_of_query\[1\]: reads heads \[0, 1\]"),
        ({"key_head_of_query": [[0, 0, 2, 2, 0, 2]] * 3}, r"key_head_of_query\[0\]: reads heads \[0, 2\]"),
        ({"key_head_of_query": [[-1, 0, 1, 1, 0, 1]] * 3}, r"key_head_of_query\[0\]: reads heads \[-1, 0, 1\]"),
        ({"key_head_of_query": [[0] * 5] * 3}, r"key_head_of_query\[0\]: must be 6 head indices"),
        ({"value_head_of_query": [[0.0] * 6] * 3}, r"value_head_of_query\[0\]: must be 6 head indices"),
        ({"rotary_slots": [None]}, "rotary_slots: must be a list of 3"),
        ({"rotary_slots": [None, [[0, 1, 2, 3]], None]}, r"rotary_slots\[1\]: must be null or 2 lists"),
        ({"rotary_slots": [None, [[0, 1, 2, 3], [0, 1, 2]], None]}, r"rotary_slots\[1\]\[1\]: must be 4 integers"),
        ({"rotary_slots": [None, [[0, 1, 2, 4]] * 2, None]}, r"rotary_slots\[1\]\[0\]: must be 4 integers in \[0, 4\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_configs_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    fields = fused_config(SOURCES["llama"](), "free").to_dict()
    with pytest.raises(ValueError, match=message):
        HeadfuseConfig(**(fields | change))


def test_other_configs_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a HeadfuseConfig, not LlamaConfig"):
        HeadfuseForCausalLM(SOURCES["llama"]())


def test_shipped_files_stand_alone() -> None:
    shipped = {file.stem for file in MODELING_FILES}
    for file in MODELING_FILES:
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")):
                module = line.split()[1].split(".")
                allowed = module[1] in shipped if not module[0] else module[0] in {"torch", "transformers"}
                assert allowed or module[0] in sys.stdlib_module_names, line


def test_registration_is_idempotent() -> None:
    import importlib

    import headfuse.modeling

    importlib.reload(headfuse.modeling)
    fields = fused_config(SOURCES["llama"](), "gqa").to_dict()
    del fields["model_type"]
    assert isinstance(AutoConfig.for_model("headfuse", **fields), HeadfuseConfig)
