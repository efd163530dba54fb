"""Published numbers that reports print beside ours, each with its source, environment and metric.

A number counts as of *the same task* only where ours is that task; where sizes, pictures or data differ it is a
*related* one, whose order may be compared and whose values may not. Reports say which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class PublishedTable:
    """Numbers of one paper's table, of one environment and metric, under our rows' names and in our units."""

    source: str
    environment: str
    """By our name, or the task's."""
    metric: str
    """By our name."""
    values: dict[str, float]
    """Row -> share in [0, 1], or error."""
    task: str
    """What was run."""
    measured: str
    """How."""
    same_task: str = ""
    """The face-off that runs this very task; others of its family are only related."""
    size: int = 0
    """Of an environment that comes in several."""

    @property
    def accuracy(self) -> dict[str, float]:
        """The values of a table of accuracies."""
        return self.values


HAX_JOINT_RECALL = PublishedTable(
    source="arXiv 2507.00449, table 1",
    environment="joint-recall",
    metric="accuracy",
    values={
        "mamba": 0.163,
        "mamba+dilated": 0.078,
        "mamba+window": 0.187,
        "mamba+window+dilated": 0.166,
        "mamba+sink": 0.164,
        "mamba+lsh": 0.116,
        "mamba+ks": 0.366,
        "mamba+hax": 0.380,
        "mamba-2x": 0.345,
        "mamba2": 0.366,
        "mamba2+dilated": 0.196,
        "mamba2+window": 0.706,
        "mamba2+window+dilated": 0.486,
        "mamba2+sink": 0.493,
        "mamba2+lsh": 0.135,
        "mamba2+ks": 0.601,
        "mamba2+hax": 0.743,
        "mamba2-2x": 0.592,
        "samba": 0.063,
    },
    task="joint recall of 5..16 contexts x 5..16 keys, 2 layers of width 64, 64 keys per query, 400,000 steps",
    measured="accuracy per sample, all sizes alike, mean of three seeds at the best of three learning rates",
    same_task="recall-published",
)
"""There +D is our ``+dilated``, +SW ``+window``, +SW+D ``+window+dilated``, +A ``+sink`` (window and sink), Base 2x dim
``-2x``. No spread is published; no row has full attention."""

S4WM = "arXiv 2307.02064"


class Family(NamedTuple):
    """Environments of one kind that differ in size, as the paper and we have them."""

    kind: str
    """Of the environment's config that runs it."""
    size: str
    """The field of the config that says how large."""
    called: str
    """What a size is called: ``{}`` stands for the number."""
    others: Mapping[str, Any] | None
    """The other fields, with the values that make ours the paper's task; None: it never is."""
    measured: str


FAMILIES = (
    Family(
        "distracting-memory",
        "width",
        "distracting-memory-{}",
        {"p_distractor": 0.5, "n_colours": 4},
        "share of final rewards predicted right, observing the whole episode or imagining after the context",
    ),
    Family(
        "multi-doors-keys",
        "n_doors",
        "multi-doors-keys-{}",
        {"n_colours": 4, "attempts": 2},
        "squared error summed over a frame, rebuilt from posteriors or imagined after the context",
    ),
    Family(
        "memory-maze",
        "size",
        "memory-maze-{0}x{0}",
        None,
        "offline probing of the second half of an episode: walls in per cent, objects as squared error in cells",
    ),
)

RELATED_KINDS = {"maze": "memory-maze"}
"""Environments of ours that are asked the same and look different, and the paper's."""

_ROWS = ("rssm", "tssm", "s4wm", "s5wm")


def _tables(kind: str, by_metric: Mapping[str, Mapping[int, Sequence[float]]], source: str) -> list[PublishedTable]:
    (family,) = (each for each in FAMILIES if each.kind == kind)
    return [
        PublishedTable(
            source=f"{S4WM}, {source}",
            environment=family.called.format(size),
            metric=metric,
            values=dict(zip(_ROWS, values, strict=False)),
            task=family.called.format(size),
            measured=family.measured,
            size=size,
        )
        for metric, sizes in by_metric.items()
        for size, values in sizes.items()
    ]


WORLDS: tuple[PublishedTable, ...] = (
    *_tables(
        "distracting-memory",
        {
            "imagination_accuracy": {
                100: (0.496, 0.512, 1.0),
                200: (0.484, 0.513, 1.0),
                400: (0.522, 0.510, 1.0),
            },
            "inference_accuracy": {
                100: (0.479, 1.0, 1.0),
                200: (0.487, 0.999, 1.0),
                400: (0.504, 0.504, 1.0),
            },
        },
        "reward prediction",
    ),
    *_tables(
        "multi-doors-keys",
        {
            "generation_mse": {3: (5.16, 1.27, 0.04), 5: (6.36, 6.05, 0.27), 7: (6.28, 9.24, 0.10)},
            "reconstruction_mse": {3: (0.05, 0.05, 0.01), 5: (0.04, 0.03, 0.02), 7: (0.03, 0.02, 0.02)},
        },
        "door-state prediction",
    ),
    *_tables(
        "memory-maze",
        {
            "walls_accuracy": {9: (0.950, 0.864, 0.884, 0.983), 15: (0.817, 0.798, 0.802, 0.818)},
            "objects_mse": {9: (5.4, 10.2, 8.9, 1.8), 15: (32.6, 35.1, 34.8, 25.3)},
        },
        "offline probing",
    ),
)
"""Means without a spread. Rows of the paper are RSSM with truncated back-propagation, Transformer-XL, S4 and S5."""


@dataclass(frozen=True)
class Beside:
    """Published tables to print beside a group of ours, by metric, and what has to be known to read them."""

    tables: dict[str, PublishedTable]
    same: bool
    """Whether ours is the very task."""

    @property
    def note(self) -> str:
        """In one or two sentences."""
        sources = "; ".join(dict.fromkeys(table.source for table in self.tables.values()))
        first = next(iter(self.tables.values()))
        if self.same:
            return (
                f"Published: {sources}, the same task, {first.environment}, which is rebuilt here from the paper's "
                f"description; {first.measured}."
            )
        return (
            f"Published: {sources}, of {first.environment}; {first.measured}. Ours is only a related task, of another "
            "size, look or data: compare the order of the rows, not the numbers."
        )


def published_for(faceoff: str) -> PublishedTable | None:
    """The table that a recall face-off of this name is held against: the ``recall-`` family's, or none."""
    return HAX_JOINT_RECALL if faceoff.startswith("recall-") else None


def published_note(faceoff: str) -> str:
    """What has to be known to read the published column of recall beside ours; empty where there is none."""
    table = published_for(faceoff)
    if table is None:
        return ""
    if faceoff == table.same_task:
        return f"Published: {table.source}, the same task; {table.measured}."
    return (
        f"Published: {table.source}, {table.task}; {table.measured}. Only {table.same_task} is the same task: the "
        "tables here are of other sizes, so compare the order of the rows, not the numbers."
    )


def published_worlds(env: Mapping[str, Any] | None) -> Beside | None:
    """The tables for an environment's config as JSON data: of its size, else of the published size that is nearest.

    None for what no paper has numbers of.
    """
    kind = None if env is None else RELATED_KINDS.get(str(env.get("kind")), env.get("kind"))
    family = next((each for each in FAMILIES if each.kind == kind), None)
    if env is None or family is None or not isinstance(size := env.get(family.size), int):
        return None
    tables = [table for table in WORLDS if table.environment.startswith(family.kind)]
    nearest = min(tables, key=lambda table: abs(table.size - size)).size
    alike = family.others is not None and all(env.get(name, value) == value for name, value in family.others.items())
    return Beside({table.metric: table for table in tables if table.size == nearest}, alike and nearest == size)
