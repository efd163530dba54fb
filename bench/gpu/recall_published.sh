#!/usr/bin/env bash
# One slice, of nine minutes by default, of training recall-published on a GPU; run it again with the last slice's
# folder to go on. Checks first that every row gives the same losses and gradients on the GPU as on the CPU.
#
#   bench/gpu/recall_published.sh OUT [FROM]
#
#   OUT   where runs, checks and tables go
#   FROM  the OUT of an earlier slice, copied to OUT and gone on from
#
#   ROWS     rows and seeds in the order to train them ("mamba2+hax:0 mamba2+hax:1 mamba2+full:0 ...")
#   SLICE    how long a slice may take (540)
#   OPTIONS  further overrides ("train.steps=20000 problem.batch_size=64")
set -euo pipefail
out=${1:?usage: bench/gpu/recall_published.sh OUT [FROM]}
from=${2:-}
rows=${ROWS:-"mamba2+hax:0 mamba2+hax:1 mamba2+full:0 mamba2:0 mamba2+window:0 mamba2+lsh:0 mamba2+ks:0"}
limit=${SLICE:-540}
python=${PYTHON:-python3}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
deadline=$((SECONDS + limit))
mkdir -p "$out"
if [ -n "$from" ]; then cp -r "$from"/. "$out"/ && chmod -R u+w "$out"; fi

if [ ! -f "$out/check.json" ]; then
  "$python" bench/gpu/check_rows.py recall-published --device cuda --out "$out/check.json"
fi
for entry in $rows; do
  row=${entry%%:*} seed=${entry##*:}
  left=$((deadline - SECONDS - 15))
  [ "$left" -lt 20 ] && break
  # SIGTERM lets the run write a checkpoint; the next slice goes on from it.
  timeout --signal=TERM --kill-after=20 "$left" "$python" -m recollect train recall-published --row "$row" \
    --seed "$seed" --device cuda --data-workers 4 --out "$out/runs/recall/$row/seed$seed" \
    train.autocast=bf16 ${OPTIONS:-} || echo "$row seed $seed stopped with status $?" >&2
done
find "$out/runs" -name 'metrics.jsonl' -exec tail -n 1 {} \; -print
