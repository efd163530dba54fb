"""A training corpus without any download: prose of the grammar, and documents of the suite with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Literal

import numpy as np

from recollect.core.errors import ConfigError
from recollect.core.seeding import Streams
from recollect.text.suite.base import Prompt, Span, SuiteConfig, Tokenizer, TooShortError
from recollect.text.suite.joint import JointRecallInWords
from recollect.text.suite.needles import Needles
from recollect.text.suite.prose import write_prose

Part = Literal["train", "valid"]


@dataclass(frozen=True)
class Document:
    """A text to train on, what it is, and where its answers stand."""

    text: str
    name: str
    """The task it solves, or ``prose``."""
    answers: tuple[Span, ...] = ()


def prompt_of(
    name: str,
    config: SuiteConfig,
    seed: int,
    length: int,
    depth: float,
    i: int,
    tokenizer: Tokenizer | None = None,
    *,
    reserve: int = 0,
) -> Prompt:
    """The i-th evaluation prompt of a case: it depends on these arguments alone, and no training seed draws it."""
    rng = Streams(seed).numpy("eval", "long-context", name, length, f"{depth:.6f}", i)
    return config.build().sample(rng, length, depth, tokenizer, reserve=reserve)


def corpus(
    seed: int,
    n_documents: int,
    tasks: Mapping[str, SuiteConfig],
    *,
    length: tuple[int, int] = (512, 4096),
    prose: float = 0.5,
    n_restated: int = 8,
    drawn: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    part: Part = "train",
) -> Iterator[Document]:
    """Documents one by one, each addressed by (seed, part, number): any number of them may be drawn again.

    A share ``prose`` of them is prose; the others solve one of ``tasks`` at a random depth, and where other things were
    told that could be asked, up to ``n_restated`` of them are answered before. Tasks are equally likely, or those named
    in ``drawn`` are: one named twice, twice as likely. Lengths are log-uniform between the two
    ends of ``length``, in tokens (bytes without a tokenizer; prose counts characters as bytes).

    Raises ConfigError for empty tasks, a share outside [0, 1], or a shortest length that a task does not fit.
    """
    if not 0.0 <= prose <= 1.0 or (prose < 1.0 and not tasks):
        raise ConfigError(f"corpus: prose must lie in [0, 1] and tasks be given where it is below 1, got {prose:g}")
    low, high = length
    if not 1 <= low <= high or n_restated < 0:
        raise ConfigError(
            f"corpus: length is a range (low, high) and n_restated at least 0, got {length}, {n_restated}"
        )
    names = list(drawn or tasks)
    for i in range(n_documents):
        rng = Streams(seed).numpy("data", "long-context", part, i)
        size = int(exp(rng.uniform(log(low), log(high + 1))))
        if rng.random() < prose:
            yield Document(_prose(rng, min(size, high), tokenizer), "prose")
            continue
        name = names[int(rng.integers(len(names)))]
        prompt = _solved(tasks[name], int(rng.integers(n_restated + 1)), rng, min(size, high), tokenizer)
        spans = tuple((a + len(prompt.text), b + len(prompt.text)) for a, b in prompt.answer_spans)
        yield Document(prompt.text + prompt.completion, name, spans)


def with_restated(config: SuiteConfig, n: int) -> SuiteConfig:
    """The same task with up to n other questions answered before the asked one, where it has others."""
    if isinstance(config, JointRecallInWords.Config):
        most = config.n_contexts * config.n_keys - 1 if config.layout != "dense" else n
        return replace(config, n_restated=min(n, most))
    if isinstance(config, Needles.Config):
        return replace(config, n_restated=min(n, config.n_keys - config.n_queries))
    return config


def _solved(
    config: SuiteConfig, n_restated: int, rng: np.random.Generator, length: int, tokenizer: Tokenizer | None
) -> Prompt:
    """A prompt with as many questions answered before it as are wanted and fit."""
    seed, depth = int(rng.integers(1 << 62)), float(rng.random())
    while True:
        try:
            task = with_restated(config, n_restated).build()
            return task.sample(np.random.default_rng(seed), length, depth, tokenizer)
        except TooShortError:
            if n_restated == 0:
                raise
            n_restated //= 2


def _prose(rng: np.random.Generator, size: int, tokenizer: Tokenizer | None) -> str:
    """Prose of at most ``size`` tokens, cut at a sentence."""
    if tokenizer is None:
        return write_prose(rng, size)
    text = write_prose(rng, size * 16)
    low, high = 0, len(ends := _sentence_ends(text))
    while high - low > 1:
        middle = (low + high) // 2
        if len(tokenizer.encode(text[: ends[middle]])) <= size:
            low = middle
        else:
            high = middle
    return text[: ends[low]]


def _sentence_ends(text: str) -> list[int]:
    return [i + 1 for i, letter in enumerate(text) if letter == "." and text[i + 1 : i + 2] in ("", " ", "\n")]
