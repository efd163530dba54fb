"""The long-context suite: seeded prompts of any length whose answers stand in their text, made here and offline.

The tasks are ours, in the spirit of published long-context benchmarks; their scores are comparable with no other
suite's. A new task is one file and one line of ``SUITE``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recollect.core.errors import ConfigError, nearest
from recollect.text.suite.base import Prompt, SuiteConfig, SuiteTask, Tokenizer
from recollect.text.suite.corpus import Document, corpus, prompt_of
from recollect.text.suite.joint import JointRecallInWords
from recollect.text.suite.names import Values
from recollect.text.suite.needles import Needles
from recollect.text.suite.prose import write_prose
from recollect.text.suite.tracking import VariableTracking
from recollect.text.suite.word_counts import CommonWords, FrequentWords

SUITE: dict[str, SuiteConfig] = {
    "needle-noise": Needles.Config(values=Values("number", 7)),
    "needle-words": Needles.Config(haystack="words", values=Values("word", 2)),
    "needle-ids": Needles.Config(haystack="ids", values=Values("id", 32)),
    "needle-prose": Needles.Config(haystack="prose", values=Values("number", 7)),
    "multi-key": Needles.Config(haystack="prose", values=Values("number", 7), n_keys=4),
    "multi-key-dense": Needles.Config(haystack="needles", values=Values("number", 7)),
    "multi-key-ids": Needles.Config(haystack="needles", values=Values("id", 32), keys="id"),
    "multi-value": Needles.Config(haystack="prose", values=Values("number", 7), n_values=4),
    "multi-query": Needles.Config(haystack="prose", values=Values("number", 7), n_keys=8, n_queries=4),
    "variable-tracking": VariableTracking.Config(),
    "common-words": CommonWords.Config(),
    "frequent-words": FrequentWords.Config(),
    "joint-recall": JointRecallInWords.Config(n_contexts=6, n_keys=6, haystack="prose"),
    "joint-recall-spread": JointRecallInWords.Config(layout="spread", n_contexts=6, n_keys=6, haystack="prose"),
    "joint-recall-dense": JointRecallInWords.Config(layout="dense"),
}
"""Every task at the size that models of words and word pieces are asked."""

TINY: dict[str, SuiteConfig] = {
    "needle-noise": Needles.Config(),
    "needle-words": Needles.Config(haystack="words", values=Values("word", 1)),
    "needle-ids": Needles.Config(haystack="ids", values=Values("id", 8)),
    "needle-prose": Needles.Config(haystack="prose"),
    "multi-key": Needles.Config(haystack="words", n_keys=4),
    "multi-key-dense": Needles.Config(haystack="needles"),
    "multi-value": Needles.Config(haystack="words", n_values=2),
    "multi-query": Needles.Config(haystack="words", n_keys=4, n_queries=2),
    "variable-tracking": VariableTracking.Config(haystack="words", values=Values("number", 4), n_links=2),
    "common-words": CommonWords.Config(n_answers=2),
    "frequent-words": FrequentWords.Config(n_answers=2, n_words=12),
    "joint-recall": JointRecallInWords.Config(n_contexts=3, n_keys=3, haystack="words"),
    "joint-recall-spread": JointRecallInWords.Config(layout="spread", n_contexts=3, n_keys=3, haystack="words"),
    "joint-recall-dense": JointRecallInWords.Config(layout="dense"),
}
"""The same at sizes that fit 512 bytes, for byte-level models of some millions of parameters."""


_WORD = Values("word", 1)

WORDS: dict[str, SuiteConfig] = {
    "needle-noise": Needles.Config(values=_WORD),
    "needle-prose": Needles.Config(haystack="prose", values=_WORD),
    "multi-key": Needles.Config(n_keys=4, values=_WORD),
    "joint-recall": JointRecallInWords.Config(n_contexts=3, n_keys=3, values=_WORD),
    "joint-recall-spread": JointRecallInWords.Config(layout="spread", n_contexts=3, n_keys=3, values=_WORD),
    "joint-recall-dense": JointRecallInWords.Config(layout="dense", values=_WORD),
}
"""Answers of one word, for models of word pieces that have seen little text: numbers take them longer to copy."""


@dataclass(frozen=True)
class Suite:
    """Tasks by name, and the lengths and depths they are asked at unless others are given."""

    tasks: Mapping[str, SuiteConfig]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


SUITES: dict[str, Suite] = {
    "tiny": Suite(TINY, (512, 1024, 2048, 4096, 8192)),
    "words": Suite(WORDS, (512, 1024, 2048, 4096, 8192)),
    "long": Suite(SUITE, (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)),
}


def load_suite(name: str, tasks: tuple[str, ...] = ()) -> Suite:
    """A named suite, with the named tasks of it only, if any are named. Raises ConfigError for an unknown name."""
    if name not in SUITES:
        raise ConfigError(f"unknown suite '{name}'{nearest(name, SUITES)}")
    suite = SUITES[name]
    for task in tasks:
        if task not in suite.tasks:
            raise ConfigError(f"suite '{name}' has no task '{task}'{nearest(task, suite.tasks)}")
    return Suite({task: suite.tasks[task] for task in tasks or suite.tasks}, suite.lengths, suite.depths)


__all__ = [
    "SUITE",
    "SUITES",
    "TINY",
    "CommonWords",
    "Document",
    "FrequentWords",
    "JointRecallInWords",
    "Needles",
    "Prompt",
    "Suite",
    "SuiteConfig",
    "SuiteTask",
    "Tokenizer",
    "Values",
    "VariableTracking",
    "corpus",
    "load_suite",
    "prompt_of",
    "write_prose",
]
