"""A finished face-off of world models that never ran: several environments in one, numbers and pictures by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ROWS = ("rssm", "tssm", "s4wm", "s5wm", "haxwm")
SKILL = {"rssm": 0.1, "tssm": 0.4, "s4wm": 0.8, "s5wm": 0.9, "haxwm": 0.7}
ENVS: dict[str, dict[str, Any]] = {
    "distracting-memory-30": {"kind": "distracting-memory", "width": 30, "p_distractor": 0.5, "n_colours": 4},
    "multi-doors-keys-2": {"kind": "multi-doors-keys", "n_doors": 2, "n_colours": 4, "attempts": 2},
    "two-rooms-teleport": {"kind": "rooms", "layout": "two", "teleport": True},
    "maze-9x9": {"kind": "maze", "size": 9},
}
CONTEXT, QUERY, FILM = 20, 12, 12


def write_worlds(
    directory: Path,
    *,
    rows: tuple[str, ...] = ROWS,
    envs: dict[str, dict[str, Any]] = ENVS,
    seeds: int = 1,
    side: int = 16,
    skill: dict[str, float] = SKILL,
) -> Path:
    """Write the directory; every group is an environment of ``envs``, named by its key."""
    runs = [
        {"group": group, "row": row, "seed": 0, "problem": {"kind": "world", "env": env}, "train": {}}
        for group, env in envs.items()
        for row in rows
    ]
    directory.mkdir(parents=True, exist_ok=True)
    config = {"name": "worlds-micro", "title": "Worlds, every row", "runs": runs, "seeds": list(range(seeds))}
    (directory / "faceoff.json").write_text(json.dumps(config))
    for group, env in envs.items():
        for row in rows:
            for seed in range(seeds):
                _write_run(directory / group / row / f"seed{seed}", group, env, row, seed, side, skill[row])
    return directory


def metrics_of(env: dict[str, Any], skill: float) -> tuple[str, dict[str, float]]:
    """Headline and metrics as ``train.world`` reports them of such an environment; an error is 10 (1 - skill)."""
    error = 10 * (1 - skill)
    frames = {
        "reconstruction_mse": 1 - skill / 2,
        "reconstruction_mse_context": 0.9 - skill / 2,
        "reconstruction_mse_query": 1.1 - skill / 2,
        "generation_mse": error,
        "generation_psnr": 20 + 10 * skill,
        "surprise_context": 9 - skill,
        "surprise_query": 9 * (1 - skill),
        "recalled": 1 - 9 * (1 - skill) / (9 - skill),
    }
    if env["kind"] == "distracting-memory":
        right = {"inference_accuracy": 0.99, "imagination_accuracy": 0.5 + skill / 2}
        longer = {f"longer_{name}": value for name, value in {**frames, **right}.items()}
        return "imagination_accuracy", {**frames, **right, **longer}
    if env["kind"] == "multi-doors-keys":
        return "generation_mse", {**frames, "doors_accuracy": skill, "view_accuracy": 0.9 * skill}
    if env["kind"] == "maze":
        probed = {"walls_accuracy": 0.8 + skill / 10, "objects_mse": error, "objects_rmse": error**0.5}
        return "generation_mse", {**frames, **probed}
    return "generation_mse", {**frames, "expectation_mse": 0.6 * error}


def _write_run(folder: Path, group: str, env: dict[str, Any], row: str, seed: int, side: int, skill: float) -> None:
    folder.mkdir(parents=True)
    skill = min(skill + 0.01 * seed, 1.0)
    headline, metrics = metrics_of(env, skill)
    lines: list[dict[str, Any]] = []
    for step in range(20, 401, 20):
        lines.append({"step": step, "loss": 90.0 * 0.99**step + 1 - skill, "elapsed_s": step / 8})
        if step % 100 == 0:
            part = metrics[headline] if headline == "imagination_accuracy" else metrics[headline] * (500 - step) / 100
            lines.append({"step": step, "split": "valid", "eval": {headline: part}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = env["kind"] == "distracting-memory"
    arrays = _pictures(list(ENVS).index(group) if group in ENVS else 0, side, skill, reward)
    details: dict[str, Any] = {
        "context": CONTEXT,
        "query": QUERY,
        "env": env,
        "chance": 0.5,
        "generation_mse_curve": np.geomspace(0.1, 20 * (1 - skill) + 0.01, QUERY).tolist(),
        "reconstruction_mse_curve": np.linspace(1.4 - skill, 1 - skill, CONTEXT + QUERY - 1).tolist(),
    }
    if reward:
        details["longer_generation_mse_curve"] = np.geomspace(0.1, 40 * (1 - skill) + 0.01, 2 * QUERY).tolist()
    if row.startswith("hax"):
        details["attended"], maps = _maps()
        arrays |= maps
    np.savez_compressed(folder / "arrays.npz", **arrays)
    results = {
        "recipe": "worlds-micro",
        "group": group,
        "row": row,
        "seed": seed,
        "fingerprint": "abcdef012345",
        "params": 480_000,
        "state_bytes": {"rssm": 2_048, "tssm": 65_536, "haxwm": 26_000}.get(row, 1_024),
        "commit": "1a3cc03",
        "device": "cpu",
        "steps": 400,
        "wall_s": 50.0,
        "headline": headline,
        "validation": {"step": 400, "metric": headline, "value": metrics[headline]},
        "metrics": metrics,
        "details": details,
    }
    (folder / "results.json").write_text(json.dumps(results))


def _pictures(env: int, side: int, skill: float, rewarded: bool) -> dict[str, Any]:
    rng = np.random.default_rng(env)
    cells = rng.integers(0, 256, (8, FILM, 4, 4, 3))
    truth = cells.repeat(side // 4, 2).repeat(side // 4, 3).astype(np.uint8)
    wrong = rng.random((8, FILM, 4, 4, 1)) * np.linspace(0.2, 1, FILM)[:, None, None, None] > skill
    other = np.where(wrong, rng.integers(0, 256, cells.shape), cells)
    dreamed = other.repeat(side // 4, 2).repeat(side // 4, 3).astype(np.uint8)
    at = np.linspace(0, FILM - 1, 10).round().astype(int)
    arrays: dict[str, Any] = {"strip_step": CONTEXT + at, "film_step": CONTEXT + np.arange(FILM)}
    arrays |= {"film_truth": truth[:2], "film_imagined": dreamed[:2]}
    for kind, numbers in (("strip", [0, 1, 2, 3]), ("best", [5, 1, 4, 6]), ("worst", [7, 2, 3, 0])):
        arrays[f"{kind}_truth"], arrays[f"{kind}_imagined"] = truth[numbers][:, at], dreamed[numbers][:, at]
        arrays[f"{kind}_number"] = np.array(numbers)
        arrays[f"{kind}_error"] = 10 * (1 - skill) * (1.0 + np.array(numbers))
        arrays[f"{kind}_reward_true"] = np.array(numbers) % 2.0 * rewarded
        arrays[f"{kind}_reward_imagined"] = np.array(numbers) % 2 * skill
    return arrays


def _maps() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two layers of two patterns: the second keeps frame 5 in mind, the first the frame before."""
    length = CONTEXT + QUERY
    queries, keys = np.arange(CONTEXT, length + 1), np.arange(length + 1)
    near = np.zeros((QUERY, length))
    near[np.arange(QUERY), CONTEXT + np.arange(QUERY) - 1] = 0.6
    kept = np.zeros((QUERY, length))
    kept[:, 5] = 0.4
    weights = np.stack([near, kept]).astype(np.float16)
    layers = [{"layer": f"layers.{i}.attention", "patterns": ["lsh", "key-selection"]} for i in (0, 2)]
    arrays = {"frames_queries": queries, "frames_keys": keys, "frames_weights_0": weights, "frames_weights_1": weights}
    return {"length": length, "context": CONTEXT, "layers": layers}, arrays
