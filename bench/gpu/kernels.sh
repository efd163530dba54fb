#!/usr/bin/env bash
# Check the kernels on a GPU, then time them, in slices of nine minutes; run it again with the last slice's folder to go on.
#
#   bench/gpu/kernels.sh OUT [FROM]
#
#   OUT    where check-kernels.json, attention.json, scans.json, steps.json and tables.md go
#   FROM   the OUT of an earlier slice, copied to OUT and gone on from
#
#   SLICE  how long a slice may take (540)
#   PARTS  which, in order ("check attention scans steps")
#   STEPS  options of time_steps.py ("--only recall")
#
# Figures already in a file are kept while commit, device and torch are the same. A case that differs from PyTorch's
# operations is printed and does not end the slice: the times say nothing until it is mended.
set -uo pipefail
out=${1:?usage: bench/gpu/kernels.sh OUT [FROM]}
from=${2:-}
limit=${SLICE:-540}
parts=${PARTS:-check attention scans steps}
python=${PYTHON:-python3}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
deadline=$((SECONDS + limit))
mkdir -p "$out"
if [ -n "$from" ]; then cp -r "$from"/. "$out"/ && chmod -R u+w "$out"; fi

slice() {
  left=$((deadline - SECONDS - 10))
  if [ "$left" -lt 15 ]; then
    echo "no time left for: $*" >&2
    return
  fi
  timeout --signal=TERM --kill-after=10 "$left" "$python" "$@" || echo "$1 ended with status $?" >&2
}

for part in $parts; do
  case "$part" in
    check) slice bench/gpu/check_kernels.py --device cuda --out "$out/check-kernels.json" ;;
    attention) slice bench/gpu/time_attention.py "$out/attention.json" ;;
    scans) slice bench/gpu/time_scans.py "$out/scans.json" ;;
    # shellcheck disable=SC2086
    steps) slice bench/gpu/time_steps.py "$out/steps.json" ${STEPS:-} ;;
    *)
      echo "PARTS: '$part' is none of check, attention, scans, steps" >&2
      exit 2
      ;;
  esac
done
"$python" bench/gpu/tables.py "$out" >"$out/tables.md" && cat "$out/tables.md"
