"""One training step of the recall lab on a CPU: rows x table sizes -> steps and tokens per second.

    python bench/bench_recall_step.py [--rows mamba2,mamba2+hax] [--sizes 3x3,5x5,8x8] [--seconds 2]

A step is what the training loop does: the batch, forward, loss, backward, clipping, AdamW. Two layers of width 64 and
32 tables of one size; the rows are the demo's widths on more patterns. Written to ``results/bench-recall-step.json``.
Processor time is given beside wall time, because it suffers less from what else the machine does; to compare two
versions run them in turn (``--package`` names another source folder) and compare the least times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCH, D_MODEL = 32, 64
ROWS = (
    "mamba2",
    "mamba2+hax",
    "mamba2+hax-ranked",
    "mamba2+window",
    "mamba2+dilated",
    "mamba2+lsh",
    "mamba2+ks",
    "mamba2+full",
    "mamba",
    "mamba+hax",
    "gated_deltanet",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS))
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["3x3", "5x5", "8x8"])
    parser.add_argument("--seconds", type=float, default=2.0, help="per row and size, after warming up")
    parser.add_argument("--package", type=Path, action="append", help="a source folder; several are run in turn")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench-recall-step.json")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.seconds)))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.rows:
        for size in arguments.sizes:
            for package in arguments.package or [ROOT / "src"]:
                rows.append(run(name, size, arguments.seconds, package))
                print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    result = {"bench": "recall-step", "batch": BATCH, "d_model": D_MODEL, "threads": 1, **_machine(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def run(name: str, size: str, seconds: float, package: Path) -> dict[str, Any]:
    """One case in a process of its own, with one thread and the allocator that training uses."""
    sys.path.insert(0, str(ROOT / "src"))
    from recollect.train.runtime import allocator_env

    environment = {**os.environ, **allocator_env(os.environ), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, "--seconds", str(seconds), "--case", name, size]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    row = json.loads(done.stdout.splitlines()[-1])
    return row if package == ROOT / "src" else {"package": str(package), **row}


def measure(name: str, size: str, seconds: float) -> dict[str, Any]:
    """Median steps per second, and the least processor time of a step."""
    import torch

    torch.set_num_threads(1)
    step, length = steps(name, size)
    for _ in range(5):
        step()
    wall: list[float] = []
    cpu: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(wall) < 7 or time.perf_counter() < deadline:
        started, used = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    median = statistics.median(wall)
    return {
        "row": name,
        "size": size,
        "length": length,
        "steps_per_s": round(1 / median, 2),
        "tokens_per_s": round(BATCH * length / median),
        "wall_ms": round(1000 * min(wall), 2),
        "cpu_ms": round(1000 * min(cpu), 2),
        "repeats": len(wall),
    }


def steps(name: str, size: str) -> tuple[Any, int]:
    """A function that makes one training step more, and the tokens in a row of its batches."""
    import torch
    from torch import nn

    from recollect.core.seeding import Streams
    from recollect.models.backbone import Backbone
    from recollect.tasks import JointRecall
    from recollect.train.loop import build_optimizer
    from recollect.train.recall import RecallConfig
    from recollect.train.run import TrainConfig

    contexts, keys = (int(n) for n in size.split("x"))
    task = JointRecall.Config(n_contexts=(contexts, contexts), n_keys=(keys, keys))
    layer = layer_of(name)
    config = RecallConfig(task, Backbone.Config(D_MODEL, layers=(layer, layer)), BATCH, embedding_std=0.5)
    streams, problem = Streams(0), config.build()
    torch.manual_seed(streams.number("init"))
    model = problem.build_model().train()
    optimizer = build_optimizer(model, TrainConfig(steps=1000, lr=1e-3))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        batch = problem.batch(done, streams, torch.device("cpu"))
        torch.manual_seed(streams.number("sample", "global", done))
        optimizer.zero_grad(set_to_none=True)
        loss, _ = problem.loss(model, batch, streams.torch("sample", done, device="cpu"))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.isfinite(loss.detach() + norm)
        optimizer.step()

    return step, problem.task.length((contexts, keys))


def layer_of(name: str) -> Any:
    """The layer of a row: a mixer, or a mixer and the name of its attention."""
    from recollect.layers.gated_deltanet import GatedDeltaNet
    from recollect.layers.hax import HAX
    from recollect.layers.mamba import Mamba
    from recollect.layers.mamba2 import Mamba2
    from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Window

    mixer, _, attention = name.partition("+")
    mixers = {
        "mamba2": Mamba2.Config(D_MODEL, d_state=4, d_head=16),
        "mamba": Mamba.Config(D_MODEL, d_state=4),
        "gated_deltanet": GatedDeltaNet.Config(D_MODEL, n_heads=4, d_head=8, d_value=32),
    }
    hax = (Lsh(16, n_bits=2), KeySelection(16))
    unions: dict[str, dict[str, Any]] = {
        "hax": {"patterns": hax, "selection": "gate"},
        "hax-ranked": {"patterns": hax},
        "window": {"patterns": (Window(32),)},
        "dilated": {"patterns": (Dilated(32, stride=4),)},
        "lsh": {"patterns": (Lsh(32, n_bits=2),)},
        "ks": {"patterns": (KeySelection(32),), "selection": "gate"},
        "full": {"patterns": (Full(),)},
    }
    if not attention:
        return mixers[mixer]
    return HAX.Config(D_MODEL, mixer=mixers[mixer], d_key=8, **unions[attention])


def _machine() -> dict[str, Any]:
    import torch

    from recollect.train.runtime import environment

    facts = environment(torch.device("cpu"))
    return {"torch": torch.__version__, "device": facts["device"], "commit": facts["commit"]}


if __name__ == "__main__":
    main()
