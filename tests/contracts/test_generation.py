"""What `generate` does by default is the source's, wherever the source says it and whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import headfuse.modeling  # noqa: F401  registers the layouts with code of their own
from headfuse.layouts import LAYOUTS
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

FIELDS: dict[str, Any] = {
    "max_length": 60, "min_length": 22, "max_time": 1e3, "use_cache": True, "early_stopping": True, "num_beams": 3,
    "repetition_penalty": 1.3, "length_penalty": 0.5, "no_repeat_ngram_size": 4, "bad_words_ids": [[9, 10]],
    "num_return_sequences": 2, "renormalize_logits": True, "forced_eos_token_id": 7, "remove_invalid_values": True,
    "exponential_decay_length_penalty": [30, 1.1], "suppress_tokens": [11, 12], "begin_suppress_tokens": [13],
    "sequence_bias": [[[14], 2.5]], "encoder_repetition_penalty": 1.2, "bos_token_id": 3, "eos_token_id": [7, 8],
    "pad_token_id": 4, "decoder_start_token_id": 5, "prompt_lookup_num_tokens": 2, "num_assistant_tokens": 6,
    "do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9,
    "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "output_scores": True, "return_dict_in_generate": True,
    "stop_strings": ["no more"], "guidance_scale": 1.5, "cache_implementation": "static", "max_cache_len": 99,
}  # fmt: skip
RUN = ("max_length", "min_length", "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "eos_token_id",
       "pad_token_id", "begin_suppress_tokens", "sequence_bias")  # fmt: skip
"""Those that a greedy run shows."""
PLACES = {"config.json": [0], "generation_config.json": [1], "both, which differ": [0, 1]}


def source_with(folder: Path, fields: dict[str, Any], files: list[int]) -> Path:
    """A model that holds generation parameters in config.json (0) and in generation_config.json (1)."""
    model = tiny_model(folder / "model")
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    if 0 in files:
        (model / "config.json").write_text(json.dumps(config | fields))
    if 1 in files:
        own = fields if files == [1] else {"max_length": 33, "eos_token_id": 21, "repetition_penalty": 1.1}
        (model / "generation_config.json").write_text(json.dumps(own))
    return model


def defaults(model: Any) -> dict[str, Any]:
    """The effective generation config, without how it came about."""
    fields: dict[str, Any] = model.generation_config.to_dict()
    return {name: value for name, value in fields.items() if name not in ("transformers_version", "_from_model_config")}


@pytest.fixture(scope="module", params=PLACES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source and each layout of it, without loss."""
    folder = tmp_path_factory.mktemp("generation")
    model = source_with(folder, FIELDS, PLACES[request.param])
    for layout in LAYOUTS:
        fuse(model, folder / layout, "--budget", 1, "--layout", layout, "--preset", "fast", "--samples", 2)
    run("export", folder / "layerwise", "--to", "gqa", "-o", folder / "exported")
    text = ("--data", folder / "text.txt", "--tokens", 32, "--sequence-length", 16, "--batch-size", 1)
    run("uptrain", folder / "decoupled", "-o", folder / "uptrained", *text, "-q")
    return {name: folder / name for name in ("model", *LAYOUTS, "exported", "uptrained")}


@pytest.mark.parametrize("name", [*LAYOUTS, "exported", "uptrained"])
def test_all_generation_fields_are_the_sources(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    source, ours = (AutoModelForCausalLM.from_pretrained(models[key]) for key in ("model", name))
    want, unset = defaults(source), GenerationConfig().to_dict()
    assert sum(want[field] != unset[field] for field in FIELDS) in (3, len(FIELDS))  # the test sets what it compares
    assert defaults(ours) == want
    ours.save_pretrained(tmp_path / "saved")
    assert defaults(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == want


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_and_pipeline_obey_what_only_config_json_says(layout: str, tmp_path: Path) -> None:
    model = source_with(tmp_path, {}, [])
    prompt, tokenizer = torch.tensor([[40, 60, 77]]), AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model).generate(prompt, max_length=30, eos_token_id=None)
    fields = {name: FIELDS[name] for name in RUN} | {"eos_token_id": int(plain[0, 8]), "min_length": 5}
    model = source_with(tmp_path, fields, [0])
    fuse(model, tmp_path / "out", "--budget", 1, "--layout", layout, "--preset", "fast", "--samples", 2)
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out")]
    source, ours = (one.generate(prompt) for one in loaded)
    assert torch.equal(source, ours)
    assert not torch.equal(source, plain)
    texts = []
    for one in loaded:
        torch.manual_seed(0)  # a pipeline samples
        texts.append(pipeline("text-generation", one, tokenizer=tokenizer)("the head of a key"))
    assert texts[0] == texts[1]


def test_values_that_transformers_refuses_are_refused_before_any_work(tmp_path: Path) -> None:
    model = source_with(tmp_path, {"max_new_tokens": -3}, [0])
    message = " ".join(run("fuse", model, "-b", "0.5", "--dry-run", code=1).split())
    assert "generation parameters are not valid" in message
    assert "max_new_tokens" in message
