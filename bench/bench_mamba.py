"""The `mamba` and `mamba2` layers against transformers' of the same sizes: time forward and backward, and peak memory.

    python bench/bench_mamba.py OUT.json [--threads 1 2] [--rounds 2] [--only mamba2]

Every figure is measured in a process of its own, so that peak memory is that case's and no other's; cases take turns,
and the least of all rounds is kept, once with the allocator as Python starts it and once as the recollect command sets
it, for all alike. ``cpu_ms`` is processor time, which a busy machine disturbs less than the clock.
``memory_mib`` is the peak resident set less what the process held before the first full-sized call. ``loop`` is the
layer as one writes it plainly, with PyTorch's operations and a loop over positions; ``scan`` is the selective scan
alone. transformers' Mamba has a backward that is quadratic in length, so it runs at 256 positions, and ours beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH, D_MODEL, D_HEAD = 8, 2048, 256, 64
SHORT = 256
REPEATS = 3
ALLOCATORS = {
    "default": {},
    "keeping": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
}
"""As a Python process starts, and as the recollect command does: glibc then keeps large blocks instead of giving them
back to the system after every use.
"""

CASES = [
    *[
        ("mamba2", which, LENGTH, d_state)
        for d_state in (64, 128)
        for which in ("ours", "hf256", "hf128", "hf64", "hf32")
    ],
    *[(kind, which, LENGTH, 16) for kind in ("mamba", "scan") for which in ("ours", "loop")],
    *[("mamba", which, SHORT, 16) for which in ("ours", "hf")],
]


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/mamba.json"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--allocators", choices=ALLOCATORS, nargs="+", default=list(ALLOCATORS))
    parser.add_argument("--only", choices=("mamba", "mamba2", "scan"))
    parser.add_argument("--case", nargs=5, metavar=("KIND", "WHICH", "LENGTH", "D_STATE", "THREADS"), help="one case")
    arguments = parser.parse_args()
    if arguments.case:
        kind, which, *numbers = arguments.case
        print(json.dumps(measure(kind, which, *map(int, numbers))))
        return
    wanted = [case for case in CASES if arguments.only in (None, case[0])]
    cases = [(*case, n, kind) for kind in arguments.allocators for n in arguments.threads for case in wanted]
    best: dict[tuple[object, ...], dict[str, object]] = {}
    for _ in range(arguments.rounds):
        for case in cases:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            environment |= ALLOCATORS[case[-1]] | {"OMP_NUM_THREADS": str(case[-2])}
            command = [sys.executable, __file__, "--case", *map(str, case[:-1])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            row = json.loads(done.stdout.splitlines()[-1]) | {"allocator": case[-1]}
            before = best.setdefault(case, row)
            for figure in ("wall_ms", "cpu_ms", "memory_mib"):
                before[figure] = min(before[figure], row[figure])
    print("| layer | which | positions | d_state | threads | allocator | wall, ms | processor, ms | peak memory, MiB |")
    print("| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for (kind, which, length, d_state, threads, allocator), row in best.items():
        figures = " | ".join(f"{row[figure]:,.0f}" for figure in ("wall_ms", "cpu_ms", "memory_mib"))
        print(f"| {kind} | {which} | {length:,} | {d_state} | {threads} | {allocator} | {figures} |")
    result = {"batch": BATCH, "d_model": D_MODEL, "d_head": D_HEAD, **_machine(), "rows": list(best.values())}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def measure(kind: str, which: str, length: int, d_state: int, threads: int) -> dict[str, object]:
    """The least milliseconds of forward and backward together over a few repeats, and peak memory."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = scan(which, d_state) if kind == "scan" else build(kind, which, d_state)
    width = 2 * D_MODEL if kind == "scan" else D_MODEL
    x = torch.randn(BATCH, length, width, requires_grad=True)
    gradient = torch.randn(BATCH, length, width)

    def once(n: int) -> None:
        x.grad = None
        y = run(x[:, :n])
        (y if isinstance(y, torch.Tensor) else y.y).backward(gradient[:, :n])

    once(64)  # kernels compiled, allocator started
    before = _peak_mib()
    wall, cpu = [], []
    for _ in range(REPEATS):
        started, used = time.perf_counter(), time.process_time()
        once(length)
        wall.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - used))
    return {
        "layer": kind,
        "which": which,
        "length": length,
        "d_state": d_state,
        "threads": threads,
        "wall_ms": round(min(wall), 1),
        "cpu_ms": round(min(cpu), 1),
        "memory_mib": round(_peak_mib() - before, 1),
    }


def build(kind: str, which: str, d_state: int) -> Any:
    """The layer of a case."""
    if which.startswith("hf"):
        from transformers import Mamba2Config, MambaConfig, logging
        from transformers.models.mamba.modeling_mamba import MambaMixer
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        logging.set_verbosity_error()
        sizes = {"hidden_size": D_MODEL, "state_size": d_state, "expand": 2, "num_hidden_layers": 1}
        if kind == "mamba":
            return MambaMixer(MambaConfig(**sizes), 0)
        heads = {"num_heads": 2 * D_MODEL // D_HEAD, "head_dim": D_HEAD, "n_groups": 1, "chunk_size": int(which[2:])}
        return Mamba2Mixer(Mamba2Config(**sizes, **heads), 0)

    from recollect.layers.mamba import Mamba
    from recollect.layers.mamba2 import Mamba2

    if kind == "mamba2":
        return Mamba2(Mamba2.Config(D_MODEL, d_state=d_state, d_head=D_HEAD))
    layer = Mamba(Mamba.Config(D_MODEL, d_state=d_state))
    return plain(layer) if which == "loop" else layer


def plain(layer: Any) -> Any:
    """The Mamba layer written with PyTorch's operations, its scan a loop over positions."""
    import torch
    from torch.nn import functional as F

    from recollect.ops.selective_scan import selective_scan_reference

    config = layer.config

    def forward(x: torch.Tensor) -> torch.Tensor:
        u, z = layer.in_proj(x).chunk(2, -1)
        u = F.silu(layer.conv1d(F.pad(u.mT, (config.d_conv - 1, 0))).mT)
        dt, B, C = layer.x_proj(u).split([config.rank, config.d_state, config.d_state], -1)
        dt = F.softplus(layer.dt_proj(dt))
        y, _ = selective_scan_reference(u, dt, -torch.exp(layer.A_log), B, C, layer.D)
        return layer.out_proj(y * F.silu(z))

    return forward


def scan(which: str, d_state: int) -> Any:
    """The selective scan of inputs u, with the other inputs fixed leaves that receive gradients too."""
    import torch

    from recollect.ops.selective_scan import selective_scan, selective_scan_reference

    width = 2 * D_MODEL
    dt = (0.001 + 0.1 * torch.rand(BATCH, LENGTH, width)).requires_grad_()
    A = -torch.arange(1.0, d_state + 1).repeat(width, 1).requires_grad_()
    B, C = (torch.randn(BATCH, LENGTH, d_state, requires_grad=True) for _ in range(2))
    D = torch.ones(width, requires_grad=True)
    function = selective_scan if which == "ours" else selective_scan_reference

    def forward(u: torch.Tensor) -> torch.Tensor:
        n = u.shape[1]
        return function(u, dt[:, :n], A, B[:, :n], C[:, :n], D)[0]

    return forward


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _machine() -> dict[str, str]:
    import torch
    import transformers

    from recollect.train.runtime import environment

    facts = environment(torch.device("cpu"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return versions | {"device": facts["device"], "commit": facts["commit"]}


if __name__ == "__main__":
    main()
