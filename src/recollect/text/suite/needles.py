"""Needles in a haystack: secrets told somewhere in a long text and asked for at its end.

One secret; one among others with other names (``n_keys``); several under one name (``n_values``); several names asked
for at once (``n_queries``). With ``haystack="needles"`` there is nothing but needles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.base import Plan, Prompt, Sizes, SuiteConfig, SuiteTask, Units, band, child, framed, laid
from recollect.text.suite.haystack import Haystack, check_haystack, filler
from recollect.text.suite.names import FOUR_DIGITS, Keys, Values, distinct_keys, listed, take


class Needles(SuiteTask):
    """``The secret number for lamp is 4821.`` somewhere; last, ``The secret number for lamp is``.

    Several asked secrets stand in their order, evenly over a band of the context; other names anywhere in it.
    """

    @dataclass(frozen=True)
    class Config(SuiteConfig, kind="suite-needles"):
        """Raises ConfigError for a count below 1, more queries than keys, or several values of several queries."""

        haystack: Haystack | Literal["needles"] = "noise"
        files: tuple[str, ...] = ()
        """The reader's own texts, for ``haystack="files"``."""
        values: Values = FOUR_DIGITS
        keys: Keys = "word"
        n_keys: int = 1
        """Names with a secret, the asked ones among them; the needles of a haystack of needles come on top."""
        n_values: int = 1
        """Secrets of the asked name, all of which are to be told."""
        n_queries: int = 1
        """Names asked for, in the order of the question."""
        n_restated: int = 0
        """Other names asked for and answered before the question: a solved document teaches more with them."""
        width: float = 0.25
        """Part of the context over which several asked secrets are spread."""

        def __post_init__(self) -> None:
            for name in ("n_keys", "n_values", "n_queries"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{self.kind}: {name} must be at least 1, got {getattr(self, name)}")
            if self.n_queries > self.n_keys:
                raise ConfigError(f"{self.kind}: n_queries {self.n_queries} is more than n_keys {self.n_keys}")
            if self.n_values > 1 and self.n_queries > 1:
                raise ConfigError(f"{self.kind}: several n_values of several n_queries cannot be asked; set one to 1")
            if not 0 <= self.n_restated <= self.n_keys - self.n_queries:
                raise ConfigError(
                    f"{self.kind}: n_restated must lie between 0 and the {self.n_keys - self.n_queries} keys that are "
                    f"not asked, got {self.n_restated}"
                )
            if not 0.0 <= self.width <= 1.0:
                raise ConfigError(f"{self.kind}: width must lie in [0, 1], got {self.width:g}")
            if self.haystack != "needles":
                check_haystack(self.kind, self.haystack, self.files)

        def build(self) -> Needles:
            return Needles(self)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = config

    def plan(self, rng: np.random.Generator, depth: float, sizes: Sizes) -> Plan:
        del sizes
        options = self.options
        secrets = options.values.distinct(child(rng))
        # Where there are many names, single words run out: the asked name must not be told by being one.
        form: Keys = "pair" if options.haystack == "needles" and options.keys == "word" else options.keys
        keys = distinct_keys(child(rng), form)
        asked = take(keys, options.n_queries)
        others = take(keys, options.n_keys - options.n_queries)
        names = asked * options.n_values if options.n_queries == 1 else asked
        answers = take(secrets, len(names))
        told = [self.told(name, secret) for name, secret in zip(names, answers, strict=True)]
        other_told = [self.told(name, secret) for name, secret in zip(others, take(secrets, len(others)), strict=True)]
        inserts = list(zip(band(depth, len(told), options.width), told, strict=True))
        inserts += zip(rng.random(len(other_told)).tolist(), other_told, strict=True)
        stream = self._more(keys, secrets) if options.haystack == "needles" else None
        units = Units(stream or filler(self._filler(), child(rng), options.files))
        restated = other_told[: options.n_restated]
        question = " ".join([*restated, self.question(asked)])
        header = f"Keep the secret {options.values.form}s of this text in mind."

        def compose(n: int) -> Prompt:
            body, spans = laid(units.first(n), inserts)
            text, spans = framed(header, body, spans[: len(told)], question)
            n_told = len(inserts) + (n if stream else 0)
            ordered = options.n_queries > 1
            return Prompt(
                text,
                tuple(answers),
                f" {listed(answers)}.",
                ordered=ordered,
                depth=depth,
                spans=spans,
                chance=(1 if ordered else len(answers)) / options.values.count,
                guesser=self._guesser(n_told, len(answers), ordered=ordered),
            )

        return Plan(compose)

    def told(self, name: str, secret: str) -> str:
        """The needle."""
        return f"The secret {self.options.values.form} for {name} is {secret}."

    def question(self, names: list[str]) -> str:
        """What is asked, up to where the answer begins."""
        form, n_values = self.options.values.form, self.options.n_values
        if n_values > 1:
            return f"The {n_values} secret {form}s for {names[0]} are"
        return (
            f"The secret {form}s for {listed(names)} are" if len(names) > 1 else f"The secret {form} for {names[0]} is"
        )

    def _filler(self) -> Haystack:
        assert self.options.haystack != "needles"
        return self.options.haystack

    def _more(self, keys: Iterator[str], secrets: Iterator[str]) -> Iterator[str]:
        return (self.told(name, secret) for name, secret in zip(keys, secrets, strict=False))

    def _guesser(self, n_told: int, n_answers: int, *, ordered: bool) -> float | None:
        """Other secrets of the text are as good to it: it writes distinct ones drawn from all of them."""
        if ordered:
            return 1 / n_told
        return None if n_told == n_answers else n_answers / n_told
