"""Seeded generators of token sequences with labels and masks, and the solvers their scores are held against.

A new task is one file and one line of ``TASKS``.
"""

from __future__ import annotations

from recollect.tasks.associative_recall import AssociativeRecall
from recollect.tasks.base import TaskConfig
from recollect.tasks.batch import TokenBatch, accuracy
from recollect.tasks.joint_recall import JointRecall
from recollect.tasks.multi_level import MultiLevelRecall
from recollect.tasks.zoology import Zoology

TASKS: dict[str, TaskConfig] = {
    "associative-recall": AssociativeRecall.Config(),
    "multi-query-associative-recall": Zoology.Config(),
    "joint-recall": JointRecall.Config(n_queries=1),
    "multi-query-joint-recall": JointRecall.Config(),
    "multi-level-joint-recall": MultiLevelRecall.Config(),
}
"""What each task asks by default; the sizes are the config's, to be replaced."""

__all__ = [
    "TASKS",
    "AssociativeRecall",
    "JointRecall",
    "MultiLevelRecall",
    "TaskConfig",
    "TokenBatch",
    "Zoology",
    "accuracy",
]
