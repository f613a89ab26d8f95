"""The page of decode.py: the three tables of benchmarks/results/decode.jsonl."""

from __future__ import annotations

from typing import Any

PARTS = ("attention", "step", "llama.cpp")


def document(rows: list[dict[str, Any]]) -> str:
    """The page with the three tables."""
    by_part = {part: [row for row in rows if row["case"]["part"] == part] for part in PARTS}
    lines = [
        "# Decoding speed",
        "Written by `python benchmarks/decode.py` from benchmarks/results/decode.jsonl. All runs are in float32 on one",
        "CPU thread, with rivals taking turns step by step. Ratios are medians of paired runs. Milliseconds are CPU",
        "times of that thread and show the order of magnitude alone. What was run:",
        "",
        "    python benchmarks/decode.py --context 512 2048 4096 --max-mib 400 \\",
        "        --model mha-6m=examples/mha-6m smollm2=smollm2 'llama-2-7b, one layer' \\",
        "        --gguf mha-6m source.gguf quarter.gguf --gguf 'mha-6m 1/2' source.gguf half.gguf \\",
        "        --gguf smollm2 smollm2.gguf third.gguf",
        "    python benchmarks/decode.py --part attention step --context 16384 --batch 1 --max-mib 800 \\",
        "        --model mha-6m=examples/mha-6m smollm2=smollm2 'llama-2-7b, one layer'",
        "",
        "in parts, with up to 61 steps. llama.cpp: `mha-6m` is the bundled model at 1/4, `mha-6m 1/2` at a half,",
        "`smollm2` at a third, all layout `gqa`. The llama layer at 512 and 16384, and steps of the llama",
        "layer, of smollm2 up to 4096 and of mha-6m from 4096, were measured before the model code made fewer calls a",
        "step: upper bounds. Below 4096, unequal groups of heads with 64 channels can be slower than SDPA.",
    ]
    if by_part["attention"]:
        lines += [
            "",
            "## One decode step's attention",
            "Time of a fused layer, relative to torch's SDPA on a stock GQA layer with the same cache bytes. `2+6` has",
            "two key heads and six value heads; maps are free. KV caches exceed the processor's own cache, as in a",
            "model of many layers. The floor is one key head and one value head.",
            "",
            "| shape | batch | context | stock KV heads | cache MiB | SDPA ms | fused / SDPA | floor |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for row in by_part["attention"]:
        case, ratios = row["case"], ", ".join(f"{name}: {value:.2f}" for name, value in row["ratios"].items())
        lines.append(
            f"| {case['model']} | {case['batch']} | {case['context']} | {case['kv_heads']} "
            f"| {row['bytes'] / 2**20:.1f} | {row['sdpa_ms']:.2f} | {ratios} | {row['floor']:.2f} |"
        )
    if by_part["step"]:
        lines += [
            "",
            "## A whole decode step in transformers",
            "Dynamic cache. For every budget: cache bytes and time, relative to the source's.",
            "",
            "| model | batch | context | source MiB | source ms | source tokens/s | budget | bytes | time | tokens/s |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for row in by_part["step"]:
        case, source = row["case"], row["ms"]["source"]
        for budget, value in row["ratios"].items():
            lines.append(
                f"| {case['model']} | {case['batch']} | {case['context']} | {row['bytes']['source'] / 2**20:.1f} "
                f"| {source:.1f} | {1e3 * case['batch'] / source:.0f} | {budget} "
                f"| {row['bytes'][budget] / row['bytes']['source']:.3f} | {value:.2f} "
                f"| {1e3 * case['batch'] / row['ms'][budget]:.0f} |"
            )
    if by_part["llama.cpp"]:
        lines += [
            "",
            "## llama.cpp",
            "GGUF files of `headfuse export --to gguf`, one sequence, float16 cache, llama.cpp's own wall clock.",
            "",
            "| model | context | source ms a token | fused ms a token | time |",
            "|---|---|---|---|---|",
        ]
    for row in by_part["llama.cpp"]:
        case = row["case"]
        if "skipped" in row:
            lines.append(f"| {case['model']} | {case['context']} | skipped: {row['skipped']} | | |")
        else:
            ms = row["ms"]
            lines.append(
                f"| {case['model']} | {case['context']} | {ms['source']:.2f} | {ms['fused']:.2f} | {row['ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"
