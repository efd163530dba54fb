"""Multi-query joint recall: the same keys take other values in every context (arXiv 2507.00449).

A sample is a table of ``n_contexts`` x ``n_keys`` values, told once and then asked for, cell by cell::

    A a 3 b 2 B b 4 a 1 | B a ? b ? A b ? a ?      ->  1 4 2 3

Tokens: ``bos``; one block per context (the context, then a key and its value, for every key); ``sep``; the same blocks
again. Blocks are permuted, and keys within each block, afresh in each of the two parts. The answers stand in the second
part too (the model is teacher-forced), where they say nothing about any other cell. The values are independent and
uniform. Only the first ``n_contexts`` context ids and the first ``n_keys`` key ids are used in a table of that size,
unless they are drawn (``random_ids``). With ``n_queries=2``, two cells are asked for, each under its own context::

    A a 3 b 2 B b 4 a 1 | B a ? A a ?              ->  1 3

Three tracks: ``Config.published()``, whose samples are of the published distribution, id by id (``published_stream``
gives the published samples themselves); ``Config.masked()``, where neither the answers nor the size of the table can be
read off the input; ``Config.mini()``, small tables for a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from recollect.tasks.batch import PAD
from recollect.tasks.nested import Axis, NestedConfig, NestedRecall
from recollect.tasks.published import published_stream
from recollect.tasks.vocabulary import BLANK, BOS, EOS, FIRST_VALUE, SEP

__all__ = ["BLANK", "BOS", "EOS", "FIRST_VALUE", "PAD", "SEP", "JointRecall", "published_stream"]


class JointRecall(NestedRecall):
    """Keys with another value in every context, told once; then every cell is asked for, or ``n_queries`` of them.

    It holds no random state: the caller passes a generator for every batch. Training, validation and test share no
    table (``tasks.splits``), however small; without a ``split`` tables come as they may.
    """

    @dataclass(frozen=True)
    class Config(NestedConfig, kind="joint-recall"):
        """Inclusive ranges of table sizes, and the id space they live in. The defaults are the published grid.

        Raises ConfigError for a size below 1, a reversed range, an id space smaller than the largest table, or more
        queries than the smallest table has cells.
        """

        n_contexts: tuple[int, int] = (5, 16)
        n_keys: tuple[int, int] = (5, 16)
        max_contexts: int | None = None
        """Context ids set aside, and so the largest table that can be asked for; None: the end of ``n_contexts``."""
        max_keys: int | None = None
        """Key ids set aside, likewise; None: the end of ``n_keys``."""

        @classmethod
        def published(cls) -> JointRecall.Config:
            """The published grid and ids: 5..16 contexts x 5..16 keys, answers visible."""
            return cls()

        @classmethod
        def masked(cls) -> JointRecall.Config:
            """The published grid with hidden answers, and ids that do not tell the size of the table."""
            return cls(hide_answers=True, random_ids=True)

        @classmethod
        def mini(cls) -> JointRecall.Config:
            """Tables of 2..8 contexts x 2..8 keys, at most 273 input tokens."""
            return cls(n_contexts=(2, 8), n_keys=(2, 8))

        @property
        def axes(self) -> tuple[Axis, ...]:
            return (
                Axis("contexts", "n_contexts", self.n_contexts, "max_contexts", self.max_contexts),
                Axis("keys", "n_keys", self.n_keys, "max_keys", self.max_keys),
            )

        def build(self) -> JointRecall:
            return JointRecall(self)

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(JointRecall.Config() if config is None else config)
        self.max_contexts, self.max_keys = self.limits
        self.first_context, self.first_key = self.vocabulary.first
