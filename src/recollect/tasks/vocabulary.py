"""Token ids of nested recall: what each id means, and how a sample reads as text.

::

    0 . 1 bos . 2 eos . 3 pad . 4 sep . 5 blank . 6-9 . 10.. values, keys, contexts innermost first

``BOS``, ``PAD``, ``SEP`` and every value, key and context of the default sizes are the published ids; ``EOS`` and 6 to
9 are not used. ``BLANK`` stands where an answer is hidden.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

from recollect.tasks.batch import Bools, Ints

BOS, EOS, SEP, BLANK = 1, 2, 4, 5
FIRST_VALUE = 10


class Vocabulary:
    """Ids for ``n_values`` values and, along every axis (contexts outermost first, keys last), so many indices."""

    def __init__(self, n_values: int, limits: Sequence[int]) -> None:
        self.limits = tuple(limits)
        firsts: list[int] = []
        next_id = FIRST_VALUE + n_values
        for limit in reversed(self.limits):
            firsts.insert(0, next_id)
            next_id += limit
        self.first = tuple(firsts)
        """The id of index 0 along every axis."""
        self.size = next_id
        """One more than the largest id."""

    def on_axis(self, tokens: Ints, axis: int) -> Bools:
        """Where the tokens are indices along this axis."""
        return (tokens >= self.first[axis]) & (tokens < self.first[axis] + self.limits[axis])

    def render(self, tokens: Ints, answers: Ints | None = None) -> str:
        """One sample (L,) as text, ``A a 3 b 2 B b 4 a 1 | B a ? b ? A b ? a ?``; values count from 1.

        Contexts are capitals, with the number of their level before them where there are several, keys small letters.
        Letters go on as a1, b1 and so on after z. With ``answers``, those at the asked positions follow ``->``.
        """
        words: list[str] = []
        told: list[str] = []
        asking = False
        for position, token in enumerate(int(t) for t in tokens):
            if token == SEP:
                asking = True
                words.append("|")
            elif token >= self.first[-1]:
                words.append(self._index(token))
                if asking and token < self.first[-1] + self.limits[-1]:
                    words.append("?")
                    told += [] if answers is None else [str(int(answers[position]) - FIRST_VALUE + 1)]
            elif token >= FIRST_VALUE and not asking:
                words.append(str(token - FIRST_VALUE + 1))
        return " ".join(words) if answers is None else f"{' '.join(words)} -> {' '.join(told)}"

    def _index(self, token: int) -> str:
        axis = next(a for a, first in enumerate(self.first) if token >= first)
        n_levels = len(self.first) - 1
        if axis == n_levels:
            return letter(string.ascii_lowercase, token - self.first[axis])
        return (str(axis + 1) if n_levels > 1 else "") + letter(string.ascii_uppercase, token - self.first[axis])


def letter(alphabet: str, index: int) -> str:
    """a..z, then a1..z1, and so on."""
    round_, position = divmod(index, len(alphabet))
    return alphabet[position] + (str(round_) if round_ else "")
