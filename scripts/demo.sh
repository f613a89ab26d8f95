#!/usr/bin/env bash
# Sets up .venv, then analyzes, fuses, uptrains and evaluates the bundled model; ends in one table.
source "$(dirname "$0")/setup.sh"
model=examples/mha-6m out=outputs/demo text=headfuse/data/default.txt
mkdir -p "$out"
headfuse analyze $model --samples 16 --output $out/analysis --overwrite
headfuse fuse $model --budget 0.25 --layout gqa --method mean --grouping neighbours --samples 16 --output $out/mean --overwrite -q
headfuse fuse $model --budget 0.25 --samples 64 --output $out/fused --overwrite
headfuse uptrain $out/fused --teacher $model --data $text --tokens 20k --output $out/uptrained --overwrite -q
for name in mean fused uptrained; do
    headfuse eval $out/$name --baseline $model --json 2>/dev/null >$out/$name.json
done
python - $out <<'PY'
import json, sys
from pathlib import Path
from rich.console import Console
from rich.table import Table
table = Table("model", "NLL per token", "KV bytes per token", title="The packaged text, 24 x 512 tokens")
documents = {name: json.loads((Path(sys.argv[1]) / f"{name}.json").read_text()) for name in ("mean", "fused", "uptrained")}
rows = {"source": documents["mean"]["baseline"], "mean-pooled GQA": documents["mean"]["model"],
        "fused": documents["fused"]["model"], "fused, uptrained": documents["uptrained"]["model"]}
for name, row in rows.items():
    table.add_row(name, f"{row['nll']:.3f}", f"{row['kv_bytes_per_token']:,}")
Console().print(table)
PY
