"""Which earlier frames each frame of an episode attends to, in a world model whose backbone has attention.

The whole episode is shown. Token t is made of what was understood of frame t - 1 and of action t, so a key at position
s holds frame s - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recollect.eval.attended import Attended, captured
from recollect.models.backbone import Backbone
from recollect.models.world_model import Batch, WorldModel
from recollect.ops.attention_map import admitted_by, attention_weights

MAX_FRAMES = 2048
"""Longer episodes are not looked at: the maps are of the square of it."""

BINS = 96
"""Rows and columns that a map is stored with at most; neighbouring queries are averaged, neighbouring keys added."""

MAX_LAYERS = 8


@torch.no_grad()
def attended_frames(model: WorldModel, batch: Batch, context: int) -> Attended:
    """Maps of the first episode of ``batch``, from the first frame after ``context`` on; empty without attention.

    ``details``: the episode's ``length`` and ``context``, and per layer its name and patterns. ``arrays``:
    ``frames_queries`` (Q + 1,) and ``frames_keys`` (S + 1,), the positions at which rows and columns begin, and for
    layer i ``frames_weights_i`` (patterns, Q, S) float16: the weight on the keys that a pattern admits, mean over
    heads. A key that two patterns admit counts in both. Under 150 kB a layer. Cost: O(H L^2) per attending layer.
    """
    backbone = getattr(model.dynamics, "backbone", None)
    length = batch.is_first.shape[1]
    if not isinstance(backbone, Backbone) or length > MAX_FRAMES or not context < length:
        return Attended()
    tokens = _tokens(model, backbone, batch.each(lambda part: part[:1]))
    with captured(backbone) as found:
        backbone(tokens)
    if not found:
        return Attended()
    rows, columns = _edges(context, length), _edges(0, length)
    layers: list[dict[str, Any]] = []
    arrays: dict[str, npt.NDArray[Any]] = {"frames_queries": rows, "frames_keys": columns}
    for i, (name, inputs) in enumerate(found[:MAX_LAYERS]):
        admitted = admitted_by(inputs)
        weights = attention_weights(inputs, admitted.any(0))[0]
        maps = [(weights * mask[0]).mean(0)[context:].float().cpu().numpy() for mask in admitted]
        arrays[f"frames_weights_{i}"] = np.stack([_binned(each, rows - context, columns) for each in maps])
        layers.append({"layer": name, "patterns": [pattern.kind for pattern in inputs.patterns]})
    return Attended({"length": length, "context": context, "layers": layers}, arrays)


def _tokens(model: WorldModel, backbone: Backbone, batch: Batch) -> Tensor:
    """What the backbone reads of an episode, (1, T, D), in however many chunks the dynamics hands it over."""
    parts: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        parts.append(args[0])

    handle = backbone.register_forward_pre_hook(note)
    try:
        model.observe(batch)
    finally:
        handle.remove()
    return torch.cat(parts, 1)


def _edges(first: int, last: int) -> npt.NDArray[np.int32]:
    """Where at most ``BINS`` bins over positions first .. last - 1 begin, and ``last``."""
    return np.linspace(first, last, min(BINS, last - first) + 1).round().astype(np.int32)


def _binned(
    weights: npt.NDArray[np.float32], rows: npt.NDArray[np.int32], columns: npt.NDArray[np.int32]
) -> npt.NDArray[np.float16]:
    """Means over bins of queries of sums over bins of keys."""
    summed = np.add.reduceat(weights, columns[:-1], axis=1)
    means = np.add.reduceat(summed, rows[:-1], axis=0) / np.diff(rows)[:, None]
    return means.astype(np.float16)
