"""Associative recall: keys are told one value each, then asked for. Joint recall without contexts.

With one query, the default, and then with ``n_queries=None``::

    a 5 b 2 c 3 d 1 e 4 | c ?                      ->  3
    a 5 b 2 c 3 d 1 e 4 | c ? e ? a ? d ? b ?      ->  3 4 5 1 2

Tokens: ``bos``; a key and its value, for every key in random order; ``sep``; the keys that are asked for, each followed
by its value. The values are independent and uniform. For the setting with a large vocabulary and queries at a distance
see ``tasks.zoology``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recollect.tasks.nested import Axis, NestedConfig, NestedRecall


class AssociativeRecall(NestedRecall):
    """Keys are told one value each; then ``n_queries`` of them are asked for."""

    @dataclass(frozen=True)
    class Config(NestedConfig, kind="associative-recall"):
        """An inclusive range of numbers of keys, and the ids set aside for them."""

        n_keys: tuple[int, int] = (4, 32)
        max_keys: int | None = None
        """Key ids set aside, and so the most keys that can be asked for; None: the end of ``n_keys``."""
        n_queries: int | None = field(default=1, kw_only=True)
        """Distinct keys asked for; None: all of them."""

        @property
        def axes(self) -> tuple[Axis, ...]:
            return (Axis("keys", "n_keys", self.n_keys, "max_keys", self.max_keys),)

        def build(self) -> AssociativeRecall:
            return AssociativeRecall(self)

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(AssociativeRecall.Config() if config is None else config)
