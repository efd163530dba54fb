"""The published samples of joint recall themselves, replayed from their seed (arXiv 2507.00449).

They were drawn from one legacy numpy stream, training first, then validation, then test: for every sample index, for
5..16 contexts, for 5..16 keys, one sample. A sample draws its table, a permutation of the contexts, a permutation of
the keys for each context, and the permutations again for the inquiry. The published script also drops repeated
sequences; the smallest table has 16^25 fillings, so that any sample repeats another has a probability below 1e-20.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError, nearest
from recollect.tasks.base import Split
from recollect.tasks.batch import PAD
from recollect.tasks.vocabulary import BOS, FIRST_VALUE, SEP

LENGTH = 1058
SAMPLES: dict[Split, int] = {"train": 10_000, "valid": 100, "test": 100}
"""Samples of every size in each part, in the order they are drawn."""

_SIZES = range(5, 17)
_N_VALUES, _FIRST_KEY, _FIRST_CONTEXT = 16, 26, 42

Sample: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]


def published_stream(seed: int = 1, *, splits: Collection[Split] = ("train", "valid", "test")) -> Iterator[Sample]:
    """Every published sample in order, 1,440,000 + 14,400 + 14,400: inputs (1058,) int32 and mask (1058,) int8.

    Inputs are padded with 3 on the right; the mask is 1 at the keys of the inquiry, where the label is the next token.
    The mask is shared by all samples of a size and cannot be written to. ``splits`` leaves parts out: what comes before
    the parts that are kept has to be drawn all the same, which takes most of the time; what comes after is not drawn.
    Constant memory. Raises ConfigError for an unknown part.
    """
    for split in splits:
        if split not in SAMPLES:
            raise ConfigError(f"published_stream: unknown split '{split}'{nearest(split, SAMPLES)}")
    return _replay(seed, splits)


def _replay(seed: int, splits: Collection[Split]) -> Iterator[Sample]:
    bits = np.random.MT19937()
    rng = np.random.RandomState(bits)
    rng.seed(seed)
    forms = [_Form.of(n_contexts, n_keys) for n_contexts in _SIZES for n_keys in _SIZES]
    wanted = set(splits)
    for split, n_samples in SAMPLES.items():
        if not wanted:
            return
        kept = split in wanted
        wanted.discard(split)
        for _ in range(n_samples):
            for form in forms:
                # ``randint`` below a power of two takes the low bits of one 32-bit word each.
                table = bits.random_raw(form.n_cells) % _N_VALUES
                contexts, keys = form.contexts.copy(), form.keys.copy()
                # ``permutation(n)`` is a shuffle of 0..n-1.
                for part in (0, 1):
                    rng.shuffle(contexts[part])
                    for row in keys[part]:
                        rng.shuffle(row)
                if kept:
                    yield form.inputs(table, contexts, keys), form.mask


class _Form(NamedTuple):
    """What all samples of one size have in common. The first axis is told, asked."""

    n_cells: int
    contexts: npt.NDArray[np.int64]
    """(2, n_contexts) indices in order."""
    keys: npt.NDArray[np.int64]
    """(2, n_contexts, n_keys) indices in order."""
    mask: npt.NDArray[np.int8]

    @classmethod
    def of(cls, n_contexts: int, n_keys: int) -> _Form:
        """The form of tables of this size."""
        half = 1 + n_contexts * (2 * n_keys + 1)
        mask = np.zeros(LENGTH, dtype=np.int8)
        mask[half + 1 : 2 * half].reshape(n_contexts, -1)[:, 1::2] = 1
        mask.setflags(write=False)
        contexts = np.tile(np.arange(n_contexts, dtype=np.int64), (2, 1))
        keys = np.tile(np.arange(n_keys, dtype=np.int64), (2, n_contexts, 1))
        return cls(n_contexts * n_keys, contexts, keys, mask)

    def inputs(
        self, table: npt.NDArray[np.uint64], contexts: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int32]:
        """The tokens of a sample, padded."""
        n_keys = keys.shape[-1]
        blocks = np.empty((*contexts.shape, 2 * n_keys + 1), dtype=np.int32)
        blocks[..., 0] = contexts + _FIRST_CONTEXT
        blocks[..., 1::2] = keys + _FIRST_KEY
        blocks[..., 2::2] = table[contexts[..., None] * n_keys + keys] + np.uint64(FIRST_VALUE)
        told, asked = blocks.reshape(2, -1)
        half = 1 + told.size
        inputs = np.full(LENGTH, PAD, dtype=np.int32)
        inputs[0], inputs[half] = BOS, SEP
        inputs[1:half], inputs[half + 1 : 2 * half] = told, asked
        return inputs
