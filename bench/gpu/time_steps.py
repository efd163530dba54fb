"""Whole training steps on a GPU: forward, backward, clipping and AdamW, and where their time goes.

    python bench/gpu/time_steps.py OUT.json [--device cuda] [--only recall world] [--batch 64]

``recall``: the joint-recall model of the published size with HAX and without (batch 64, its longest tables); ``world``:
the S5 world model of the published size, and others, on four episodes of 1,000 frames of 64 x 64, CNN included;
``language``: 24 layers of width 768, Mamba-2 with HAX and without, rows of 8,192 tokens. In bfloat16 autocast, as
written, with ``torch.compile``, and with CUDA graphs. Batches are there before the clock starts; what making them costs
shows in the ``steps_per_s`` of a training run.

Of each: steps a second, positions (tokens, frames) a second, peak bytes, and from a profile of three steps: kernels
launched per step, the share of the step in which the GPU ran none, waits of the host for the GPU, and the ten kernels
that took longest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import SECONDS, Cases
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from recollect.core.seeding import Streams
from recollect.eval.bench.measure import median_time, once, peak_of
from recollect.recipes import load_recipe
from recollect.train.compilation import Compile, compile_modules, compiled_step
from recollect.train.optimizer import build_optimizer
from recollect.train.run import RunConfig, TrainConfig
from recollect.train.runtime import resolve_device

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")
WAYS: tuple[Compile, ...] = ("off", "default", "graphs")


class Task(NamedTuple):
    """A model, its loss on a batch that is there, and the positions that a step trains on."""

    model: nn.Module
    compiled: list[nn.Module]
    loss: Callable[[], Tensor]
    positions: int
    train: TrainConfig


def _run(recipe: str, row: str) -> RunConfig:
    return next(run for run in load_recipe(recipe).runs if run.row == row)


def recall(row: str, batch_size: int, device: torch.device) -> Task:
    """A row of ``recall-published`` on the first batch of its last stage."""
    run = _run("recall-published", row)
    problem = run.problem.build()
    model = problem.build_model().to(device)
    streams = Streams(0)
    batches = [problem.batch(step, streams, device) for step in range(run.train.steps - 20, run.train.steps)]
    # The longest of the last twenty draws: a step's time goes with its length.
    batch = max(batches, key=lambda b: b.tokens.shape[1])
    batch = type(batch)(*(x[:batch_size] if isinstance(x, Tensor) else x for x in batch))
    generator = torch.Generator(device).manual_seed(0)
    return Task(
        model,
        problem.compiled(model),
        lambda: problem.loss(model, batch, generator)[0],
        batch.tokens.numel(),
        run.train,
    )


def world(row: str, batch_size: int, device: torch.device, frames: int = 1000) -> Task:
    """A row of ``worlds-paper-two-rooms`` on random frames."""
    from recollect.eval.bench.worldmodel import episodes
    from recollect.models.world_model import WorldModel

    run = _run("worlds-paper-two-rooms", row)
    problem = run.problem.build()
    model = problem.build_model().to(device)
    assert isinstance(model, WorldModel)
    batch = episodes(model.config, batch_size, frames, device)
    generator = torch.Generator(device).manual_seed(0)
    return Task(model, problem.compiled(model), lambda: model.loss(batch, generator)[0], batch_size * frames, run.train)


def language(layers: str, batch_size: int, device: torch.device, length: int = 8192, width: int = 768) -> Task:
    """A causal language model on random tokens."""
    from recollect.hf.configuration import RecollectConfig
    from recollect.hf.modeling import RecollectForCausalLM
    from recollect.train.language import parse_layers

    config = RecollectConfig.of(parse_layers(layers, width), vocab_size=50_288)
    model = RecollectForCausalLM(config).to(device)
    tokens = torch.randint(0, 50_000, (batch_size, length + 1), device=device)
    given, labels = tokens[:, :-1], tokens[:, 1:]
    mask = torch.ones_like(labels, dtype=torch.bool)
    return Task(
        model,
        [model.get_submodule("backbone")],
        lambda: model.loss(given, labels, mask, None)[0],
        given.numel(),
        TrainConfig(1000, 3e-4),
    )


def stepped(task: Task, how: Compile, device: torch.device) -> Callable[[], None]:
    """One optimizer step."""
    optimizer = build_optimizer(task.model, task.train)
    task.model.train()
    compile_modules(task.compiled, how)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with compiled_step(how):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = task.loss()
            loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), task.train.clip or float("inf"))
        optimizer.step()

    return step


def profiled(step: Callable[[], None], device: torch.device, n: int = 3) -> dict[str, Any]:
    """Where the time of a step goes, by kernels; empty without a GPU."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(n):
            step()
        torch.cuda.synchronize(device)
    events = seen.events() or []
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    by_name: dict[str, float] = {}
    for kernel in kernels:
        by_name[kernel.name] = by_name.get(kernel.name, 0.0) + kernel.time_range.elapsed_us()
    begin, end = min(e.time_range.start for e in kernels), max(e.time_range.end for e in kernels)
    waits = sum(
        e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense") for e in events
    )
    top = sorted(by_name.items(), key=lambda item: -item[1])[:10]
    return {
        "kernels": len(kernels) / n,
        "idle": 1 - sum(by_name.values()) / max(end - begin, 1e-9),
        "waits": waits / n,
        "top": [{"name": name[:120], "ms": us / 1000 / n} for name, us in top],
    }


def measured(make: Callable[[], Task], how: Compile, device: torch.device) -> dict[str, Any]:
    """Figures of one task in one way of running it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    try:
        task = make()
        step = stepped(task, how, device)
        for _ in range(4):
            once(step, device)
        peak = peak_of(step, device)
        seconds = median_time(step, 4 * SECONDS, device).seconds
        return {
            "steps_per_s": 1 / seconds,
            "positions_per_s": task.positions / seconds,
            "positions": task.positions,
            "peak_bytes": peak.bytes,
            "params": sum(p.numel() for p in task.model.parameters()),
            **profiled(step, device),
        }
    except Exception as error:  # the compiler fails in many ways; the other rows go on
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def tasks(device: torch.device) -> dict[str, Callable[[], Task]]:
    """All tasks by name."""
    return {
        "recall mamba2+hax": lambda: recall("mamba2+hax", 64, device),
        "recall mamba2": lambda: recall("mamba2", 64, device),
        "world s5wm": lambda: world("s5wm", 4, device),
        "world haxwm": lambda: world("haxwm", 4, device),
        "world rssm": lambda: world("rssm", 4, device),
        "world tssm": lambda: world("tssm", 4, device),
        "language mamba2": lambda: language("24*mamba2", 1, device),
        "language hax": lambda: language("24*hax", 1, device),
    }


def main() -> None:
    """Measure every task in every way of running it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="tasks whose names contain one of these")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options = parser.parse_args()
    device = resolve_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    cases = Cases(options.out, device, autocast="bf16")
    for name, make in tasks(device).items():
        if options.only and not any(part in name for part in options.only):
            continue
        for how in options.ways:
            cases.add(f"{name}, {how}", lambda m=make, h=how: measured(m, h, device))


if __name__ == "__main__":
    main()
