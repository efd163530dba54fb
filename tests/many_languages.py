"""A finished face-off of language models that never ran: losses and answers found by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recollect.eval.long_context import averages

ROWS = ("none", "none-longer", "D", "SW", "SW+D", "A", "LSH", "KS", "HAX", "recommended")
SKILL = {
    **{"none": 0.10, "none-longer": 0.16, "D": 0.05, "SW": 0.2, "SW+D": 0.3, "A": 0.35},
    **{"LSH": 0.4, "KS": 0.7, "HAX": 0.9, "recommended": 0.8},
}
LENGTHS = (2048, 4096, 8192)
TASKS = ("needle-noise", "multi-key", "joint-recall", "common-words")
DEPTHS = (0.0, 0.5, 1.0)
TRAINED = 2048
STEP = 0.004
"""What the second seed's loss lies above the first's."""


def write_languages(
    directory: Path,
    *,
    rows: tuple[str, ...] = ROWS,
    groups: tuple[str, ...] = ("language",),
    seeds: int = 2,
    skill: dict[str, float] = SKILL,
    lengths: tuple[int, ...] = LENGTHS,
    tasks: tuple[str, ...] = TASKS,
    short: tuple[str, ...] = (),
) -> Path:
    """Write the directory; ``short`` are tasks that do not fit the first length."""
    runs = [
        {"group": group, "row": row, "seed": 0, "problem": {"kind": "language", "row_length": TRAINED}, "train": {}}
        for group in groups
        for row in rows
    ]
    directory.mkdir(parents=True, exist_ok=True)
    config = {"name": "language-micro", "title": "HAX beside a Mamba-2", "runs": runs, "seeds": list(range(seeds))}
    (directory / "faceoff.json").write_text(json.dumps(config))
    for group in groups:
        for row in rows:
            for seed in range(seeds):
                folder = directory / group / row / f"seed{seed}"
                _write_run(folder, group, row, seed, skill[row], lengths, tasks, short)
    return directory


def loss_of(skill: float, seed: int) -> float:
    """2.5 without any skill, 0.2 less with all of it."""
    return 2.5 - 0.2 * skill + STEP * seed


def share_of(skill: float, task: str, length: int, depth: float | None, seed: int = 0) -> float:
    """All of it at 2,048 tokens, half at each doubling; the end of a text is easier, the first seed better."""
    easy = (1.0 if depth is None else 0.8 + 0.2 * depth) * (1 - 0.1 * seed)
    return skill * easy * TRAINED / length * (0.5 if task.startswith("joint") else 1.0)


def _write_run(
    folder: Path,
    group: str,
    row: str,
    seed: int,
    skill: float,
    lengths: tuple[int, ...],
    tasks: tuple[str, ...],
    short: tuple[str, ...],
) -> None:
    folder.mkdir(parents=True)
    loss = loss_of(skill, seed)
    lines: list[dict[str, Any]] = []
    for step in range(20, 301, 20):
        lines.append({"step": step, "loss": loss + 0.4 * 0.98**step, "elapsed_s": step * 5.0, "steps_per_s": 0.2})
        if step % 60 == 0:
            lines.append({"step": step, "split": "valid", "eval": {"loss": loss + 0.3 * 0.99**step, "accuracy": 0.4}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases = [
        _case(skill, task, n, depth, seed, task in short and n == lengths[0])
        for task in tasks
        for n in lengths
        for depth in ((None,) if task == "common-words" else DEPTHS)
    ]
    suite = {"averages": averages(cases), "rows": cases}
    metrics: dict[str, float] = {"loss": loss, "perplexity": 2.718**loss, "accuracy": 0.4}
    metrics |= {f"loss_{n}": loss - 0.1 * skill + 0.00001 * n for n in lengths}
    metrics |= {f"{each['task']}_{each['length']}": each["found"] for each in suite["averages"]}
    attended = not row.startswith("none")
    results = {
        "recipe": "language-micro",
        "group": group,
        "row": row,
        "seed": seed,
        "fingerprint": "abcdef012345",
        "params": 2_100_000 + 70_000 * attended,
        "trained_params": 2_100_000 + 70_000 * attended,
        "state_bytes": 280_000 + 512_000 * attended,
        "tokens": {"documents": 6000, "tokens": 40_000_000, "tokenizer": "learned"},
        "commit": "1a3cc03",
        "device": "cpu",
        "steps": 300,
        "wall_s": 1500.0 + 400 * attended,
        "headline": "loss",
        "validation": {"step": 300, "metric": "loss", "value": loss + 0.01},
        "metrics": metrics,
        "details": {"by_position": {str(n): _by_position(loss, skill, n) for n in lengths}, "suite": suite},
    }
    (folder / "results.json").write_text(json.dumps(results))


def _case(skill: float, task: str, length: int, depth: float | None, seed: int, short: bool) -> dict[str, Any]:
    case = {"task": task, "length": length, "depth": depth}
    if short:
        return {**case, "status": "left out", "why": "its shortest prompt is longer"}
    found = share_of(skill, task, length, depth, seed)
    guesser = 0.25 if task in ("multi-key", "joint-recall") else None
    scores = {"found": found, "nll": 3 * (1 - found), "exact": found / 2, "found_se": 0.1}
    return {**case, "status": "measured", "n": 10, **scores, "chance": 0.02, "guesser": guesser}


def _by_position(loss: float, skill: float, length: int) -> dict[str, Any]:
    edges = [1 << e for e in range(length.bit_length())]
    octaves = [
        {"from": start, "to": 2 * start, "nats": loss + 2.0 / start**0.6 - 0.01 * skill * i, "se": 0.02, "n": 8 * start}
        for i, start in enumerate(edges[:-1])
    ]
    return {"block": length // 8, "n_rows": 8, "n_tokens": 8 * length, "nats": loss, "linear": [], "geometric": octaves}
