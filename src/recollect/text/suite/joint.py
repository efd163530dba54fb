"""Joint recall in words: every thing has another code in every place, and one code is asked for at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from recollect.core.errors import ConfigError
from recollect.text.suite.base import Plan, Prompt, Sizes, SuiteConfig, SuiteTask, Units, child, framed, laid
from recollect.text.suite.haystack import Haystack, check_haystack, filler
from recollect.text.suite.names import FOUR_DIGITS, Values, distinct_names, take
from recollect.text.suite.vocabulary import PLACES, THINGS

Floats = npt.NDArray[np.float64]
Layout = Literal["block", "spread", "dense"]

TIMES = 3
"""How often a cell of a dense table is asked at most, before the question: the rest of the context is the table."""


@dataclass(frozen=True)
class Cell:
    """One code of the table."""

    place: str
    thing: str
    code: str

    @property
    def question(self) -> str:
        """What is asked, and the beginning of what is told."""
        return f"In {self.place}, the code for {self.thing} is"

    @property
    def told(self) -> str:
        """The sentence that tells it."""
        return f"{self.question} {self.code}."


class JointRecallInWords(SuiteTask):
    """``In Paris, the code for apple is 4821. In Paris, ... In Rome, the code for apple is 1203.`` in shuffled blocks,
    one for each place; last, ``In Paris, the code for apple is``. Codes are independent and uniform.
    """

    @dataclass(frozen=True)
    class Config(SuiteConfig, kind="suite-joint-recall"):
        """The table is told in one ``block`` that stands at ``depth`` of the haystack; ``spread`` over all of it,
        sentence by sentence; or ``dense``: as large as the context and as square as may be, without a haystack. Of
        the latter two the cell nearest to ``depth`` is asked, of a block any.

        Raises ConfigError for a count below 1.
        """

        layout: Layout = "block"
        n_contexts: int = 4
        n_keys: int = 4
        values: Values = FOUR_DIGITS
        haystack: Haystack = "noise"
        files: tuple[str, ...] = ()
        n_restated: int = 0
        """Other cells asked for and answered before the question: a solved document teaches more with them. Of a
        ``dense`` table up to ``TIMES`` times each, of the others once."""

        def __post_init__(self) -> None:
            for name in ("n_contexts", "n_keys"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
            if self.layout not in ("block", "spread", "dense"):
                raise ConfigError(f"{self.kind}: layout must be 'block', 'spread' or 'dense', got '{self.layout}'")
            most = self.n_contexts * self.n_keys - 1
            if self.n_restated < 0 or (self.layout != "dense" and self.n_restated > most):
                raise ConfigError(
                    f"{self.kind}: n_restated must lie between 0 and the {most} cells that are not asked, "
                    f"got {self.n_restated}"
                )
            check_haystack(self.kind, self.haystack, self.files)

        def build(self) -> JointRecallInWords:
            return JointRecallInWords(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        options = self.options
        n_keys = options.n_keys if options.layout != "dense" else self._square(sizes)
        told = self._cells(child(rng), n_keys)
        order = child(rng).random(1 << 10)  # of whom is restated; larger tables begin it again
        if options.layout == "dense":
            return Plan(lambda n: self._prompt(told.first(n), [], depth, order), least=2)
        cells = told.first(options.n_contexts * n_keys)
        units = Units(filler(options.haystack, child(rng), options.files))
        return Plan(lambda n: self._prompt(cells, units.first(n), depth, order))

    def _cells(self, rng: np.random.Generator, n_keys: int) -> Cells:
        places = distinct_names(child(rng), PLACES)
        things = take(distinct_names(child(rng), THINGS), n_keys)

        def stream() -> Iterator[Cell]:
            for place in places:
                for i in rng.permutation(n_keys).tolist():
                    yield Cell(place, things[i], self.options.values.draw(rng))

        return Cells(stream())

    def _square(self, sizes: Sizes) -> int:
        """Keys of a table of as many contexts that fills the budget."""
        values = self.options.values.draw(np.random.default_rng(0))
        sentence = sizes.count(" ".join([Cell("Vienna", "button", values).told] * 4)) / 4
        return max(2, ceil(sqrt(max(sizes.budget, 1) / sentence)))

    def _prompt(self, cells: list[Cell], units: list[str], depth: float, order: Floats) -> Prompt:
        options, n = self.options, len(cells)
        if options.layout == "block":
            asked = int(order[0] * n)
            body, (table,) = laid(units, [(depth, " ".join(cell.told for cell in cells))])
            start = table[0] + sum(len(cell.told) + 1 for cell in cells[:asked])
        else:
            # Sentence i of n stands at (i + 1/2) / n of the context.
            asked = min(int(depth * n), n - 1)
            body, spans = laid(units, [((i + 0.5) / n, cell.told) for i, cell in enumerate(cells)])
            start = spans[asked][0]
        cell = cells[asked]
        rounds = np.resize(order, (TIMES if options.layout == "dense" else 1, n)).argsort(1, kind="stable")
        others = [i for i in rounds.flatten().tolist() if i != asked]
        restated = [cells[i].told for i in others[: options.n_restated]]
        question = " ".join([*restated, cell.question])
        text, spans = framed("", body, [(start, start + len(cell.told))], question)
        same = [each.code == cell.code for each in cells if each.thing == cell.thing]
        return Prompt(
            text,
            (cell.code,),
            f" {cell.code}.",
            depth=depth,
            spans=spans,
            chance=1 / options.values.count,
            guesser=sum(same) / len(same) if len(same) > 1 else None,
        )


class Cells:
    """The first cells of an endless table, kept so that every length shows the same ones."""

    def __init__(self, stream: Iterator[Cell]) -> None:
        self._stream = stream
        self._drawn: list[Cell] = []

    def first(self, n: int) -> list[Cell]:
        """The first n, block after block."""
        self._drawn += islice(self._stream, max(0, n - len(self._drawn)))
        return self._drawn[:n]
