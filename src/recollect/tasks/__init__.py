"""Seeded generators of token sequences with labels and masks, and the solvers their scores are held against.

A new task is one file and one line of ``TASKS``.
"""

from __future__ import annotations

from typing import Any

from recollect.tasks.batch import TokenBatch, accuracy
from recollect.tasks.joint_recall import JointRecall

TASKS: dict[str, type[Any]] = {
    "joint-recall": JointRecall,
}

__all__ = ["TASKS", "JointRecall", "TokenBatch", "accuracy"]
