"""A finished face-off of 24 recall rows that never ran: numbers drawn by rule, attention from untrained layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

ADDED = ("", "+window", "+sink", "+dilated", "+window+dilated", "+lsh", "+ks", "+hax", "+full", "-2x")
ROWS = (*(f"{mixer}{added}" for mixer in ("mamba", "mamba2") for added in ADDED),)
ROWS = (*ROWS, "samba", "gated_deltanet", "gated_deltanet+hax", "conv+attention")

SKILL = {"": 0.35, "+window": 0.66, "+sink": 0.5, "+dilated": 0.25, "+window+dilated": 0.55}
SKILL |= {"+lsh": 0.75, "+ks": 0.6, "+hax": 0.9, "+full": 0.98, "-2x": 0.55, "+attention": 0.99}
PATTERNS = {"+window": ["window"], "+sink": ["window", "sink"], "+dilated": ["dilated"], "+lsh": ["lsh"]}
PATTERNS |= {"+window+dilated": ["window", "dilated"], "+ks": ["key-selection"], "+full": ["full"]}
PATTERNS |= {"+hax": ["lsh", "key-selection"], "+attention": ["full"]}


def write_many_rows(
    directory: Path,
    *,
    name: str = "recall-mini",
    rows: tuple[str, ...] = ROWS,
    seeds: int = 3,
    axes: tuple[str, ...] = ("contexts", "keys"),
    ranges: tuple[tuple[int, int], ...] = ((5, 16), (5, 16)),
    n_attended: tuple[int, int] = (5, 5),
) -> Path:
    """Write the directory of a finished face-off; ``axes`` and ``ranges`` lay out its sizes."""
    task = {"kind": "joint-recall"}
    runs = [{"group": "recall", "row": row, "seed": 0, "problem": {"task": task}, "train": {}} for row in rows]
    directory.mkdir(parents=True, exist_ok=True)
    config = {"kind": "faceoff", "name": name, "title": "Recall, every row", "runs": runs, "seeds": list(range(seeds))}
    (directory / "faceoff.json").write_text(json.dumps(config))
    for i, row in enumerate(rows):
        for seed in range(seeds):
            _write_run(directory / "recall" / row / f"seed{seed}", i, row, seed, axes, ranges, n_attended)
    return directory


def _write_run(
    folder: Path,
    i: int,
    row: str,
    seed: int,
    axes: tuple[str, ...],
    ranges: tuple[tuple[int, int], ...],
    n_attended: tuple[int, int],
) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([i, seed])
    mixer = row.split("+", maxsplit=1)[0].removesuffix("-2x")
    added = row.removeprefix(mixer)
    skill = SKILL[added] * {"mamba": 0.8, "samba": 0.5, "gated_deltanet": 1.05}.get(mixer, 1.0) + rng.normal(0, 0.02)
    sizes = [()]
    for low, high in ranges:
        sizes = [(*size, n) for size in sizes for n in range(low, high + 1)]
    cells = np.array([math.prod(size) for size in sizes])
    right = np.clip(1 / (1 + (cells / (cells.max() * skill * 1.2)) ** 3) + rng.normal(0, 0.01, len(sizes)), 0.06, 1)
    whole = np.where(right > 0.995, 1.0, right**cells)
    score = float(right.mean())
    lines: list[dict[str, Any]] = []
    steps = np.arange(100, 10_001, 100)
    reach = score / (1 + np.exp(-(steps - 2000 - 3000 * (1 - skill)) / 800))
    for step, accuracy in zip(steps.tolist(), reach, strict=True):
        lines.append({"step": step, "loss": 2.8 * (1.02 - accuracy), "lr": 1e-3, "steps_per_s": 8.0 - 0.1 * i})
        if step % 500 == 0:
            lines.append({"step": step, "eval": {"accuracy": float(accuracy)}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    details: dict[str, Any] = {
        "cells": {
            "axes": list(axes),
            "sizes": [list(size) for size in sizes],
            "accuracy": right.tolist(),
            "all_correct": whole.tolist(),
        },
        "oracles": {"uniform": 0.0625, "frequent": 0.113, "last": 0.164, "key-majority": 0.237, "perfect": 1.0},
        "key_budget": None if added in ("+full", "+attention") else 64 if added.startswith("+") else 0,
        "blind": "key-majority",
    }
    if added in PATTERNS:
        details["attended"], arrays = _attention(PATTERNS[added], rng, *n_attended)
        np.savez(folder / "arrays.npz", **arrays)
    results = {
        "recipe": "recall-mini/recall",
        "group": "recall",
        "row": row,
        "seed": seed,
        "fingerprint": "abcdef012345",
        "params": {"mamba": 66_000, "gated_deltanet": 90_000}.get(mixer, 100_600) * (3 if added == "-2x" else 1)
        + 512 * i,
        "state_bytes": 9_000 * (2 if mixer == "mamba2" else 1)
        + {"+full": 500_000, "+attention": 480_000}.get(added, 66_000 if added.startswith("+") else 0),
        "commit": "1a3cc03",
        "device": "cpu",
        "steps": 10_000,
        "wall_s": 3_000.0 + 100 * i,
        "metrics": {
            "accuracy": score,
            "accuracy_largest": float(right[-1]),
            "all_correct": float(whole.mean()),
            "binding_gap": score - 0.237,
        },
        "details": details,
    }
    (folder / "results.json").write_text(json.dumps(results))


def _attention(patterns: list[str], rng: np.random.Generator, n_contexts: int, n_keys: int) -> tuple[Any, Any]:
    told = ["1", *(word for c in range(n_contexts) for word in ["ABCDE"[c], *_pairs(n_keys)])]
    asked = ["|", *(word for c in range(n_contexts) for word in ["ABCDE"[c], *_pairs(n_keys)])]
    labels = np.array([*told, *asked])
    queries = np.array([j for j in range(len(told), len(labels)) if labels[j].islower()])
    length, n = len(labels), len(queries)
    block = 2 * n_keys + 1
    needed = np.array([1 + block * c + 2 + 2 * k for c in rng.permutation(n_contexts) for k in rng.permutation(n_keys)])
    arrays: dict[str, Any] = {
        "attended_tokens": np.arange(length),
        "attended_labels": labels,
        "attended_queries": queries,
        "attended_needed": needed,
    }
    at = np.arange(length)
    shares: list[dict[str, Any]] = []
    for layer in range(2):
        kinds = np.zeros((n, length), dtype=np.uint8)
        for p, pattern in enumerate(patterns):
            admits = {
                "full": at <= queries[:, None],
                "window": (at <= queries[:, None]) & (at > queries[:, None] - 32),
                "sink": np.broadcast_to(at < 32, kinds.shape),
                "dilated": np.broadcast_to(at % 4 == 3, kinds.shape) & (at <= queries[:, None]),
                "lsh": (rng.random(kinds.shape) < 0.25) | (at == needed[:, None]),
                "key-selection": np.broadcast_to(rng.random(length) < 0.3, kinds.shape),
            }[pattern]
            kinds |= (admits & (at <= queries[:, None])).astype(np.uint8) << p
        logits = np.where(at == needed[:, None], 5.0 * layer, rng.normal(0, 1, kinds.shape))
        weights = np.exp(logits) * (kinds > 0)
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-9)
        arrays[f"attended_weights_{layer}"] = weights.astype(np.float16)
        arrays[f"attended_kinds_{layer}"] = kinds
        row = np.arange(n)
        found: dict[str, dict[str, float]] = {}
        for name, inside in [("any", kinds > 0), *((p, kinds & (1 << b) > 0) for b, p in enumerate(patterns))]:
            hit = inside[row, needed]
            weight = float((weights[row, needed] * hit).mean())
            found[name] = {"admitted": float(hit.mean()), "weight": weight, "key_admitted": 0.5, "key_weight": 0.1}
        shares.append({"layer": f"layers.{layer}.attention", "patterns": patterns, "shares": found})
    return {"size": [16, 16], "drawn": [n_contexts, n_keys], "samples": 8, "layers": shares}, arrays


def _pairs(n_keys: int) -> list[str]:
    return [word for k in range(n_keys) for word in ("abcde"[k], str(k + 1))]
