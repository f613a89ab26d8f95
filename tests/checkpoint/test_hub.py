"""Models of the hub: what is downloaded, revisions, and outputs of what lies in the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM

from headfuse.checkpoint.hub import at_revision, repository_of
from headfuse.plan import FusionPlan
from tests.support.commands import fuse, run
from tests.support.fake_hub import COMMITS, FakeHub, serve
from tests.support.tiny_models import tiny_model

TWINS = ("pytorch_model.bin", "model.fp16.safetensors", "consolidated.safetensors", "params.json", "model.gguf",
         "onnx/model.onnx", "original/consolidated.00.pth", "checkpoint-5/model.safetensors", "weights.zip",
         "optimizer.pt", "trainer_state.json")  # fmt: skip
QUICK = ("--samples", 8, "--sequence-length", 32, "--budget", 0.5)


def test_a_hub_out_of_reach_is_asked_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is in the cache is taken at once; what is not is an error at once, and no library talks of retries."""
    document("fuse", "acme/tiny", "--dry-run", *QUICK)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    document("fuse", "acme/tiny", "--dry-run", *QUICK)
    assert document("fuse", "acme/other", "--dry-run", code=1)["error"]["where"] == "acme/other"
    assert "Retry" not in caplog.text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """`acme/tiny` with shards and with twins of them, at `v1` with another model; the working directory is `work`."""
    main, other = tiny_model(tmp_path / "main"), tiny_model(tmp_path / "v1", kv_heads=2)
    loaded = AutoModelForCausalLM.from_pretrained(main)
    (main / "model.safetensors").unlink()
    loaded.save_pretrained(main, max_shard_size="20KB")
    for name in TWINS:
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_text("another copy of the weights")
    (main / "LICENSE").write_text("licence")
    (main / "additional_chat_templates").mkdir()
    (main / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    served = FakeHub({"main": main, "v1": other})
    with serve(served, tmp_path / "cache", monkeypatch):
        yield served


def document(*args: object, code: int = 0) -> dict[str, Any]:
    lines = run(*args, "--json", code=code).splitlines()
    found: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("{")))
    return found


def test_what_is_fetched_and_what_comes_of_it(hub: FakeHub, tmp_path: Path) -> None:
    written = document("fuse", "acme/tiny", "--data", tmp_path / "text.txt", *QUICK)["output"]
    out = tmp_path / "work/tiny-headfuse-0.5"
    assert Path(written) == out
    assert not hub.fetched & set(TWINS)
    assert {"LICENSE", "additional_chat_templates/tools.jinja", "config.json", "tokenizer.json"} <= hub.fetched
    assert {path.name for path in hub.branches["main"].glob("model-*.safetensors")} <= hub.fetched
    plan = FusionPlan.from_json((out / "plan.json").read_text())
    assert (plan.source.name, plan.source.revision) == ("acme/tiny", COMMITS["main"])
    assert (metadata_load(out / "README.md") or {})["base_model"] == "acme/tiny"
    assert COMMITS["main"] in (out / "README.md").read_text()
    assert f"acme/tiny@{COMMITS['main']}" in (out / "headfuse.yaml").read_text().splitlines()[0]
    assert (out / "LICENSE").read_text() == "licence"
    # the teacher is what plan.json names
    options = ["--data", tmp_path / "text.txt", "--tokens", 64, "--sequence-length", 16, "--batch-size", 1]
    assert document("uptrain", out, *options, "-o", "trained")["teacher"] == "acme/tiny"


def test_a_revision_with_every_command(hub: FakeHub, tmp_path: Path) -> None:
    model, text = ["acme/tiny", "--revision", "v1"], ["--data", tmp_path / "text.txt"]
    dry = document("fuse", *model, "--dry-run", *QUICK)
    assert dry["heads"]["source"] == 8, "the model at v1 has half as many as that at main"
    assert Path(dry["output"]) == tmp_path / "work/tiny-headfuse-0.5"
    document("analyze", *model, *text, *QUICK, "-o", "analysis")
    plan = FusionPlan.from_json(Path("analysis/plan.json").read_text())
    assert (plan.source.name, plan.source.revision) == ("acme/tiny", COMMITS["v1"])
    measured = document("eval", *model, *text, "--samples", 2, "--sequence-length", 16)["model"]
    assert measured["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    options = ["--tokens", 64, "--sequence-length", 16, "--batch-size", 1, "--loss", "ce"]
    trained = document("uptrain", *model, *text, *options)["output"]
    assert Path(trained) == tmp_path / "work/tiny-uptrained"
    assert json.loads((Path(trained) / "config.json").read_text())["num_key_value_heads"] == 2
    exported = document("export", *model, "--to", "layerwise")["output"]
    assert Path(exported) == tmp_path / "work/tiny-layerwise"


def test_the_next_commands_name_the_revision(hub: FakeHub, tmp_path: Path) -> None:
    line = ["acme/tiny", "--revision", "v1", "--trust-remote-code", "--data", tmp_path / "text.txt", *QUICK]
    of_eval, of_uptrain = document("fuse", *line, "--preset", "fast")["next"]
    assert "--baseline acme/tiny@v1 " in of_eval
    assert "--teacher acme/tiny@v1 " in of_uptrain
    assert of_eval.endswith("--trust-remote-code")


def test_a_revision_in_the_name(hub: FakeHub, tmp_path: Path) -> None:
    assert document("fuse", "acme/tiny@v1", "--dry-run", *QUICK)["heads"]["source"] == 8
    measures = ["--data", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 16]
    measured = document("eval", "acme/tiny@v1", "--baseline", "acme/tiny", *measures)
    assert (measured["model"]["name"], measured["kv_ratio"]) == ("acme/tiny@v1", 0.5)


def test_revisions_that_do_not_exist(hub: FakeHub, tmp_path: Path) -> None:
    error = document("fuse", "acme/tiny@nosuch", "--dry-run", code=1)["error"]
    assert error["where"] == "acme/tiny@nosuch"
    error = document("fuse", hub.branches["main"], "--revision", "v1", "--dry-run", code=1)["error"]
    assert error["where"] == "--revision"
    error = document("fuse", "acme/tiny@v1", "--revision", "v1", "--dry-run", code=1)["error"]
    assert error["where"] == "--revision"
    assert at_revision("acme/tiny", None) == "acme/tiny"


def test_pickles_and_adapters_are_refused_before_anything_is_fetched(hub: FakeHub) -> None:
    folder = hub.branches["main"]
    for path in folder.glob("model*"):
        path.unlink()
    error = document("fuse", "acme/tiny", "--dry-run", code=1)["error"]
    assert "pickled (pytorch_model.bin)" in error["what"]
    (folder / "adapter_config.json").write_text("{}")
    error = document("fuse", "acme/tiny", "--dry-run", code=1)["error"]
    assert "adapter_config.json" in error["what"]
    assert not hub.fetched


def test_a_hub_that_is_away(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document("fuse", "acme/tiny", "--dry-run", *QUICK)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched = set(hub.fetched)
    document("fuse", "acme/tiny", "--data", tmp_path / "text.txt", *QUICK, "-o", "out")
    assert Path("out/LICENSE").is_file()
    assert hub.fetched == fetched
    error = document("fuse", "acme/tiny@v1", "--dry-run", code=1)["error"]
    assert "HF_HUB_OFFLINE" in error["fix"]


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the hub's cache, as snapshot_download returns it; the working directory is `work`."""
    folder = tmp_path / f"hub/models--acme--tiny/snapshots/{COMMITS['main']}"
    tiny_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_a_snapshot_of_the_cache_by_its_path(snapshot: Path, tmp_path: Path) -> None:
    text = ["--data", tmp_path / "text.txt"]
    out = Path(document("fuse", snapshot, *text, *QUICK, "--layout", "gqa")["output"])
    assert out == tmp_path / "work/tiny-headfuse-0.5"
    plan = FusionPlan.from_json((out / "plan.json").read_text())
    assert (plan.source.name, plan.source.revision) == ("acme/tiny", COMMITS["main"])
    assert (metadata_load(out / "README.md") or {})["base_model"] == "acme/tiny"
    assert Path(document("export", snapshot, "--to", "layerwise")["output"]) == tmp_path / "work/tiny-layerwise"
    options = ["--tokens", 64, "--sequence-length", 16, "--batch-size", 1, "--loss", "ce"]
    assert Path(document("uptrain", snapshot, *text, *options)["output"]) == tmp_path / "work/tiny-uptrained"
    measured = document("eval", snapshot, *text, "--samples", 2, "--sequence-length", 16)["model"]
    assert measured["name"] == "acme/tiny"
    assert [path.name for path in snapshot.parent.iterdir()] == [COMMITS["main"]]


@pytest.mark.parametrize("command", ["fuse", "analyze", "uptrain", "export"])
def test_no_output_inside_the_cache(snapshot: Path, tmp_path: Path, command: str) -> None:
    out = snapshot.parent / "out"
    trained = ["--loss", "ce", "--tokens", 64, "--sequence-length", 16, "--data", tmp_path / "text.txt"]
    options: dict[str, list[Any]] = {"uptrain": trained, "export": ["--to", "layerwise"]}
    error = document(command, tmp_path / "model", *options.get(command, QUICK), "-o", out, code=1)["error"]
    assert "cache" in error["what"]
    assert "--output" in error["fix"]
    assert not out.exists()


def test_names_of_snapshots(tmp_path: Path) -> None:
    commit = COMMITS["v1"]
    found = repository_of(tmp_path / f"models--acme--tiny-1.5_b/snapshots/{commit}")
    assert found is not None
    assert (found.name, found.revision) == ("acme/tiny-1.5_b", commit)
    for path in ("model", f"datasets--acme--tiny/snapshots/{commit}", "models--acme--tiny/blobs/x"):
        assert repository_of(tmp_path / path) is None


def test_a_plan_without_a_revision_loads(tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model"), tmp_path / "out"
    fuse(model, out, "--budget", 0.5)
    raw = json.loads((out / "plan.json").read_text())
    assert raw["source"].pop("revision") is None
    plan = FusionPlan.from_json(json.dumps(raw))
    assert plan.source.model == "model"
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    fuse(model, tmp_path / "again", "--plan", tmp_path / "plan.json")
    with torch.no_grad():
        assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
