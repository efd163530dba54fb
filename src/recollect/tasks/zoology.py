"""Multi-query associative recall as Zoology has it (arXiv 2312.04927): many words, and queries at a distance.

Three pairs in a sequence of 16 tokens; ``.`` is a random token, whose answer nobody asks for::

    d 5 b 2 h 9 | h ? . . d ? b ? . .      ->  9 5 2

Tokens: keys from the lower half of the vocabulary and values from the upper, alternating, none twice; then every key
once more, at an even distance from the pairs, with a random token after it and not the answer. The distances 2(g - 1)
are drawn without repetition with weights g^(a - 1), a = ``power``: most queries come soon, a few late. All other places
hold random tokens of the whole vocabulary but for two rules that keep a sample readable: they repeat no key of the
sequence, and the first place after the pairs holds no key that is not asked for. Id 0 is padding and nothing else.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recollect.core.errors import ConfigError
from recollect.core.seeding import Streams
from recollect.tasks.base import Oracle, Size, Split, Task, TaskConfig
from recollect.tasks.batch import Bools, Ints, TokenBatch
from recollect.tasks.splits import Facts, draw_in
from recollect.tasks.vocabulary import letter

PADDING = 0


class Zoology(Task):
    """Pairs of words told first; then every key comes back once among random words, near or far."""

    @dataclass(frozen=True)
    class Config(TaskConfig, kind="multi-query-associative-recall"):
        """Sizes as (length, pairs); the defaults are those of the published training mix, drawn equally often.

        Raises ConfigError for a length that is odd or below four times its pairs, a number of pairs given twice, or a
        vocabulary too small for the pairs.
        """

        sizes: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
        vocab_size: int = 8192
        power: float = 0.01

        def __post_init__(self) -> None:
            if not self.sizes:
                raise ConfigError(f"{self.kind}: sizes is empty; give (length, pairs) at least once")
            pairs = [n for _, n in self.sizes]
            for length, n in self.sizes:
                if n < 1:
                    raise ConfigError(f"{self.kind}: a size has at least 1 pair, got ({length}, {n})")
                if length % 2 or length < 4 * n:
                    raise ConfigError(
                        f"{self.kind}: a length is even and at least 4 times its pairs, got ({length}, {n})"
                    )
                if pairs.count(n) > 1:
                    raise ConfigError(f"{self.kind}: {n} pairs are given twice; a number of pairs has one length")
            # Half the ids, without the padding, are keys; one more than the pairs, so that there are other tokens.
            needed = 2 * (max(pairs) + 2)
            if self.vocab_size < needed:
                raise ConfigError(
                    f"{self.kind}: vocab_size must be at least {needed} for {max(pairs)} pairs, got {self.vocab_size}"
                )
            if not self.power > 0:
                raise ConfigError(f"{self.kind}: power must be positive, got {self.power}")

        def build(self) -> Zoology:
            return Zoology(self)

    axes = ("pairs",)

    def __init__(self, config: Config | None = None) -> None:
        self.config = Zoology.Config() if config is None else config
        self.first_value = self.config.vocab_size // 2
        self._by_pairs = sorted(self.config.sizes, key=lambda size: size[1])

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return max(length for length, _ in self.config.sizes)

    def cells(self) -> list[Size]:
        """(pairs,) of every size, fewest first."""
        return [(n,) for _, n in self._by_pairs]

    def length(self, size: Size) -> int:
        """The length given with so many pairs, or else with the next larger number of them."""
        most = self._by_pairs[-1][1]
        if len(size) != 1 or not 1 <= size[0] <= most:
            raise ConfigError(f"{self.config.kind}: size {size} is outside 1..{most} pairs; add it to sizes")
        return next(length for length, n in self._by_pairs if n >= size[0])

    def batch(
        self, rng: np.random.Generator, batch_size: int, *, size: Size | None = None, split: Split | None = None
    ) -> TokenBatch:
        self._check_batch_size(batch_size)
        cells = self.cells()
        return self._write(rng, batch_size, cells[rng.integers(len(cells))] if size is None else size, split)

    def mixed_batch(self, rng: np.random.Generator, batch_size: int, *, split: Split | None = None) -> TokenBatch:
        """``batch_size`` samples, each of a size of its own, padded on the right with 0 to the longest of them."""
        self._check_batch_size(batch_size)
        cells = self.cells()
        chosen = rng.integers(len(cells), size=batch_size)
        L = max(self.length(cells[i]) for i in chosen)
        tokens = np.full((batch_size, L), PADDING, dtype=np.int64)
        labels, mask = tokens.copy(), np.zeros((batch_size, L), dtype=np.bool_)
        for i in np.unique(chosen):
            rows = np.flatnonzero(chosen == i)
            part = self._write(rng, len(rows), cells[i], split)
            within = (rows[:, None], np.arange(part.tokens.shape[1]))
            tokens[within], labels[within], mask[within] = part.tokens, part.labels, part.mask
        return TokenBatch(tokens, labels, mask, np.array(cells, dtype=np.int64)[chosen])

    def render(self, tokens: Ints, answers: Ints | None = None) -> str:
        """One sample (L,) as text, ``d 5 b 2 | . . b ? d ?``: words that are asked for, dots for all others.

        Keys are letters a..z, a1..z1 and so on, values numbers from 1.
        """
        told, asked = self._read(tokens[None])
        n = 2 * int(told.sum())
        words: list[str] = []
        for position, token in enumerate(int(t) for t in tokens):
            if position == n:
                words.append("|")
            key = letter(string.ascii_lowercase, token - 1)
            if position < n:
                words.append(str(token - self.first_value + 1) if position % 2 else key)
            elif asked[0, position]:
                words += [key, "?"]
            elif token != PADDING and not asked[0, position - 1]:
                words.append(".")
        if answers is None:
            return " ".join(words)
        return " ".join([*words, "->", *(str(int(v) - self.first_value + 1) for v in answers[asked[0]])])

    @property
    def oracles(self) -> Mapping[str, Oracle]:
        """``frequent`` says the smallest value told: each is told once."""
        return {"uniform": self._uniform, "frequent": self._frequent, "perfect": self._perfect}

    def told_at(self, batch: TokenBatch) -> Ints:
        """The position of the value in the pair of the asked key."""
        told, asked = self._read(batch.tokens)
        row, pair = np.nonzero(told)
        place = np.full((len(batch.tokens), self.vocab_size), -1, dtype=np.int64)
        place[row, batch.tokens[row, 2 * pair]] = 2 * pair + 1
        return np.where(asked, np.take_along_axis(place, batch.tokens, axis=1), -1)

    def _uniform(self, batch: TokenBatch) -> Ints:
        rng = Streams(0).numpy("eval", "uniform-oracle")
        return rng.integers(self.first_value, self.vocab_size, size=batch.tokens.shape)

    def _frequent(self, batch: TokenBatch) -> Ints:
        told, _ = self._read(batch.tokens)
        values = np.where(told, batch.tokens[:, 1::2], self.vocab_size)
        return np.broadcast_to(values.min(axis=1, keepdims=True), batch.tokens.shape).copy()

    def _perfect(self, batch: TokenBatch) -> Ints:
        told, _ = self._read(batch.tokens)
        row, pair = np.nonzero(told)
        table = np.full((len(batch.tokens), self.vocab_size), PADDING, dtype=np.int64)
        table[row, batch.tokens[row, 2 * pair]] = batch.tokens[row, 2 * pair + 1]
        return np.take_along_axis(table, batch.tokens, axis=1)

    def _read(self, tokens: Ints) -> tuple[Bools, Bools]:
        """Which pairs (B, L / 2) are told, and which positions (B, L) ask: a key of theirs that comes back."""
        keys, values = tokens[:, 0::2], tokens[:, 1::2]
        looks = (keys < self.first_value) & (keys != PADDING) & (values >= self.first_value)
        order = np.argsort(keys, axis=1, kind="stable")
        again = np.zeros_like(looks)
        in_order = np.take_along_axis(keys, order, axis=1)
        np.put_along_axis(again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        told = np.logical_and.accumulate(looks & ~again, axis=1)
        known = np.zeros((len(tokens), self.vocab_size), dtype=np.bool_)
        row, pair = np.nonzero(told)
        known[row, keys[row, pair]] = True
        asked = np.zeros(tokens.shape, dtype=np.bool_)
        asked[:, 0::2] = np.take_along_axis(known, keys, axis=1) & ~told
        return told, asked

    def _check_batch_size(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"{self.config.kind}: batch_size must be at least 1, got {batch_size}")

    def _write(self, rng: np.random.Generator, B: int, size: Size, split: Split | None) -> TokenBatch:
        L, n, first = self.length(size), size[0], self.first_value

        def draw(rows: Ints) -> Ints:
            keys = 1 + _distinct(rng, len(rows), n, first - 1)
            return np.stack([keys, first + _distinct(rng, len(rows), n, self.vocab_size - first)], axis=-1)

        pairs = draw_in(split, B, draw, lambda _, drawn: Facts(drawn, np.ones(drawn.shape[:2], dtype=np.bool_)))
        rows = np.arange(B, dtype=np.int64)[:, None]
        known = np.zeros((B, self.vocab_size), dtype=np.bool_)
        known[rows, pairs[..., 0]] = True
        full = rng.integers(1, self.vocab_size, size=(B, L + 1))
        full[:, 2 * n] = rng.integers(first, self.vocab_size, size=B)
        while (bad := np.take_along_axis(known, full, axis=1)).any():
            full[bad] = rng.integers(1, self.vocab_size, size=int(bad.sum()))

        # The n smallest of exponential times with rates p are n draws without repetition with weights p, in order.
        weight = np.arange(1, (L - 2 * n) // 2 + 1, dtype=np.float64) ** (self.config.power - 1)
        place = 2 * n + 2 * np.argsort(rng.exponential(size=(B, len(weight))) / weight, axis=1)[:, :n]
        full[:, : 2 * n] = pairs.reshape(B, -1)
        full[rows, place] = pairs[..., 0]
        labels, mask = full[:, 1:].copy(), np.zeros((B, L), dtype=np.bool_)
        labels[rows, place], mask[rows, place] = pairs[..., 1], True
        return TokenBatch(full[:, :-1].copy(), labels, mask, np.full((B, 1), n, dtype=np.int64))


def _distinct(rng: np.random.Generator, n_rows: int, n: int, n_ids: int) -> Ints:
    """(n_rows, n) ids below ``n_ids``, no id twice in a row.

    Repeated ones are drawn again. No id is treated unlike another, so all rows without a repetition are equally likely.
    """
    drawn = rng.integers(n_ids, size=(n_rows, n))
    waiting = np.arange(n_rows, dtype=np.int64)
    while len(waiting):
        part = drawn[waiting]
        order = np.argsort(part, axis=1, kind="stable")
        in_order = np.take_along_axis(part, order, axis=1)
        again = np.zeros(part.shape, dtype=np.bool_)
        np.put_along_axis(again, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        part[again] = rng.integers(n_ids, size=int(again.sum()))
        drawn[waiting] = part
        waiting = waiting[again.any(axis=1)]
    return drawn
