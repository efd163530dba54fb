"""Which keys each query of a language model attends to on a recall task, and whether the one it needs is among them.

Every layer that hands out ``attention_inputs`` is looked at, on a few sequences and with the dense forms of its
patterns (``ops.attention_map``). The needed key of an asked position is the place where its value was told
(``Task.told_at``); the key token stands right before it. Deeper layers may find the same fact at other places, since
the mixer carries it on: a share below one is no proof of a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from recollect.layers.attention import Attention
from recollect.layers.sparse import SparseAttention
from recollect.models.language_model import LanguageModel
from recollect.ops.attention_map import AttentionInputs, admitted_by, attention_weights
from recollect.tasks.base import Size, Task
from recollect.tasks.batch import TokenBatch

MAX_TOKENS = 128
"""Longest sample that is stored to be drawn, unless every size is longer."""

Rng = Callable[[str], np.random.Generator]


@dataclass(frozen=True)
class Attended:
    """``details`` for ``results.json`` and ``arrays`` for ``arrays.npz``; both empty for a model without attention.

    ``details["layers"]``, one per attending layer: its name, its patterns, and, as shares in [0, 1], for every pattern
    and for ``any`` of them ``admitted`` and ``weight`` (the needed key), ``key_admitted`` and ``key_weight`` (the key
    token before it). ``arrays``: ``attended_tokens`` (S,), ``attended_labels`` (S,), ``attended_queries`` (Q,) and
    ``attended_needed`` (Q,) positions of one sample, and for layer i ``attended_weights_i`` (Q, S) float16, the mean
    over heads, and ``attended_kinds_i`` (Q, S) uint8, where bit p says that pattern p admits the key in some head.
    """

    details: dict[str, Any] = field(default_factory=dict[str, Any])
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict[str, Any])


@torch.no_grad()
def attended(model: LanguageModel, task: Task, rng: Rng, n_samples: int = 8) -> Attended:
    """Shares over ``n_samples`` of the largest size, and one sample of at most ``MAX_TOKENS`` to draw.

    ``rng(name)`` gives each of the two batches its own stream. Nothing stays on the model. Cost: O(n_samples H L^2) per
    attending layer, small beside the evaluation itself.
    """
    largest = task.cells()[-1]
    drawn = _drawable(task)
    shares = _look(model, task.batch(rng("attended-shares"), n_samples, size=largest, split="test"), task)
    if not shares:
        return Attended()
    batch = task.batch(rng("attended-drawn"), 1, size=drawn, split="test")
    needed = task.told_at(batch)
    asked = np.flatnonzero(batch.mask[0])
    arrays: dict[str, npt.NDArray[Any]] = {
        "attended_tokens": batch.tokens[0].astype(np.int32),
        "attended_labels": np.array([_label(task, token) for token in batch.tokens[0]]),
        "attended_queries": asked.astype(np.int32),
        "attended_needed": (needed[0, asked] if needed is not None else np.full(len(asked), -1)).astype(np.int32),
    }
    for i, layer in enumerate(_look(model, batch, task)):
        bits = layer.admitted.any(2)[:, 0, asked].int() << torch.arange(len(layer.patterns))[:, None, None]
        arrays[f"attended_weights_{i}"] = layer.weights.mean(1)[0, asked].half().numpy()
        arrays[f"attended_kinds_{i}"] = bits.sum(0).to(torch.uint8).numpy()
    layers = [{"layer": layer.name, "patterns": layer.patterns, "shares": layer.shares} for layer in shares]
    return Attended({"size": list(largest), "drawn": list(drawn), "samples": n_samples, "layers": layers}, arrays)


@dataclass(frozen=True)
class _Layer:
    name: str
    patterns: list[str]
    admitted: Tensor  # (patterns, B, H, L, S) bool
    weights: Tensor  # (B, H, L, S)
    shares: dict[str, dict[str, float]]


def _look(model: LanguageModel, batch: TokenBatch, task: Task) -> list[_Layer]:
    with captured(model.backbone) as found:
        model.hidden(torch.from_numpy(batch.tokens).to(model.embedding.weight.device))
    layers: list[_Layer] = []
    for name, inputs in found:
        admitted = admitted_by(inputs)
        weights = attention_weights(inputs, admitted.any(0))
        patterns = [pattern.kind for pattern in inputs.patterns]
        admitted, weights = admitted.cpu(), weights.float().cpu()
        layers.append(_Layer(name, patterns, admitted, weights, _shares(batch, task, patterns, admitted, weights)))
    return layers


@contextmanager
def captured(backbone: nn.Module) -> Generator[list[tuple[str, AttentionInputs]]]:
    """What every attending layer of ``backbone`` attends with, by its name there, in the order in which a forward
    inside the block reaches them. Every call counts: a sequence must come whole.
    """
    found: list[tuple[str, AttentionInputs]] = []

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            assert isinstance(module, SparseAttention | Attention)
            found.append((name, module.attention_inputs(args[0])))

        return hook

    handles = [
        module.register_forward_hook(listen(name))
        for name, module in backbone.named_modules()
        if isinstance(module, SparseAttention | Attention)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _shares(
    batch: TokenBatch, task: Task, patterns: list[str], admitted: Tensor, weights: Tensor
) -> dict[str, dict[str, float]]:
    """For each pattern and "any": the share of asked positions (and heads) that may read the needed key; its weight."""
    told = task.told_at(batch)
    if told is None:
        return {}
    rows, columns = np.nonzero(batch.mask)
    value = told[rows, columns]
    if (value < 1).any():
        return {}
    row, query = torch.from_numpy(rows), torch.from_numpy(columns)
    shares: dict[str, dict[str, float]] = {}
    for name, mask in zip(["any", *patterns], [admitted.any(0), *admitted], strict=True):
        shares[name] = {}
        for prefix, place in (("", torch.from_numpy(value)), ("key_", torch.from_numpy(value - 1))):
            inside = mask[row, :, query, place].float()
            shares[name][f"{prefix}admitted"] = float(inside.mean())
            shares[name][f"{prefix}weight"] = float((weights[row, :, query, place] * inside).mean())
    return shares


def _drawable(task: Task) -> Size:
    """The size with the longest samples of at most ``MAX_TOKENS``; the shortest one if there is none."""
    short = [size for size in task.cells() if task.length(size) <= MAX_TOKENS]
    return max(short, key=task.length) if short else min(task.cells(), key=task.length)


def _label(task: Task, token: np.int64) -> str:
    """What a token is called where the task writes it as one short word, else its number."""
    try:
        text = task.render(np.array([token]))
    except (IndexError, ValueError, KeyError):
        text = ""
    return text if 0 < len(text) <= 4 and " " not in text else str(int(token))
