"""Speed and memory of world models by the length of their episodes, as S4WM (arXiv 2307.02064) compares backbones.

Training is one step over whole episodes of random frames: loss, backward, AdamW. Memory is what that step needs on top
of the model and its optimiser. Imagination observes ``length`` frames first, untimed, and goes on for ``HORIZON``
steps, each from the one before, latents sampled; frames are decoded and rewards read, as ``WorldModel.imagine`` does.
A step alone, ``imagine_step``, is timed too: what acting in a dream costs, where nothing is decoded.

``tssm-full`` is ``tssm`` with a window as long as the context and gradients over all of it: a memory of the same length
as that of the models it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.nn import functional as F

from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.eval.bench.cases import Case, Record, Row, note, run_cases
from recollect.eval.bench.measure import median_time, peak_of
from recollect.eval.bench.rows import chosen, sizes
from recollect.models.presets import PRESETS, Size
from recollect.models.vision import Pixels, Tiles, VisionConfig
from recollect.models.world_model import Batch, WorldModel
from recollect.train.optimizer import build_optimizer
from recollect.train.run import TrainConfig
from recollect.train.runtime import resolve_device

TSSM, RSSM = "tssm", "rssm"
"""The rows that others are compared with: in imagination, and in training."""

FULL = "tssm-full"
"""The row of ``tssm`` that sees the whole context."""

HORIZON = 32
"""Frames imagined at a time."""

WARM_LENGTH = 128
"""Long enough that what runs at any length has been compiled and called."""

N_ACTIONS = 6

TRAINING = TrainConfig(steps=1, lr=1e-5)
"""So low a rate that thousands of steps on noise leave the numbers ordinary ones."""

CODE = ("models", "eval/bench/worldmodel.py", "train/optimizer.py")
"""What decides the numbers here and not those of the other benches."""

RATIOS = {
    "train_vs_rssm": (RSSM, "train_frames_per_s"),
    "imagine_vs_tssm": (TSSM, "imagine_frames_per_s"),
    "imagine_vs_tssm_full": (FULL, "imagine_frames_per_s"),
}
"""The row compared with and the column: ours / theirs, so above 1 is faster."""


def bench_worldmodel(
    presets: Sequence[str] = (),
    *,
    lengths: Sequence[str | int] = (250, 500, 1000, 2000, 4000),
    observation: str = "tiles",
    image_size: int = 64,
    d_model: int = 256,
    batch: int = 8,
    threads: int = 2,
    device: str = "cpu",
    seconds: float = 0.5,
    budget_s: float = 60.0,
    out: Path = Path("runs/bench"),
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure each named preset (default: all, and ``tssm-full``) at each length into ``out/worldmodel.json``.

    ``observation`` is ``tiles``, or ``pixels`` of noise, ``image_size`` wide. Raises ConfigError for an unknown name or
    an impossible size, RecollectError for a device that is not there and as ``run_cases`` does.
    """
    rows, at = chosen(presets, row_names(), "world model"), sizes(lengths)
    if min(d_model, batch, threads) < 1:
        raise ConfigError("bench: d_model, batch and threads must be at least 1")
    vision(observation, image_size, 1)
    on = resolve_device(device)
    seen = {"observation": observation, "image_size": image_size if observation == "pixels" else None}
    common: dict[str, Any] = {**seen, "d_model": d_model, "batch": batch, "threads": threads, "device": str(on)}
    common["seconds"] = seconds
    call = "recollect.eval.bench.worldmodel:measure"
    return run_cases(
        "worldmodel",
        [
            Case(row, n, call, {"row": row, "length": n, **common}, refusal=refusal(row, n, d_model))
            for row in rows
            for n in at
        ],
        size_name="length",
        settings={**common, "size": asdict(size_of(d_model)), "horizon": HORIZON, "dtype": "float32"},
        out=out,
        budget_s=budget_s,
        device=on,
        fresh=fresh,
        say=say,
        derive=lambda measured: {"ratios": ratios(measured)},
        also=CODE,
    )


def row_names() -> list[str]:
    """Every row there is: the presets, and ``tssm-full`` after ``tssm``."""
    return [name for preset in PRESETS for name in (preset, *([FULL] if preset == TSSM else []))]


def size_of(d_model: int) -> Size:
    """The size of every row at that width: MLPs are as wide as the memory, the rest is the presets' own."""
    return replace(Size(), d_model=d_model, hidden=d_model)


def refusal(row: str, length: int, d_model: int) -> str:
    """Why the row cannot be built at that width; empty when it can."""
    try:
        config_of(row, length, d_model, Tiles())
    except ConfigError as error:
        return str(error)
    return ""


def vision(observation: str, image_size: int | None, hidden: int) -> VisionConfig:
    """What is seen. ConfigError for anything but tiles and pixels of a possible size."""
    if observation == "tiles":
        return Tiles(hidden=hidden)
    if observation != "pixels" or image_size is None:
        raise ConfigError(f"bench: observation must be tiles or pixels, got '{observation}'")
    return Pixels(size=image_size)


def config_of(row: str, length: int, d_model: int, seen: VisionConfig) -> WorldModel.Config:
    """The world model of a row, for episodes of that length."""
    size = size_of(d_model)
    if row == FULL:
        row, size = TSSM, replace(size, window=length, chunk=None)
    return WorldModel.Config(N_ACTIONS, PRESETS[row](size), seen, hidden=size.hidden)


def episodes(config: WorldModel.Config, batch: int, length: int, device: torch.device) -> Batch:
    """Whole episodes of noise: every code or pixel uniform, actions one-hot and zero at the first step."""
    c = config.vision
    values = c.n_codes if isinstance(c, Tiles) else 256
    shape = (batch, length)
    is_first = torch.zeros(shape, dtype=torch.bool, device=device)
    is_first[:, 0] = True
    actions = F.one_hot(torch.randint(N_ACTIONS, shape, device=device), N_ACTIONS).float()
    return Batch(
        torch.randint(values, (*shape, *c.shape), dtype=torch.uint8, device=device),
        actions.masked_fill(is_first[..., None], 0),
        torch.randint(2, shape, device=device).float(),
        is_first,
        torch.zeros_like(is_first),
        unbroken=True,
    )


def measure(
    row: str,
    length: int,
    *,
    d_model: int,
    observation: str,
    image_size: int | None,
    batch: int,
    threads: int,
    device: str,
    seconds: float,
) -> dict[str, Any]:
    """One row at one length, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on = torch.device(device)
    config = config_of(row, length, d_model, vision(observation, image_size, d_model))
    model = WorldModel(config).to(on)
    optimizer = build_optimizer(model, TRAINING)
    generator = torch.Generator(on).manual_seed(0)
    whole = episodes(config, batch, length, on)

    def train(steps: int = length) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model.loss(whole.each(lambda part: part[:, :steps]), generator)
        loss.backward()
        optimizer.step()

    model.train()
    # Twice: some kernels, and the optimiser's state, only exist once gradients do.
    for _ in range(2):
        train(min(length, WARM_LENGTH))
    optimizer.zero_grad(set_to_none=True)
    peak = peak_of(train, on)
    training = median_time(train, seconds, on, first_s=peak.seconds)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad(), unchanging():
        state = model.observe(whole, generator=generator).state
        actions = episodes(config, batch, HORIZON + 1, on).action[:, 1:]

        def imagine() -> None:
            model.imagine(state, actions, generator=generator)

        def step() -> None:
            model.imagine_step(state, actions[:, 0], generator=generator)

        imagine()
        dream = median_time(imagine, seconds, on)
        alone = median_time(step, seconds, on)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "state_bytes": (nbytes(state.inner) + nbytes(state.z)) // batch,
        "train_steps_per_s": 1 / training.seconds,
        "train_frames_per_s": batch * length / training.seconds,
        "imagine_frames_per_s": batch * HORIZON / dream.seconds,
        "imagine_step_ms": 1000 * alone.seconds,
        "peak_bytes": peak.bytes,
        "pass_s": training.seconds,
        "repeats": training.repeats,
    }


def ratios(rows: Sequence[Row]) -> list[Row]:
    """Every measured row over those of ``RATIOS`` at the same length; None where they were not measured."""
    measured = {(row["row"], row["length"]): row for row in rows if row["status"] == "measured"}
    return [
        {
            "row": name,
            "length": length,
            **{
                ratio: ours[column] / theirs[column] if (theirs := measured.get((other, length))) else None
                for ratio, (other, column) in RATIOS.items()
            },
        }
        for (name, length), ours in measured.items()
    ]


def tables(record: Record, names: Sequence[str] = ()) -> list[Table]:
    """For a terminal: every case, with how many times as fast as ``rssm``, ``tssm`` and ``tssm-full`` it is."""
    batch = record.head["settings"]["batch"]
    title = f"training and imagination of {batch} episodes side by side"
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    grid.add_column("world model")
    columns = ("length", "params", "state B", "train\nsteps/s", "train\nframes/s", "train\n/ rssm", "peak\nMiB")
    columns += ("imagine\nframes/s", "imagine\n/ tssm", "imagine\n/ full", "step\nms")
    for column in columns:
        grid.add_column(column, justify="right")
    grid.add_column("")
    against = {(each["row"], each["length"]): each for each in record.derived.get("ratios", [])}
    for row in record.rows:
        if names and row["row"] not in names:
            continue
        cells = [""] * (len(columns) - 1)
        if row["status"] == "measured":
            times = against[row["row"], row["length"]]
            rssm, tssm, full = ("" if times[ratio] is None else f"{times[ratio]:.2f} x" for ratio in RATIOS)
            cells = [f"{row['params']:,}", f"{row['state_bytes']:,}"]
            cells += [f"{row['train_steps_per_s']:.3g}", f"{row['train_frames_per_s']:,.0f}", rssm]
            cells += [f"{row['peak_bytes'] / 2**20:,.1f}", f"{row['imagine_frames_per_s']:,.0f}", tssm, full]
            cells += [f"{row['imagine_step_ms']:.3g}"]
        grid.add_row(row["row"], f"{row['length']:,}", *cells, note(row))
    return [grid]
