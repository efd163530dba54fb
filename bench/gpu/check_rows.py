"""Does every row of a recipe give the same loss and gradients on a device as on the CPU?

    python bench/gpu/check_rows.py recall-published --device cuda --out check.json

A training batch of each row's first step, in float32: the relative difference of the loss, and of all gradients
together (norm of the difference over norm), against the CPU's compiled kernels. Exits with 1 when one exceeds the
tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from recollect.core.files import write_atomically
from recollect.core.seeding import Streams
from recollect.recipes import load_recipe
from recollect.train.run import RunConfig
from recollect.train.runtime import environment, resolve_device

TOLERANCE = 1e-3
"""Of float32 sums in another order, through two layers; TF32 is off."""


def loss_and_gradients(run: RunConfig, device: torch.device) -> tuple[float, torch.Tensor]:
    """The first step's loss and gradients, flattened, on the CPU."""
    streams = Streams(run.seed)
    problem = run.problem.build()
    torch.manual_seed(streams.number("init"))
    model = problem.build_model().to(device)
    batch = problem.batch(1, streams, device)
    # Explorers and other draws differ between devices: they are left to the layers' own tests.
    model.eval()
    loss, _ = problem.loss(model, batch, streams.torch("sample", 1, device="cpu"))
    loss.backward()
    grads = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(grads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", nargs="*", help="only these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for run in load_recipe(options.recipe).runs:
        if options.rows and run.row not in options.rows:
            continue
        here, wanted = loss_and_gradients(run, torch.device("cpu"))
        there, found = loss_and_gradients(run, device)
        error = float((found - wanted).norm() / wanted.norm())
        rows.append({"row": run.row, "loss": abs(there - here) / abs(here), "gradients": error})
        print(f"{run.row:28s} loss {rows[-1]['loss']:.1e}  gradients {error:.1e}", flush=True)
    facts = environment(device)
    made = {"commit": facts["commit"], "device": facts["device"], "tolerance": TOLERANCE, "rows": rows}
    if options.out:
        write_atomically(options.out, (json.dumps(made, indent=1) + "\n").encode())
    wrong = [row["row"] for row in rows if max(row["loss"], row["gradients"]) > TOLERANCE]
    if wrong:
        print(f"differs from the CPU: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
