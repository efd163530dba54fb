"""Multi-query joint recall: the same keys take other values in every context (arXiv 2507.00449).

A sample is a table of ``n_contexts`` x ``n_keys`` values, told once and then asked for, cell by cell::

    A a 3 b 2 B b 4 a 1 | B a ? b ? A b ? a ?      ->  1 4 2 3

Tokens: ``bos``; one block per context (the context, then a key and its value, for every key); ``sep``; the same blocks
again. Blocks are permuted, and keys within each block, afresh in each of the two parts. The answers stand in the second
part too (the model is teacher-forced), where they say nothing about any other cell. The values are independent and
uniform. Only the first ``n_contexts`` context ids and the first ``n_keys`` key ids are used in a table of that size.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.tasks.base import Oracle, Size, Split, Task, TaskConfig
from recollect.tasks.batch import Bools, Ints, TokenBatch
from recollect.tasks.splits import Facts, draw_in

BOS, EOS, PAD, SEP = 1, 2, 3, 4
FIRST_VALUE = 10
"""Values start here. Ids 5 to 9 and ``EOS`` are not used: they stand so that ids equal the published ones."""


class JointRecall(Task):
    """Generator of joint-recall batches.

    It holds no random state: the caller passes a generator for every batch. Training, validation and test share no
    table (``tasks.splits``), however small; without a ``split`` tables come as they may.
    """

    @dataclass(frozen=True)
    class Config(TaskConfig, kind="joint-recall"):
        """Inclusive ranges of table sizes, and the id space they live in. The defaults are the published grid.

        Raises ConfigError for a size below 1, a reversed range, or an id space smaller than the largest table.
        """

        n_contexts: tuple[int, int] = (5, 16)
        n_keys: tuple[int, int] = (5, 16)
        n_values: int = 16
        max_contexts: int | None = None
        """Context ids set aside, and so the largest table that can be asked for; None: the end of ``n_contexts``."""
        max_keys: int | None = None
        """Key ids set aside, likewise; None: the end of ``n_keys``."""

        def __post_init__(self) -> None:
            for name, (low, high) in (("n_contexts", self.n_contexts), ("n_keys", self.n_keys)):
                if low < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {low}")
                if low > high:
                    raise ConfigError(f"{self.kind}: {name} is a range (low, high), got ({low}, {high})")
            if self.n_values < 1:
                raise ConfigError(f"{self.kind}: n_values must be at least 1, got {self.n_values}")
            for name, limit, high in (
                ("max_contexts", self.max_contexts, self.n_contexts[1]),
                ("max_keys", self.max_keys, self.n_keys[1]),
            ):
                if limit is not None and limit < high:
                    raise ConfigError(f"{self.kind}: {name} must be at least {high}, the largest table, got {limit}")

        def build(self) -> JointRecall:
            return JointRecall(self)

    axes = ("contexts", "keys")
    blind = "key-majority"

    def __init__(self, config: Config | None = None) -> None:
        self.config = JointRecall.Config() if config is None else config
        self.max_contexts = self.config.max_contexts or self.config.n_contexts[1]
        self.max_keys = self.config.max_keys or self.config.n_keys[1]
        self.first_key = FIRST_VALUE + self.config.n_values
        self.first_context = self.first_key + self.max_keys

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: 58 on the published grid."""
        return self.first_context + self.max_contexts

    @property
    def max_length(self) -> int:
        """Input tokens of the largest table that will be drawn: 1,057 on the published grid."""
        return self.length((self.config.n_contexts[1], self.config.n_keys[1]))

    def length(self, size: Size) -> int:
        """Input tokens L of a table of this size, 1 + 2 n_contexts (2 n_keys + 1): the last token is only a label."""
        n_contexts, n_keys = size
        return 1 + 2 * n_contexts * (2 * n_keys + 1)

    def cells(self) -> list[Size]:
        """Every (n_contexts, n_keys) that can be drawn."""
        (low, high), (key_low, key_high) = self.config.n_contexts, self.config.n_keys
        return [(c, k) for c in range(low, high + 1) for k in range(key_low, key_high + 1)]

    def batch(
        self, rng: np.random.Generator, batch_size: int, *, size: Size | None = None, split: Split | None = None
    ) -> TokenBatch:
        """``batch_size`` samples of one size, without padding.

        ``size`` is (n_contexts, n_keys), anywhere in the id space; None draws one of ``cells()`` for the whole batch.
        Raises ConfigError for a size outside the id space or an empty batch.
        """
        self._check_batch_size(batch_size)
        if size is None:
            sizes = self._draw_sizes(rng, 1)
        elif 1 <= size[0] <= self.max_contexts and 1 <= size[1] <= self.max_keys:
            sizes = np.array([size], dtype=np.int64)
        else:
            limits = f"1..{self.max_contexts} contexts x 1..{self.max_keys} keys"
            raise ConfigError(f"joint-recall: size {size} is outside {limits}; raise max_contexts or max_keys")
        return self._write(rng, np.repeat(sizes, batch_size, axis=0), split)

    def mixed_batch(self, rng: np.random.Generator, batch_size: int, *, split: Split | None = None) -> TokenBatch:
        """``batch_size`` samples, each of a size of its own, padded on the right with ``PAD`` to the longest of them.

        As in the published data, a sample that ends before the longest one keeps its last answer in the input.
        """
        self._check_batch_size(batch_size)
        return self._write(rng, self._draw_sizes(rng, batch_size), split)

    def render(self, tokens: npt.NDArray[np.int64], answers: npt.NDArray[np.int64] | None = None) -> str:
        """One sample (L,) as text: ``A a 3 b 2 B b 4 a 1 | B a ? b ? A b ? a ?``; values count from 1.

        With ``answers`` (L,), labels or predictions, the answers at the asked positions follow: ``-> 1 4 2 3``.
        """
        words: list[str] = []
        told: list[str] = []
        asking = False
        for position, token in enumerate(int(t) for t in tokens):
            if token == SEP:
                asking = True
                words.append("|")
            elif token >= self.first_context:
                words.append(_letter(string.ascii_uppercase, token - self.first_context))
            elif token >= self.first_key:
                words.append(_letter(string.ascii_lowercase, token - self.first_key))
                if asking:
                    words.append("?")
                    told += [] if answers is None else [str(int(answers[position]) - FIRST_VALUE + 1)]
            elif token >= FIRST_VALUE and not asking:
                words.append(str(token - FIRST_VALUE + 1))
        return " ".join(words) if answers is None else f"{' '.join(words)} -> {' '.join(told)}"

    def told_at(self, batch: TokenBatch) -> Ints | None:
        """The position right after the cell's key in the first part."""
        from recollect.tasks.oracles import read_pairs

        told, _, asked = read_pairs(batch, self)
        shape = (len(batch.tokens), self.max_contexts, self.max_keys)
        place_BCK = np.zeros(shape, dtype=np.int64)
        place_BCK[told.row, told.context, told.key] = told.column + 1
        found = np.full(batch.tokens.shape, -1, dtype=np.int64)
        found[asked.row, asked.column] = place_BCK[asked.row, asked.context, asked.key]
        return found

    @property
    def oracles(self) -> Mapping[str, Oracle]:
        from recollect.tasks.oracles import ORACLES

        def bound(oracle: Callable[[TokenBatch, JointRecall], Ints]) -> Oracle:
            return lambda batch: oracle(batch, self)

        return {name: bound(oracle) for name, oracle in ORACLES.items()}

    def _check_batch_size(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"joint-recall: batch_size must be at least 1, got {batch_size}")

    def _draw_sizes(self, rng: np.random.Generator, n: int) -> Ints:
        low, high = np.array([self.config.n_contexts, self.config.n_keys]).T
        return rng.integers(low, high, size=(n, 2), endpoint=True)

    def _write(self, rng: np.random.Generator, sizes: Ints, split: Split | None) -> TokenBatch:
        """Samples of the given sizes (B, 2). All are laid out at the largest size, then what they lack is cut out."""
        B, (C, K) = len(sizes), sizes.max(axis=0)
        n_contexts, n_keys = sizes[:, 0, None, None], sizes[:, 1, None, None, None]
        cell_CK = np.indices((C, K)).transpose(1, 2, 0)

        def facts(rows: Ints, table: Ints) -> Facts:
            told = np.concatenate([np.broadcast_to(cell_CK, (*table.shape, 2)), table[..., None]], axis=-1)
            used = (cell_CK < sizes[rows, None, None]).all(axis=-1)
            return Facts(told.reshape(len(rows), -1, 3), used.reshape(len(rows), -1))

        table_BCK = draw_in(split, B, lambda rows: rng.integers(self.config.n_values, size=(len(rows), C, K)), facts)
        context_BSC = _permutations(rng.random((B, 2, C)), n_contexts)
        key_BSCK = _permutations(rng.random((B, 2, C, K)), n_keys)
        value_BSCK = table_BCK[np.arange(B)[:, None, None, None], context_BSC[..., None], key_BSCK]

        blocks = np.empty((B, 2, C, 2 * K + 1), dtype=np.int64)
        blocks[..., 0] = context_BSC + self.first_context
        blocks[..., 1::2] = key_BSCK + self.first_key
        blocks[..., 2::2] = value_BSCK + FIRST_VALUE
        heads = np.broadcast_to(np.array([BOS, SEP])[None, :, None], (B, 2, 1))
        full = np.concatenate([heads, blocks.reshape(B, 2, -1)], axis=2).reshape(B, -1)

        asked = np.zeros((B, 2, 1 + blocks[0, 0].size), dtype=np.bool_)
        asked[:, 1, 1:].reshape(B, C, 2 * K + 1)[..., 1::2] = True
        asked = asked.reshape(B, -1)
        if (sizes != sizes[0]).any():
            full, asked = _compact(full, asked, sizes)
        return TokenBatch(full[:, :-1].copy(), full[:, 1:].copy(), asked[:, :-1].copy(), sizes)


def _permutations(noise: npt.NDArray[np.float64], n: Ints) -> Ints:
    """Along the last axis, a random permutation of 0..n-1 followed by the rest."""
    return np.argsort(np.where(np.arange(noise.shape[-1], dtype=np.int64) < n, noise, 2.0), axis=-1)


def _compact(full: Ints, asked: Bools, sizes: Ints) -> tuple[Ints, Bools]:
    """Cut the unused blocks and pairs out of every row, in order, and pad on the right."""
    B, (C, K) = len(sizes), sizes.max(axis=0)
    used = np.ones((B, 2, 1 + C * (2 * K + 1)), dtype=np.bool_)
    in_block = np.arange(2 * K + 1, dtype=np.int64) < 2 * sizes[:, 1, None] + 1
    of_block = np.arange(C, dtype=np.int64) < sizes[:, 0, None]
    used[:, :, 1:] = (of_block[:, :, None] & in_block[:, None, :]).reshape(B, 1, -1)
    used = used.reshape(B, -1)
    lengths = used.sum(axis=1)
    kept = np.arange(lengths.max(), dtype=np.int64) < lengths[:, None]
    tokens = np.full(kept.shape, PAD, dtype=np.int64)
    mask = np.zeros(kept.shape, dtype=np.bool_)
    tokens[kept], mask[kept] = full[used], asked[used]
    return tokens, mask


def _letter(alphabet: str, index: int) -> str:
    """a..z, then a1..z1, and so on."""
    round_, letter = divmod(index, len(alphabet))
    return alphabet[letter] + (str(round_) if round_ else "")
