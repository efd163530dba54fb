"""What the numbers of a run are called, which way is better, which ones a table shows, and which one ranks the rows.

Recall is always ranked by accuracy. A world is ranked by its problem's headline, which follows from what the
environment asks: the reward at the end of a dream, or the dreamed frames. A language model is ranked by its loss in
nats per token on documents held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

RECALL = ("accuracy", "accuracy_largest", "all_correct", "binding_gap")

REWARDS = ("imagination_accuracy", "inference_accuracy")

WORLD = (
    *REWARDS,
    *("doors_accuracy", "view_accuracy", "walls_accuracy", "objects_mse", "objects_rmse"),
    *("reconstruction_mse", "generation_mse", "expectation_mse"),
)
"""In the order of their columns, after the one that ranks."""

FRAMES = (
    *("reconstruction_mse_context", "reconstruction_mse_query"),
    *("generation_mse", "expectation_mse", "generation_psnr"),
    *("surprise_context", "surprise_query", "recalled"),
)
"""How frames are rebuilt and dreamed, in a table of their own."""

BEYOND = "longer_"
"""Before the name of a metric: on a larger size of the environment than the one trained on."""

LOSS = "loss"
"""Nats per token; ``loss_4096``: of the last quarter of documents of that length."""

BY_LENGTH = re.compile(r"(?P<task>.+)_(?P<length>\d+)")
"""Names of a language model's numbers at one length in tokens, as ``joint-recall_8192``."""

LABELS = {
    "accuracy": "accuracy, %",
    "accuracy_largest": "largest table, %",
    "all_correct": "whole tables right, %",
    "binding_gap": "binding gap, %",
    "imagination_accuracy": "reward, imagining, %",
    "inference_accuracy": "reward, observing, %",
    "doors_accuracy": "doors, %",
    "view_accuracy": "tiles, %",
    "walls_accuracy": "walls probed, %",
    "objects_mse": "objects probed, squared error",
    "objects_rmse": "objects probed, cells off",
    "reconstruction_mse": "reconstruction error",
    "reconstruction_mse_context": "rebuilt context, error",
    "reconstruction_mse_query": "rebuilt query, error",
    "generation_mse": "generation error",
    "expectation_mse": "mean dream, error",
    "generation_psnr": "dreamed frames, dB",
    "surprise_context": "surprise in the context, nats",
    "surprise_query": "surprise in the query, nats",
    "recalled": "less surprise in the query, %",
}

EXPLAINED = {
    "doors_accuracy": "Doors: whether each door of a dream is open or locked as it truly is.",
    "view_accuracy": "Tiles: of the dreamed view that are the right ones.",
    "walls_accuracy": "Walls and objects: read by a probe from what the model knows, squared errors in cells.",
    "expectation_mse": "Mean dream: of all dreams of one context, where guesses cancel; knowing nothing it is the mean "
    "picture.",
    "recalled": "Surprise: KL of posterior and prior, what a frame tells that was not foretold, by each row's own "
    "latents; rows compare in the share by which the query surprises less.",
    "generation_psnr": "dB: peak signal-to-noise ratio; more is better.",
}

ERRORS = " Errors: squared, summed over the pixels of a frame; less is better."


def label(metric: str) -> str:
    """What a table's column is called."""
    name = metric.removeprefix(BEYOND)
    plain = name.removesuffix("_accuracy").replace("_", " ")
    return LABELS.get(name) or (f"{plain}, %" if is_share(name) else plain)


def is_share(metric: str) -> bool:
    """Whether a metric is a share in [0, 1], written in per cent."""
    name = metric.removeprefix(BEYOND)
    return name in RECALL or name == "recalled" or name.endswith("accuracy")


def compares(metric: str) -> bool:
    """Whether one row's number can be better than another's."""
    return not metric.removeprefix(BEYOND).startswith("surprise")


def lower_is_better(metric: str) -> bool:
    """Whether less of it is better; ``loss`` and ``error`` are of problems of one's own."""
    name = metric.removeprefix(BEYOND)
    if (at := at_length(name)) is not None and at[0] == LOSS:
        return True
    return name in (LOSS, "perplexity", "error") or "mse" in name.split("_") or name.endswith("rmse")


def at_length(metric: str) -> tuple[str, int] | None:
    """A language model's number at one length: "loss" or the suite's task, and the length; None for any other name."""
    found = BY_LENGTH.fullmatch(metric)
    return None if found is None else (found["task"], int(found["length"]))


def headline_of(family: str, results: Mapping[str, Any]) -> str:
    """The metric that ranks the rows of a finished run's group."""
    if family == "recall":
        return RECALL[0]
    stated, metrics = results.get("headline"), results.get("metrics")
    if isinstance(stated, str):
        return stated
    if family == "language":
        return LOSS
    rewarded = not isinstance(metrics, Mapping) or REWARDS[0] in metrics or "generation_mse" not in metrics
    return REWARDS[0] if rewarded else "generation_mse"


def shown(family: str, headline: str, reported: Iterable[str]) -> list[str]:
    """The columns of a recall or world group's table, the one that ranks first: of those ``reported`` by any row."""
    there = {name for name in reported if not name.startswith(BEYOND)}
    if family == "recall":
        return [name for name in RECALL if name == headline or name in there]
    shares = [name for name in sorted(there) if is_share(name) and name not in FRAMES]
    own = [name for name in shares if name not in WORLD]
    names = [
        *WORLD[: WORLD.index("reconstruction_mse")],
        *own,
        "reconstruction_mse",
        "generation_mse",
        "expectation_mse",
    ]
    if set(shares) <= {"walls_accuracy"}:
        names.append("generation_psnr")
    return [headline, *(name for name in names if name in there and name != headline)]


def beyond(reported: Iterable[str]) -> list[str]:
    """The metrics of a larger size than the one trained on."""
    there = set(reported)
    return [f"{BEYOND}{name}" for name in dict.fromkeys((*WORLD, *FRAMES)) if f"{BEYOND}{name}" in there]


def explained(metrics: Iterable[str]) -> str:
    """What a table's note says of its less obvious columns, starting with a blank; or nothing."""
    return "".join(f" {EXPLAINED[name]}" for name in metrics if name in EXPLAINED)
