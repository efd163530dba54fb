"""Sparse attention against full attention by length: time forward and backward, and peak memory.

    python bench/bench_attention.py OUT.json [--longest 131072]

Every figure is measured in a process of its own, so that peak memory is that case's and no other's. ``memory_mib`` is
the peak resident set less what the process held before the inputs were made. HAX (LSH 32 of 2^8 buckets, key selection
32; once more in the published shape, one head with values of 256) and a window of 64 run ``ops.sparse_attention``, as a
compiled loop over time, in tiles and dense; ``sdpa`` is PyTorch's own causal attention on the same heads, given
up at the length where it would take minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

HEADS, D_KEY, D_VALUE = 4, 32, 32
ONE_HEAD_VALUE = 256
SDPA_LONGEST = TILED_LONGEST = 16_384
REPEATS = {1024: 5, 4096: 3}


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/attention.json"))
    parser.add_argument("--longest", type=int, default=131_072)
    parser.add_argument("--case", nargs=3, metavar=("KIND", "PATH", "LENGTH"), help="measure one case and print it")
    arguments = parser.parse_args()
    if arguments.case:
        kind, path, length = arguments.case
        print(json.dumps(measure(kind, path, int(length))))
        return
    lengths = [n for n in (128, 256, 512, 1024, 4096, 16_384, 65_536, 131_072) if n <= arguments.longest]
    cases = [(kind, "streaming", n) for n in lengths for kind in ("hax", "hax-one-head", "window")]
    cases += [(kind, "tiled", n) for n in lengths for kind in ("hax", "window") if n <= TILED_LONGEST]
    cases += [(kind, "dense", n) for n in lengths for kind in ("hax", "window") if n <= 1024]
    cases += [("sdpa", "sdpa", n) for n in lengths if n <= SDPA_LONGEST]
    rows = []
    print("| kind | path | tokens | forward + backward, ms | peak memory, MiB |")
    print("| --- | --- | ---: | ---: | ---: |")
    for kind, path, length in cases:
        command = [sys.executable, __file__, "--case", kind, path, str(length)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(f"| {kind} | {path} | {length:,} | {row['forward_backward_ms']:,.0f} | {row['memory_mib']:,.0f} |")
    result = {"heads": HEADS, "d_key": D_KEY, "d_value": D_VALUE, "threads": 1, **_machine(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def measure(kind: str, path: str, length: int) -> dict[str, object]:
    """Median milliseconds of forward and backward together, and peak memory, for one row of ``length`` tokens."""
    import torch
    from torch.nn import functional as F

    from recollect.ops.hashing import draw_planes, sign_buckets
    from recollect.ops.patterns import KeySelection, Lsh, Window
    from recollect.ops.sparse_attention import Buckets, sparse_attention

    torch.set_num_threads(1)
    torch.manual_seed(0)
    lsh = Lsh(32, n_bits=8)
    hax = kind.startswith("hax")
    patterns = (lsh, KeySelection(32)) if hax else (Window(64),)
    heads, d_value = (1, ONE_HEAD_VALUE) if kind == "hax-one-head" else (HEADS, D_VALUE)
    planes = draw_planes(D_KEY, heads, lsh.n_rounds, lsh.n_bits)

    def once(n: int) -> None:
        q, k = (torch.randn(1, n, heads, D_KEY, requires_grad=True) for _ in range(2))
        v = torch.randn(1, n, heads, d_value, requires_grad=True)
        if kind == "sdpa":
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        else:
            score = torch.randn(1, n, heads) if hax else None
            buckets = Buckets(sign_buckets(q, planes), sign_buckets(k, planes)) if hax else None
            y, _ = sparse_attention(q, k, v, patterns, score_BLH=score, buckets=buckets, path=path)
        y.square().sum().backward()

    once(128)  # code paths warm, kernels compiled, allocator started
    before = _peak_mib()
    seconds = []
    for _ in range(REPEATS.get(length, 7 if length < 1024 else 1)):
        started = time.perf_counter()
        once(length)
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "kind": kind,
        "path": path,
        "length": length,
        "forward_backward_ms": round(1000 * median, 2),
        "memory_mib": round(_peak_mib() - before, 1),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _machine() -> dict[str, str]:
    import torch

    from recollect.train.runtime import environment

    facts = environment(torch.device("cpu"))
    return {"torch": torch.__version__, "device": facts["device"], "commit": facts["commit"]}


if __name__ == "__main__":
    main()
