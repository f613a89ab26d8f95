"""report.html: one file, escaped, with what the folder and the figures hold; gates of `fuse`; verdicts for CI."""

from __future__ import annotations

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headfuse.errors import OutputError
from headfuse.reporting.report import eval_command
from tests.support.commands import fuse, run
from tests.support.tiny_models import tiny_model

HOSTILE = "<script>alert('&')</script>$x^"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    tiny_model(folder / "model")
    document = fuse(folder / "model", folder / "fused", "--budget", 0.5, "--preset", "fast", "--gate", "kv_ratio<=0.5")
    assert [gate["passed"] for gate in document["gates"]] == [True]
    lines = [{"event": "step", "step": i, "loss": 1 / i} for i in (1, 2, 3)] + [{"event": "validation", "nll": 2.0}]
    log = [json.dumps(line) for line in lines] + ["broken {", "[1]", json.dumps({"loss": HOSTILE, "step": 1})]
    (folder / "fused" / "train_log.jsonl").write_text("\n".join(log))
    records = [{"text": (folder / "text.txt").read_text()[i : i + 600], "source": HOSTILE} for i in (0, 600)]
    (folder / f"{HOSTILE[:8]}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


class _Page(HTMLParser):
    """Tags, and every address that the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def test_one_file_with_everything(folder: Path) -> None:
    run(
        "analyze", folder / "model", "-o", folder / "analysis", "--budget", 0.5, "--data", folder / "text.txt",
        "--samples", 8, "--sequence-length", 32,
    )  # fmt: skip
    figures = folder / "figures.json"
    figures.write_text(
        run(
            "eval", folder / "fused", "--baseline", folder / "model", "--data", folder / f"{HOSTILE[:8]}.jsonl",
            "--samples", 4, "--sequence-length", 32, "--memory", "1MB", "--gate", "nll<=9*baseline", "--json",
        ).splitlines()[-1]
    )  # fmt: skip
    run("report", folder / "fused", "--figures", figures, "--analysis", folder / "analysis", "-o", folder / "r.html")
    text = (folder / "r.html").read_text()
    page = _Page(text)
    assert "script" not in page.tags
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.fetched)
    assert page.tags.count("svg") == 4  # heads, agreement by domain and by position, training
    assert page.tags.count("img") == 2
    for words in (
        "What was fused",
        "Similarity of heads",
        "Quality and memory",
        "Training",
        "Commands",
        "headfuse eval",
    ):
        assert words in text
    assert str(folder) not in text
    assert not re.search(r"url\((?!#)", text)


def test_a_folder_alone_and_none(folder: Path) -> None:
    run("report", folder / "fused", "-o", folder / "alone.html")
    assert "Quality and memory" not in (folder / "alone.html").read_text()
    assert "holds no plan.json" in run("report", folder / "model", "-o", folder / "none.html", code=1)
    assert not (folder / "none.html").exists()
    bad = ("--figures", folder / "text.txt", "-o", folder / "none.html")
    assert "cannot be read" in run("report", folder / "fused", *bad, code=1)
    assert "key_similarity.png" in run(
        "report", folder / "fused", "--analysis", folder / "model", "-o", folder / "none.html", code=1
    )


def test_gates_of_fuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gates: str, *args: object, code: int) -> str:
        text = ("--data", folder / "text.txt", "--samples", 8, "--sequence-length", 32, "--preset", "fast")
        out = ("-o", folder / "gated", "--overwrite", "--budget", 0.5)
        return run("fuse", folder / "model", *out, *text, "--gate", gates, *args, code=code)

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    output = convert("nll<=0*baseline,kv_ratio<=0.5", "--junit", folder / "j.xml", "--github-summary", code=3)
    assert "FAILED" in output
    assert (folder / "gated" / "plan.json").is_file()
    suite = ElementTree.parse(folder / "j.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert "| `nll<=0*baseline` | **FAILED** |" in (folder / "summary.md").read_text()
    gates = json.loads(convert("nll<=9,nll_gap<=9,kv_ratio<=1", "--json", code=0).splitlines()[-1])["gates"]
    assert [(gate["samples"], gate["unit"]) for gate in gates] == [(2, "windows")] * 2 + [(None, "windows")]
    assert gates[0]["stderr"] > 0
    assert gates[1]["stderr"] != gates[0]["stderr"]  # of the differences from the source, window by window
    assert gates[2]["stderr"] is None
    assert "not a figure of fuse" in convert("kl<=1", code=1)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert "GITHUB_STEP_SUMMARY" in convert("kv_ratio<=1", "--github-summary", code=1)


def test_analyze_writes_a_report_of_its_plan(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    text = ("--data", tmp_path / "text.txt", "--samples", 4, "--sequence-length", 32)
    run("analyze", model, "-o", tmp_path / "analysis", *text)
    page = (tmp_path / "analysis/report.html").read_text()
    assert "<title>headfuse report: plan for model</title>" in page
    assert page.count("data:image/png;base64,") == 2
    assert "partial" not in page


def measure(folder: Path, *args: object, model: str = "fused", code: int = 0) -> str:
    text = ("--data", folder / "text.txt", "--samples", 2, "--sequence-length", 16, "--json")
    return run("eval", folder / model, *text, *args, code=code)


def test_a_plan_that_cannot_be_read_stops_eval_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "fused", folder / "broken")
    (folder / "broken" / "plan.json").write_text("{")
    monkeypatch.setattr("headfuse.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert "plan.json" in measure(folder, "--report", folder / "b.html", model="broken", code=1)
    assert not (folder / "b.html").exists()


def test_figures_are_printed_even_where_a_file_beside_them_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    side = ("--report", folder / "full.html", "--junit", folder / "v.xml", "--gate", "nll<=0")
    assert "gates failed" in measure(folder, *side, code=3)
    assert 'failures="1"' in (folder / "v.xml").read_text()
    assert (folder / "full.html").is_file()
    monkeypatch.setattr("headfuse.reporting.report.write_whole", full)
    lines = measure(folder, *side, code=1).splitlines()
    (document,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert document["model"]["nll"] > 0
    assert "No space left on device" in " ".join(lines)


def test_a_conversion_is_printed_even_where_a_file_beside_it_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("No space left on device", where=folder / "j.xml", fix="free some")

    monkeypatch.setattr("headfuse.evaluation.ci_reports._write", full)
    text = ("--data", folder / "text.txt", "--samples", 4, "--sequence-length", 32, "--preset", "fast")
    side = ("--gate", "kv_ratio<=0.5", "--junit", folder / "j.xml", "--json")
    lines = run("fuse", folder / "model", "-o", folder / "beside", "--budget", 0.5, *text, *side, code=1).splitlines()
    (document,) = [json.loads(line) for line in lines if line.startswith("{")]
    assert Path(document["output"], "plan.json").is_file()
    assert "No space left on device" in " ".join(lines)


def test_the_command_of_a_report_measures_in_the_same_way(folder: Path) -> None:
    """It names the dtype and the folders of tasks, without their path."""
    document = json.loads(measure(folder, "--dtype", "bfloat16").splitlines()[-1])
    assert "--dtype bfloat16" in eval_command(document)
    tasks = [{"task": "piqa", "metric": "acc"}, {"task": "piqa", "metric": "acc_norm"}]
    document |= {"tasks": tasks, "tasks_path": ["tasks", "more tasks"]}
    assert "--tasks piqa --tasks-path tasks --tasks-path 'more tasks'" in eval_command(document)
    for key in ("dtype", "tasks_path"):  # as in a document of an older version
        document.pop(key)
    assert "--dtype" not in eval_command(document)
    assert "--tasks-path" not in eval_command(document)
