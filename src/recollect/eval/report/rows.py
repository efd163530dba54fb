"""How rows are told apart in figures: colour, marker and line, and panels where there are too many for one.

Where no recall group has more than ten backbones each has a colour of its own; from the eleventh on colours come again
with another line. In larger recall groups a name is read as its mixer and what was added to it (``mamba2+window``,
``mamba-2x``): colour says what was added, marker and line say which mixer, and figures of bars and curves become one
panel per mixer. The rows of language groups are one model with this or that beside it: their names are never read so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from recollect.eval.report.data import FaceOff, Row

N_COLOURS = 10
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS: dict[str, str] = dict(zip(MARKERS, "●■▲◆▼✚✖★", strict=True))  # the same shapes as text
LINES = ("-", (0, (6, 2)), (0, (4, 1.5, 1, 1.5)), (0, (2.5, 1.5)))
OTHERS = "other mixers"
PLAIN = "nothing"

MIN_PANEL = 3
"""A mixer with fewer rows than this shares a panel with the other small ones."""

ADDITIONS = {
    **{PLAIN: 9, "2x": 8, "window": 0, "sink": 5, "dilated": 2, "window+dilated": 4},
    **{"lsh": 3, "ks": 6, "hax": 1, "full": 7, "attention": 7},
}
"""Colour of what may be added to a mixer; anything else takes the next colour that is free."""


class Look(NamedTuple):
    """Colour by its index in the palette, and matplotlib's marker and line style."""

    colour: int
    marker: str
    line: str | tuple[float, tuple[float, ...]]


class Panel(NamedTuple):
    """Rows that share one set of axes; no title where there is only one panel."""

    title: str
    rows: tuple[Row, ...]

    def called(self, row: Row) -> str:
        """The row's name, without the mixer where the title says it."""
        same = self.title not in ("", OTHERS)
        return row.name.removeprefix(self.title).removeprefix("-") or "plain" if same else row.name


def mixer_of(name: str) -> str:
    """mamba2+window -> mamba2, mamba-2x -> mamba."""
    return name.split("+", maxsplit=1)[0].removesuffix("-2x")


def added_to(name: str) -> str:
    """mamba2+window -> window, mamba-2x -> 2x, mamba -> ``PLAIN``."""
    head, _, added = name.partition("+")
    return added or ("2x" if head.endswith("-2x") else PLAIN)


def crowded(face: FaceOff) -> bool:
    """Whether a recall group has more backbones than there are colours."""
    return max((len(face.groups[group]) for group in face.groups_of("recall")), default=0) > N_COLOURS


def look(face: FaceOff, name: str) -> Look:
    """How one backbone is drawn, in every figure."""
    i = face.row_names.index(name)
    if not crowded(face) or name not in _compound(face):
        return Look(i % N_COLOURS, MARKERS[i % len(MARKERS)], LINES[i // N_COLOURS % len(LINES)])
    mixer = mixers(face).index(mixer_of(name))
    return Look(_colours(face)[added_to(name)], MARKERS[mixer % len(MARKERS)], LINES[mixer % len(LINES)])


def mixers(face: FaceOff) -> list[str]:
    """Every mixer once, in the order of the rows."""
    return list(dict.fromkeys(mixer_of(name) for name in _compound(face)))


def panels(face: FaceOff, rows: Sequence[Row]) -> list[Panel]:
    """``rows`` in their order, all together, or by mixer where there are too many."""
    if not crowded(face) or any(row.family == "language" for row in rows):
        return [Panel("", tuple(rows))]
    by_mixer = {mixer: tuple(row for row in rows if mixer_of(row.name) == mixer) for mixer in mixers(face)}
    large = [Panel(mixer, found) for mixer, found in by_mixer.items() if len(found) >= MIN_PANEL]
    others = tuple(row for row in rows if len(by_mixer[mixer_of(row.name)]) < MIN_PANEL)
    if others:
        large.append(Panel(OTHERS, others))
    return large if len(large) > 1 else [Panel("", tuple(rows))]


def legend(face: FaceOff, group: str) -> list[tuple[str, int | None]]:
    """What stands above a group's figures: labels with a colour, or with a glyph of their own (None)."""
    names = [row.name for row in face.groups[group]]
    if not crowded(face) or face.family(group) == "language":
        return [(name, look(face, name).colour) for name in names]
    present = {added_to(name) for name in names}
    words = {PLAIN: "mixer alone", "2x": "twice as wide"}
    found = [(text, i) for text, i in _colours(face).items() if text in present]
    added = [(words.get(text, f"+ {text}"), i) for text, i in found]
    shapes = {mixer_of(name): GLYPHS[look(face, name).marker] for name in names}
    return [*added, *((f"{glyph} {mixer}", None) for mixer, glyph in shapes.items())]


def _compound(face: FaceOff) -> list[str]:
    """The names that may be read as a mixer and what was added to it, in the order of the rows."""
    others = (group for group in face.groups if face.family(group) != "language")
    return list(dict.fromkeys(row.name for group in others for row in face.groups[group]))


def _colours(face: FaceOff) -> dict[str, int]:
    found = list(dict.fromkeys(added_to(name) for name in _compound(face)))
    known = {text: colour for text, colour in ADDITIONS.items() if text in found}
    free = [i for i in range(N_COLOURS) if i not in known.values()] or list(range(N_COLOURS))
    new = [text for text in found if text not in known]
    return known | {text: free[i % len(free)] for i, text in enumerate(new)}
