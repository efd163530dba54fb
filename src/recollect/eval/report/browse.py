"""Episodes to step through, model by model: the first of the test, and those that each dreamed best and worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recollect.eval.report.data import FaceOff, Row
from recollect.eval.report.rows import look
from recollect.eval.report.strips import Stored, at, load_stored, small_uri, strip_image
from recollect.eval.report.text import significant

KINDS = {"strip": "first", "best": "best", "worst": "worst"}
"""Kinds of stored episodes, and what they are called here."""

EACH = 2
"""Episodes of each kind."""

MOST_FRAMES = 10


@dataclass(frozen=True)
class Episode:
    """One episode as one model dreamed it; pictures are addresses of strips."""

    label: str
    said: str
    truth: str
    imagined: str


@dataclass(frozen=True)
class Browser:
    """The episodes of one backbone; ``colour`` is its index in the palette, ``key`` unique on the page."""

    key: str
    row: str
    colour: int
    episodes: tuple[Episode, ...]


def browsers(face: FaceOff, group: str) -> list[Browser]:
    """One for every backbone of a group whose first finished seed stored its best and worst episodes.

    Raises RunError naming an ``arrays.npz`` that is damaged.
    """
    found: list[Browser] = []
    for i, row in enumerate(face.ranked(group)):
        stored = {kind: load_stored(row.finished[0], kind) for kind in KINDS}
        if stored["best"] is None and stored["worst"] is None:
            continue
        episodes = tuple(
            _episode(f"{name} {j + 1}", row, episodes, j)
            for kind, name in KINDS.items()
            if (episodes := stored[kind]) is not None
            for j in range(min(EACH, len(episodes.truth)))
        )
        found.append(Browser(f"{group}-{i}", row.name, look(face, row.name).colour, episodes))
    return found


def most_episodes(found: Sequence[Browser]) -> int:
    """The largest number of episodes of a browser: as many rules the page needs to show one of them."""
    return max((len(browser.episodes) for browser in found), default=0)


def _episode(label: str, row: Row, stored: Stored, j: int) -> Episode:
    count = len(stored.steps)
    keep = [round(k * (count - 1) / max(min(MOST_FRAMES, count) - 1, 1)) for k in range(min(MOST_FRAMES, count))]
    facts: list[str] = []
    if (number := at(stored.number, j)) is not None:
        facts.append(f"test episode {number:.0f}")
    facts.append(f"frames {stored.steps[keep[0]]} to {stored.steps[keep[-1]]}")
    if (error := at(stored.error, j)) is not None:
        facts.append(f"squared error {significant(error)} per frame")
    true, imagined = at(stored.reward_true, j), at(stored.reward_imagined, j)
    # The model predicts a reward in every world; only where some episode has one is there anything to predict.
    if true is not None and imagined is not None and stored.reward_true is not None and stored.reward_true.any():
        facts.append(f"reward {true:g}, predicted {imagined:.2f}")
    return Episode(
        label,
        f"{row.name}, {', '.join(facts)}",
        small_uri(strip_image(stored.truth[j, keep])),
        small_uri(strip_image(stored.imagined[j, keep])),
    )
