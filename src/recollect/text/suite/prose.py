"""Prose made by a grammar, about people and places whose facts stay as they were first told.

Every document has a world of its own. Newcomers keep arriving in it, ever more slowly, and those once told of come
back, each as likely as any other, so after gaps as long as the document. Each has some facts, drawn when first told and
told again in other words later: a reader who remembers the text so far foretells more and more of it, so perplexity by
position can fall as far as memory reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from recollect.core.errors import ConfigError
from recollect.text.suite.vocabulary import (
    ADJECTIVES,
    ANIMALS,
    FOODS,
    JOBS,
    PEOPLE,
    PLACES,
    SURNAMES,
    THINGS,
    TRADES,
)

STRENGTH, DISCOUNT = 2.0, 0.3
"""Newcomers arrive as new tables do in a Pitman-Yor process (Pitman and Yor 1997) with these."""

PARAGRAPH = (4, 9)
"""Sentences of a paragraph, at least and fewer than."""

Draw = Callable[[np.random.Generator], str]


class Fact(NamedTuple):
    """Something that is told of somebody or some place: how it is drawn, and ways to say it of ``{who}``."""

    draw: Draw
    ways: tuple[str, ...]


def _one_of(words: Sequence[str]) -> Draw:
    return lambda rng: words[int(rng.integers(len(words)))]


def _between(low: int, high: int) -> Draw:
    return lambda rng: str(rng.integers(low, high))


def _joined(*parts: Draw) -> Draw:
    return lambda rng: " ".join(part(rng) for part in parts)


def _a(draw: Draw) -> Draw:
    """With its indefinite article."""

    def drawn(rng: np.random.Generator) -> str:
        words = draw(rng)
        return f"{'an' if words[0] in 'aeiou' and not words.startswith('one') else 'a'} {words}"

    return drawn


PERSON: dict[str, Fact] = {
    "home": Fact(
        _one_of(PLACES),
        (
            "{who} lives in {it}.",
            "{who} has a house in {it}.",
            "{it} is where {who} lives.",
            "{who} went home to {it}.",
        ),
    ),
    "job": Fact(
        _a(_one_of(JOBS)),
        ("{who} is {it} by trade.", "{who} works as {it}.", "{who} has been {it} for years.", "{who} trained as {it}."),
    ),
    "age": Fact(
        _between(19, 90),
        ("{who} is {it} years old.", "At the age of {it}, {who} still works.", "{who} turned {it} this year."),
    ),
    "thing": Fact(
        _a(_joined(_one_of(ADJECTIVES), _one_of(THINGS))),
        ("{who} never leaves without {it}.", "{who} owns {it}.", "{who} came in, holding {it}.", "{who} lost {it}."),
    ),
    "animals": Fact(
        _joined(_between(2, 60), _one_of(ANIMALS)),
        ("{who} keeps {it} behind the house.", "{who} looks after {it}.", "{it} belong to {who}."),
    ),
    "food": Fact(
        _one_of(FOODS),
        ("{who} likes {it} best.", "{who} asked for {it} again.", "{who} could eat {it} every day."),
    ),
    "birthplace": Fact(
        _joined(_one_of(PLACES), lambda _: "in", _between(1820, 1990)),
        ("{who} was born in {it}.", "{who} first saw the light in {it}.", "The papers of {who} were made in {it}."),
    ),
    "sibling": Fact(
        _joined(_one_of(PEOPLE), _one_of(SURNAMES)),
        ("{who} writes to {it} every week.", "{who} grew up with {it}.", "{it} is a cousin of {who}."),
    ),
}

PLACE: dict[str, Fact] = {
    "trade": Fact(
        _one_of(TRADES),
        ("{who} is known for its {it}.", "Much {it} is seen in {who}.", "Traders come to {who} for {it}."),
    ),
    "people": Fact(
        _joined(_between(2, 990), lambda _: "thousand"),
        ("About {it} people live in {who}.", "{who} has {it} inhabitants."),
    ),
    "founded": Fact(
        _between(600, 1900),
        ("{who} was founded in {it}.", "The oldest wall of {who} is from {it}.", "In {it}, {who} was a village."),
    ),
    "mayor": Fact(
        _joined(_one_of(PEOPLE), _one_of(SURNAMES)),
        ("{it} is the mayor of {who}.", "{who} is governed by {it}.", "The people of {who} chose {it}."),
    ),
    "market": Fact(
        _one_of(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")),
        ("The market of {who} is held on {it}.", "On {it}, the streets of {who} are full."),
    ),
}

TIMES = (
    *("One morning", "In the evening", "Last winter", "After the harvest", "Before the storm", "On a quiet day"),
    *("Late that night", "In early spring", "Some weeks later", "When the bell rang", "At noon", "Without a word"),
)
DEEDS = (
    *("{a} met {b} and spoke of {c}", "{a} sold {c} to {b}", "{a} showed {c} to {b}", "{a} and {b} mended {c}"),
    *("{a} asked {b} about {c}", "{a} borrowed {c} from {b}", "{a} hid {c} from {b}", "{a} sent {c} to {b}"),
)


@dataclass
class _Subject:
    """Somebody or some place, with the facts told so far."""

    name: str
    facts: dict[str, Fact]
    told: dict[str, str] = field(default_factory=dict[str, str])

    def sentence(self, rng: np.random.Generator) -> str:
        """One fact, drawn when it is new."""
        key = list(self.facts)[int(rng.integers(len(self.facts)))]
        fact = self.facts[key]
        value = self.told.setdefault(key, fact.draw(rng))
        return fact.ways[int(rng.integers(len(fact.ways)))].format(who=self.name, it=value)


class _World:
    """Those spoken of so far."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.subjects: list[_Subject] = []
        self.n_told = 0
        self.names: set[str] = set()

    def subject(self) -> _Subject:
        """A newcomer with probability (strength + discount K) / (strength + n) after n facts of K subjects, else one
        of these.
        """
        known = len(self.subjects)
        if self.rng.random() * (STRENGTH + self.n_told) < STRENGTH + DISCOUNT * known:
            self.subjects.append(self.newcomer())
        else:
            known = int(self.rng.integers(known))
        self.n_told += 1
        return self.subjects[known]

    def newcomer(self) -> _Subject:
        """A place in one case of four, as long as there are some left; else somebody of a name not used before."""
        free = [place for place in PLACES if place not in self.names] if self.rng.random() < 0.25 else []
        if free:
            name, facts = free[int(self.rng.integers(len(free)))], PLACE
        else:
            name, facts = self.person(), PERSON
        self.names.add(name)
        return _Subject(name, facts)

    def person(self) -> str:
        """A full name; a second surname sets apart whoever would share it."""
        name = _one_of(PEOPLE)(self.rng)
        while True:
            name = f"{name} {_one_of(SURNAMES)(self.rng)}"
            if name not in self.names:
                return name

    def sentence(self) -> str:
        """A fact, or in one case of five a meeting of two who are known."""
        people = [subject for subject in self.subjects if subject.facts is PERSON]
        if len(people) < 2 or self.rng.random() >= 0.2:
            return _capital(self.subject().sentence(self.rng))
        i, j = self.rng.choice(len(people), 2, replace=False).tolist()
        owner = people[i]
        thing = owner.told.setdefault("thing", PERSON["thing"].draw(self.rng))
        deed = _one_of(DEEDS)(self.rng).format(a=owner.name, b=people[j].name, c=thing)
        return f"{_one_of(TIMES)(self.rng)}, {deed}."


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """The sentences of one document, without end. A sentence costs O(subjects so far) at most."""
    world = _World(rng)
    while True:
        yield world.sentence()


def write_prose(rng: np.random.Generator, n_chars: int) -> str:
    """A document of at most ``n_chars`` characters, less than a sentence short of it, in paragraphs.

    Raises ConfigError when not even the first sentence fits.
    """
    lines: list[str] = []
    paragraph: list[str] = []
    left, size = int(rng.integers(*PARAGRAPH)), -1
    for sentence in sentences(rng):
        size += 1 + len(sentence)
        if size > n_chars:
            break
        paragraph.append(sentence)
        left -= 1
        if left == 0:
            lines.append(" ".join(paragraph))
            paragraph, left = [], int(rng.integers(*PARAGRAPH))
    if paragraph:
        lines.append(" ".join(paragraph))
    if not lines:
        raise ConfigError(f"prose of {n_chars} characters would not hold its first sentence; ask for more")
    return "\n".join(lines)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
