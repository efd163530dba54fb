#!/usr/bin/env bash
# One slice, of nine minutes by default, of training a recipe's rows on a GPU; run it again with the last slice's folder
# to go on. Checks first that every row gives the same losses and gradients on the GPU as on the CPU.
#
#   bench/gpu/train_rows.sh RECIPE OUT [FROM]
#
#   RECIPE   recall-published, worlds-paper-ENV, or language-mini
#   OUT      where runs, checks and tables go
#   FROM     the OUT of an earlier slice, copied to OUT and gone on from
#
#   ROWS     rows and seeds in the order to train them ("mamba2+hax:0 mamba2+hax:1 mamba2+full:0 ...")
#   SLICE    how long a slice may take (540)
#   OPTIONS  further overrides ("train.steps=20000 problem.batch_size=64")
#   WORKERS  processes that make episodes before, and batches while it trains (4)
set -euo pipefail
usage="usage: bench/gpu/train_rows.sh RECIPE OUT [FROM]"
recipe=${1:?$usage}
out=${2:?$usage}
from=${3:-}
limit=${SLICE:-540}
workers=${WORKERS:-4}
python=${PYTHON:-python3}
case "$recipe" in
  recall-*)
    group=recall
    rows="mamba2+hax:0 mamba2+hax:1 mamba2+full:0 mamba2:0 mamba2+window:0 mamba2+lsh:0 mamba2+ks:0"
    ;;
  worlds-*)
    group=$(sed -E 's/^worlds-[a-z]+-//' <<<"$recipe")
    rows="s5wm:0 s4wm:0 rssm:0 tssm:0 haxwm:0 mamba2wm:0"
    ;;
  language-*)
    group=language
    rows="none:0 HAX:0 recommended:0 LSH:0 KS:0 SW:0 SW+D:0 A:0 D:0 none-longer:0"
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
rows=${ROWS:-$rows}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
deadline=$((SECONDS + limit))
mkdir -p "$out"
if [ -n "$from" ]; then cp -r "$from"/. "$out"/ && chmod -R u+w "$out"; fi

# The model that rows go on from, finished or not, comes back with the runs; text and episodes are made again.
data=${RECOLLECT_DATA:-runs/data}
mkdir -p "$data"
if [ -d "$out/models" ]; then cp -rn "$out/models"/. "$data"/; fi
keep_models() {
  mkdir -p "$out/models"
  cp -ru "$data"/model-*/ "$out/models"/ 2>/dev/null || true
}
trap keep_models EXIT
timeout --signal=TERM --kill-after=20 $((deadline - SECONDS - 15)) \
  "$python" bench/gpu/make_data.py "$recipe" --workers "$workers" --device cuda || exit $?
if [ ! -f "$out/check.json" ]; then
  "$python" bench/gpu/check_rows.py "$recipe" --device cuda --out "$out/check.json"
fi
for entry in $rows; do
  row=${entry%%:*} seed=${entry##*:}
  left=$((deadline - SECONDS - 15))
  [ "$left" -lt 20 ] && break
  # SIGTERM lets the run write a checkpoint; the next slice goes on from it.
  timeout --signal=TERM --kill-after=20 "$left" "$python" -m recollect train "$recipe" --row "$row" \
    --seed "$seed" --device cuda --data-workers "$workers" --out "$out/runs/$group/$row/seed$seed" \
    train.autocast=bf16 ${OPTIONS:-} || echo "$row seed $seed stopped with status $?" >&2
done
find "$out/runs" -name 'metrics.jsonl' -exec tail -n 1 {} \; -print
