"""Training on mixed sizes, padded against packed: useful tokens and answers per second of processor time.

    python bench/bench_packing.py OUT.json [--batch-size 64] [--repeats 3] [--only mamba2]

Joint recall on the published grid (5..16 contexts x 5..16 keys) with the published models: two layers of width 64,
Mamba-2 with states of 32 and 8 heads of 16, alone and with HAX of 64 keys as published. A token is useful if it belongs
to a sample. ``padded`` is the published setting, a sample to a row; ``padded, no resets`` leaves out the resets that
keep padding from the layers' own losses. ``one-size`` draws one size per batch, so it has no padding and no mixture.
Arms take turns in one process with one thread, each on the batch of the same step, and the median of the repeats
counts. Time is processor time, forward and backward, which a busy machine disturbs less than the clock; with one thread
both agree on an idle one. ``draw_cpu_ms`` is what it takes to draw, place and write a batch, which is not part of the
rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recollect.core.layer import LayerConfig
from recollect.core.seeding import Streams
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.tasks import JointRecall
from recollect.train.recall import Recall, RecallConfig
from recollect.train.runtime import environment

MIXER = Mamba2.Config(64, d_state=32, d_head=16)
LAYERS: dict[str, LayerConfig] = {"mamba2": MIXER, "mamba2+hax": HAX.Config.published(64, MIXER, n_keys=64)}
ARMS = ("padded", "padded, no resets", "packed", "one-size")


class Turn(NamedTuple):
    """One step of one arm."""

    seconds: float
    draw_seconds: float
    tokens: float
    answers: int
    filling: float


def problems(layer: LayerConfig, batch_size: int) -> dict[str, Recall]:
    """The problem of every arm."""
    padded = RecallConfig(
        JointRecall.Config(), Backbone.Config(64, layers=(layer, layer)), batch_size=batch_size, batching="padded"
    )
    packed, one_size = replace(padded, batching="packed"), replace(padded, batching="one-size")
    return {arm: Recall(config) for arm, config in zip(ARMS, (padded, padded, packed, one_size), strict=True)}


def turn(problem: Recall, arm: str, model: LanguageModel, step: int) -> Turn:
    """Draw a batch, run it forward and backward."""
    begin = time.process_time()
    batch = problem.batch(step, Streams(0), torch.device("cpu"))
    drawn = time.process_time()
    if arm == "padded, no resets":
        batch = batch._replace(reset=None)
    loss, _ = problem.loss(model, batch, torch.Generator())
    loss.backward()
    end = time.process_time()
    model.zero_grad()
    tokens = batch.filling * batch.tokens.numel()
    return Turn(end - drawn, drawn - begin, tokens, int(batch.mask.sum()), batch.filling)


def main() -> None:
    """Measure every arm of every model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/bench/packing.json"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=LAYERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | batches | filling | processor ms a step | useful tokens/s | answers/s | of padded | draw, ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows: list[dict[str, Any]] = []
    for name, layer in LAYERS.items():
        if arguments.only not in (None, name):
            continue
        arms = problems(layer, arguments.batch_size)
        torch.manual_seed(0)
        model = arms["padded"].build_model().train()
        for arm, problem in problems(layer, 2).items():
            turn(problem, arm, model, 0)
        steps = range(1, 1 + arguments.repeats)
        turns = [{arm: turn(problem, arm, model, step) for arm, problem in arms.items()} for step in steps]
        rates = {arm: statistics.median(each[arm].tokens / each[arm].seconds for each in turns) for arm in ARMS}
        padded = max(rates["padded"], rates["padded, no resets"])
        for arm in ARMS:
            each = [turn[arm] for turn in turns]
            row = {
                "model": name,
                "batches": arm,
                "filling": round(statistics.mean(t.filling for t in each), 3),
                "step_cpu_ms": round(1e3 * statistics.median(t.seconds for t in each), 1),
                "useful_tokens_per_s": round(rates[arm]),
                "answers_per_s": round(statistics.median(t.answers / t.seconds for t in each)),
                "of_padded": round(rates[arm] / padded, 2),
                "draw_cpu_ms": round(1e3 * statistics.median(t.draw_seconds for t in each), 2),
            }
            rows.append(row)
            print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    facts = environment(torch.device("cpu"))
    machine = {"torch": torch.__version__, "device": facts["device"], "commit": facts["commit"], "threads": 1}
    sizes = {"batch_size": arguments.batch_size, "repeats": arguments.repeats}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(sizes | machine | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
