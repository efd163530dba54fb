"""Joint recall with any number of levels of contexts (arXiv 2507.00449, appendix C).

Every level has a vocabulary of its own, and a key has a value under every chain of contexts. Two levels of two contexts
and two keys::

    1A 2A a 1 b 2 2B b 3 a 4 1B 2B a 5 b 6 2A a 7 b 8 | 1B 2A b ? a ? 2B a ? b ? 1A 2B b ? a ? 2A b ? a ?
        ->  8 7 5 6 3 4 2 1

Tokens: ``bos``; for every outermost context its token and then all below it, down to the keys, each followed by its
value; ``sep``; the same blocks again. With ``n_queries``, so many cells, each as its contexts, its key and its value::

    1A 2A a 1 b 2 2B b 3 a 4 1B 2B a 5 b 6 2A a 7 b 8 | 1B 2B b ?                   ->  6

Contexts and keys are permuted afresh wherever they stand; the values are independent and uniform. No level is
associative recall, one is joint recall.
"""

from __future__ import annotations

from dataclasses import dataclass

from recollect.core.errors import ConfigError
from recollect.tasks.nested import Axis, NestedConfig, NestedRecall


class MultiLevelRecall(NestedRecall):
    """Keys with a value of their own under every chain of contexts, level below level."""

    @dataclass(frozen=True)
    class Config(NestedConfig, kind="multi-level-joint-recall"):
        """Inclusive ranges of the contexts on every level, outermost first, and of the keys."""

        levels: tuple[tuple[int, int], ...] = ((2, 4), (2, 4))
        n_keys: tuple[int, int] = (2, 4)
        max_size: tuple[int, ...] | None = None
        """Ids set aside on every level and for keys, and so the largest size that can be asked for."""

        def __post_init__(self) -> None:
            if self.max_size is not None and len(self.max_size) != len(self.levels) + 1:
                raise ConfigError(
                    f"{self.kind}: max_size has a number for each of {len(self.levels)} levels and one for keys, "
                    f"got {len(self.max_size)}"
                )
            super().__post_init__()

        @property
        def axes(self) -> tuple[Axis, ...]:
            limits = self.max_size or (None,) * (len(self.levels) + 1)
            return (
                *(
                    Axis(f"level-{i + 1}", f"levels.{i}", level, f"max_size.{i}", limits[i])
                    for i, level in enumerate(self.levels)
                ),
                Axis("keys", "n_keys", self.n_keys, f"max_size.{len(self.levels)}", limits[-1]),
            )

        def build(self) -> MultiLevelRecall:
            return MultiLevelRecall(self)

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(MultiLevelRecall.Config() if config is None else config)
