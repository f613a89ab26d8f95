"""The verdicts of gates for CI: JUnit XML, and the summary page of a GitHub job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from headfuse.errors import ConfigError, OutputError
from headfuse.evaluation.gates import GateResult

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def write_verdicts(document: Mapping[str, Any], junit: Path | None, summary: bool) -> None:
    """Write the documents that were asked for.

    Raises:
        OutputError: where a file cannot be written.
    """
    judged = [GateResult(**gate) for gate in document["gates"]]
    if junit is not None:
        _write(junit, junit_xml(judged, document["command"]), "w")
    if summary:
        _write(Path(os.environ[SUMMARY_VARIABLE]), markdown(document, judged), "a")


def check_summary(summary: bool) -> None:
    """Raise ConfigError when the summary of a GitHub job is asked for outside one; called before the work."""
    if summary and not os.environ.get(SUMMARY_VARIABLE):
        raise ConfigError(
            f"{SUMMARY_VARIABLE} is not set", where="--github-summary", fix="GitHub sets it to a file in its jobs"
        )


def junit_xml(judged: Sequence[GateResult], command: str) -> str:
    """One test case for each gate; a failed one holds its message."""
    failures = sum(not gate.passed for gate in judged)
    suite = ElementTree.Element(
        "testsuite", name=f"headfuse {command}", tests=str(len(judged)), failures=str(failures), errors="0", skipped="0"
    )
    for gate in judged:
        case = ElementTree.SubElement(suite, "testcase", classname=f"headfuse.{command}", name=gate.gate, time="0")
        if not gate.passed:
            ElementTree.SubElement(case, "failure", message=str(gate), type="gate").text = str(gate)
        ElementTree.SubElement(case, "system-out").text = str(gate)
    root = ElementTree.Element("testsuites", tests=str(len(judged)), failures=str(failures))
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(document: Mapping[str, Any], judged: Sequence[GateResult]) -> str:
    """A table of the gates."""
    name = (document.get("model") or {}).get("name") or document.get("output") or "model"
    lines = [
        f"### headfuse {document['command']}: {_cell(Path(str(name)).name)}", "",
        "| gate | | value | threshold | standard error | sample |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for gate in judged:
        size = "" if gate.samples is None else f"{gate.samples} {gate.unit}"
        cells = [_number(gate.value), _number(gate.threshold), _number(gate.stderr), size]
        lines.append(f"| `{gate.gate}` | {'passed' if gate.passed else '**FAILED**'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _write(path: Path, text: str, mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise OutputError(
            f"cannot be written: {error.strerror}", where=path, fix="check the path and its folder"
        ) from None
