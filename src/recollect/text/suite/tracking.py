"""Variable tracking: a value is given to a name, that name's to another, and so on; all that hold it are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.base import Plan, Prompt, Sizes, SuiteConfig, SuiteTask, Units, band, child, framed, laid
from recollect.text.suite.haystack import Haystack, check_haystack, filler
from recollect.text.suite.names import FOUR_DIGITS, Values, distinct_names, listed, take
from recollect.text.suite.vocabulary import THINGS


class VariableTracking(SuiteTask):
    """``Let lamp be 4821.`` ... ``Let coin be the same as lamp.`` ... ``The names that hold 4821 are`` (lamp and coin).

    The asked chain stands evenly over a band of the context, other chains anywhere in it; each in its own order.
    """

    @dataclass(frozen=True)
    class Config(SuiteConfig, kind="suite-variable-tracking"):
        """Raises ConfigError for a count below 1, or for a chain without a link."""

        haystack: Haystack = "noise"
        files: tuple[str, ...] = ()
        values: Values = FOUR_DIGITS
        n_chains: int = 2
        n_links: int = 4
        """Assignments of a chain after its first: it has one name more."""
        width: float = 0.5
        """Part of the context over which the asked chain is spread."""

        def __post_init__(self) -> None:
            for name in ("n_chains", "n_links"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
            if not 0.0 <= self.width <= 1.0:
                raise ConfigError(f"{self.kind}: width must lie in [0, 1], got {self.width:g}")
            check_haystack(self.kind, self.haystack, self.files)

        def build(self) -> VariableTracking:
            return VariableTracking(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        del sizes
        options = self.options
        names = distinct_names(rng, THINGS)
        n_names = options.n_links + 1
        chains = [take(names, n_names) for _ in range(options.n_chains)]
        values = take(options.values.distinct(rng), options.n_chains)
        inserts = list(zip(band(depth, n_names, options.width), _told(chains[0], values[0]), strict=True))
        for chain, value in zip(chains[1:], values[1:], strict=True):
            inserts += zip(np.sort(rng.random(n_names)).tolist(), _told(chain, value), strict=True)
        units = Units(filler(options.haystack, child(rng), options.files))
        answers = tuple(chains[0])
        question = f"The names that hold {values[0]} are"

        def compose(n: int) -> Prompt:
            body, spans = laid(units.first(n), inserts)
            text, spans = framed("Keep in mind which name holds which value.", body, spans[:n_names], question)
            return Prompt(
                text,
                answers,
                f" {listed(answers)}.",
                depth=depth,
                spans=spans,
                chance=n_names / max(len(THINGS), n_names),
                guesser=1 / options.n_chains if options.n_chains > 1 else None,
            )

        return Plan(compose)


def _told(chain: list[str], value: str) -> list[str]:
    """A chain's assignments in order."""
    links = pairwise(chain)
    return [f"Let {chain[0]} be {value}.", *(f"Let {name} be the same as {before}." for before, name in links)]
