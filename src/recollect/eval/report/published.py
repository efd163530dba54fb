"""Published numbers that reports print beside ours, each with its source, metric and task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """Numbers of one paper's table under our rows' names."""

    source: str
    task: str
    metric: str
    same_task: str
    """The face-off that runs this very task; others of its family are only related."""
    accuracy: dict[str, float]
    """Row -> share in [0, 1]."""


HAX_JOINT_RECALL = PublishedTable(
    source="arXiv 2507.00449, table 1",
    task="joint recall of 5..16 contexts x 5..16 keys, 2 layers of width 64, 64 keys per query, 400,000 steps",
    metric="accuracy per sample, all sizes alike, mean of three seeds at the best of three learning rates",
    same_task="recall-published",
    accuracy={
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
)
"""There +D is our ``+dilated``, +SW ``+window``, +SW+D ``+window+dilated``, +A ``+sink`` (window and sink), Base 2x dim
``-2x``. No spread is published; no row has full attention."""


def published_for(faceoff: str) -> PublishedTable | None:
    """The table that a face-off of this name is held against: the ``recall-`` family's, or none."""
    return HAX_JOINT_RECALL if faceoff.startswith("recall-") else None


def published_note(faceoff: str) -> str:
    """What has to be known to read the published column beside ours; empty where there is none."""
    table = published_for(faceoff)
    if table is None:
        return ""
    if faceoff == table.same_task:
        return f"Published: {table.source}, the same task; {table.metric}."
    return (
        f"Published: {table.source}, {table.task}; {table.metric}. Only {table.same_task} is the same task: the tables "
        "here are of other sizes, so compare the order of the rows, not the numbers."
    )
