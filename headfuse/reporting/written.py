"""Writes the report of a model folder, with the figures that another command printed."""

from __future__ import annotations

from pathlib import Path

from headfuse.reporting.report import read_document, write_report


def report(
    folder: str | Path,
    *,
    figures: str | Path | None = None,
    analysis: str | Path | None = None,
    output: str | Path = "report.html",
) -> Path:
    """Write an HTML report about a fused model.

    Args:
        folder: the model's folder.
        figures: a file with what `headfuse eval --json` printed.
        analysis: the output folder of `headfuse analyze`, for the heat maps.
        output: the file to write.

    Returns:
        `output`.

    Raises:
        HeadfuseError: for a folder of which there is nothing to report, and files that cannot be read or written.
    """
    document = None if figures is None else read_document(Path(figures))
    write_report(Path(output), Path(folder), document, None if analysis is None else Path(analysis))
    return Path(output)
