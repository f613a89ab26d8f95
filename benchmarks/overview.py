"""The first table of the results: `python benchmarks/overview.py` writes it into docs/results/index.md.

Model x kept cache x method, from what the other benchmarks measured: benchmarks/results/quality.jsonl (quality.py),
peers.jsonl (peers.py) and tasks.jsonl (tasks.py). It measures nothing itself.
"""

from __future__ import annotations

from pathlib import Path

from peers_page import NAMES, OURS, PEERS, Row, best_of, grouped, in_words, of_most_samples, rows, share

TASKS = Path("benchmarks/results/tasks.jsonl")
PAGE = Path("docs/results/index.md")
BEGIN, END = "<!-- Written by `python benchmarks/overview.py`. -->", "<!-- The end of what is written. -->"
STORED_AS_FLOAT32 = ("smollm2-135m",)
"""Models whose measured folder is float32; the table counts two bytes for a number in the cache."""
OWN_DOMAIN = {"qwen2.5-coder-0.5b": "code", "qwen2.5-coder-1.5b": "code"}
"""Text like the model's; of the others `redpajama`, which is also what they were calibrated on."""
SHOWN = {
    ("latent", "fast"), ("latent", "balanced"), ("latent", "best"),
    ("decoupled", "balanced"), ("decoupled", "best"), ("gqa", "balanced"), ("gqa", "best"), ("gqa", "mean"),
}  # fmt: skip
"""Layout and conversion of the rows of headfuse; those that read other layers are shown, too."""
COMMANDS = {
    "Q": "python benchmarks/quality.py --model NAME=FOLDER --budget KEPT --layout LAYOUT --conversion PRESET "
    "--allocator ALLOCATOR --samples N --seed 0 1 2 --data redpajama_train.jsonl --text wikitext2=FILE OWN=FILE "
    "--windows 24 "
    "[--options 'OPTIONS BEHIND THE PRESET']",
    "P": "python benchmarks/peers.py PEER --checkout FOLDER --commit ID --model FOLDER --name NAME --kept KEPT",
    "T": "python benchmarks/tasks.py --model NAME=FOLDER --budget KEPT --layout LAYOUT --conversion PRESET "
    "--samples N --limit 50 --data redpajama_train.jsonl --tasks-path TASKS [--options ...] [--dtype bfloat16]",
}


def main() -> None:
    """Write the table between the marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def table() -> str:
    """All rows, and the commands that their letters stand for."""
    ours, peers, tasks = rows(OURS), rows(PEERS), rows(TASKS) if TASKS.exists() else []
    lines = [
        "",
        "| model | kept | method | allocator | windows | NLL added, WikiText-2 | own domain | tasks "
        "| bytes per token | by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    sources = {row["model"]: row for row in ours if row["conversion"] == "source"}
    for model, base in sources.items():
        found = [*own_rows(ours, base, tasks), *peer_rows(peers, base)]
        for kept, _, cells in sorted(found, key=lambda row: (-share(row[0]), row[1])):
            full = base["kv_bytes_per_token"] / (2 if model in STORED_AS_FLOAT32 else 1)
            lines.append(f"| {model} | {kept} | {cells.format(bytes=f'{round(full * share(kept)):,}')} |")
    lines += ["", *(f"- {letter}: `{command}`" for letter, command in COMMANDS.items())]
    return "\n".join(lines)


def own_rows(ours: list[Row], base: Row, tasks: list[Row]) -> list[tuple[str, float, str]]:
    """Budget, NLL added on WikiText-2, and the cells of every row of headfuse and of mean-pooled GQA."""
    result = []
    of_model = (row for row in ours if row["model"] == base["model"])
    for (budget, layout, conversion, options), used in of_most_samples(of_model).items():
        if (layout, conversion) not in SHOWN and not layout.startswith("latent, reads"):
            continue
        most, (wikitext, own) = used[0]["samples"], added(used, base)
        name = "mean-pooled GQA" if conversion == "mean" else f"headfuse {in_words(layout)}, `{conversion}`"
        seeds = f" ({len(used)} samples)" if len(used) > 1 else ""
        name += f", `{options}`" if options else ""
        score = task_cell(tasks, (base["model"], budget, layout, conversion, options))
        name += f" | {'' if conversion == 'mean' else used[0]['allocator']}"
        cells = f"{name} | {most}{seeds} | {wikitext:.3f} | {own:.3f} | {score} | {{bytes}} | Q{', T' * bool(score)}"
        result.append((budget, wikitext, cells))
    return result


def added(group: list[Row], base: Row) -> tuple[float, float]:
    """Mean NLL of some rows minus that of the source, on WikiText-2 and on text of the model's own domain."""
    texts = ("wikitext2", OWN_DOMAIN.get(base["model"], "redpajama"))
    wikitext, own = (sum(row["nll"][text] for row in group) / len(group) - base["nll"][text] for text in texts)
    return wikitext, own


def task_cell(tasks: list[Row], which: tuple[str, ...]) -> str:
    """The accuracy of a conversion, where it was measured."""
    names = ("model", "budget", "layout", "conversion", "options")
    for row in tasks:
        if tuple(row.get(name, "") for name in names) == which and row["of"] == "standard":
            return relative_accuracy(row["mean"])
    return ""


def relative_accuracy(mean: Row) -> str:
    """Mean accuracy relative to the source's, with the standard error of the paired difference."""
    whole = mean["baseline"]["value"]
    return f"{mean['model']['value'] / whole:.3f} ± {(mean['difference']['stderr'] or 0) / whole:.3f}"


def peer_rows(peers: list[Row], base: Row) -> list[tuple[str, float, str]]:
    """The same of every peer's best setting at each budget."""
    converted = (row for row in peers if row["model"] == base["model"] and row["kept"] not in ("source", "1"))
    result = []
    for (kept, peer), group in grouped(converted, lambda row: (row["kept"], row["peer"])).items():
        best = best_of(group)
        wikitext, own = added([best], base)
        cells = f"{NAMES[peer]} | | {best['samples']} | {wikitext:.3f} | {own:.3f} | | {{bytes}} | P"
        result.append((kept, wikitext, cells))
    return result


if __name__ == "__main__":
    main()
