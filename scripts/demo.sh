#!/usr/bin/env bash
# Sets up .venv, then analyzes, fuses, uptrains and evaluates the bundled model at an eighth of its cache: one table.
source "$(dirname "$0")/setup.sh"
model=examples/mha-6m out=outputs/demo
mkdir -p "$out"
# Every eighth document of the packaged text is for evaluation only.
python - "$out" <<'PY'
import sys
from pathlib import Path
documents = Path("headfuse/data/prose.txt").read_text(encoding="utf-8").split("\f")
for name, chosen in (("seen", [d for i, d in enumerate(documents) if i % 8 != 3]), ("unseen", documents[3::8])):
    (Path(sys.argv[1]) / f"{name}.txt").write_text("\n\n".join(chosen), encoding="utf-8")
PY
seen=$out/seen.txt unseen=$out/unseen.txt
headfuse analyze $model --budget 1/8 --data $seen --samples 16 --output $out/analysis --overwrite
headfuse fuse $model --budget 1/8 --layout gqa --method mean --grouping neighbours --data $seen --samples 16 \
    --output $out/mean --overwrite --quiet
headfuse fuse $model --budget 1/8 --data $seen --output $out/fused --overwrite
headfuse uptrain $out/fused --teacher $model --data $seen --tokens 80k --learning-rate 1e-4 \
    --output $out/uptrained --overwrite
for name in mean fused uptrained; do
    headfuse eval $out/$name --baseline $model --data $unseen --json >$out/$name.json
done
headfuse report $out/uptrained --figures $out/uptrained.json --analysis $out/analysis --output $out/report.html --quiet
python - "$out" <<'PY'
import json, sys
from pathlib import Path
from rich.console import Console
from rich.table import Table
out = Path(sys.argv[1])
results = {name: json.loads((out / f"{name}.json").read_text()) for name in ("mean", "fused", "uptrained")}
rows = {"source": results["mean"]["baseline"], "mean-pooled GQA": results["mean"]["model"],
        "fused": results["fused"]["model"], "fused, uptrained": results["uptrained"]["model"]}
table = Table("model", "NLL per token", "KV bytes per token",
              title=f"Text that nothing was fitted to, {results['mean']['windows']} x 512 tokens")
for name, row in rows.items():
    table.add_row(name, f"{row['nll']:.3f}", f"{row['kv_bytes_per_token']:,}")
Console().print(table)
print(f"The report of the uptrained model: {out / 'report.html'}")
PY
