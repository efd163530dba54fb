"""The picture of what each query attends to, from the arrays that ``eval.attended`` stored with a run."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recollect.core.errors import RunError
from recollect.eval.report.data import FaceOff, Floats, Row
from recollect.eval.report.figures import Palette, name_bars
from recollect.eval.report.rows import ADDITIONS, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 8
"""Steps of the weight that are told apart; a weight below half a step is left blank."""

ALIASES = {"key-selection": "ks"}

CARRIED = (0, 1, 2)
"""Places where a value may be found, in positions after its own: a mixer or its convolution carries it on."""


@dataclass(frozen=True)
class AttendedLayer:
    """One layer of one run's drawn sample; columns are the positions before the first query."""

    row: str
    number: int
    patterns: tuple[str, ...]
    carried: int
    """How many positions after its value the needed place is."""
    queries: list[str]
    told: list[str]
    needed: npt.NDArray[np.int64]
    """(Q,) column of the needed value, -1 where there is none."""
    weights: Floats
    """(Q, S)"""
    kinds: npt.NDArray[np.uint8]
    """(Q, S) bit p: pattern p admits the key."""

    @property
    def weight(self) -> float | None:
        """Mean attention weight of the needed place; None where nothing is needed."""
        return None if not (at := self._places()) else float(self.weights[at].mean())

    def admitted(self, pattern: int | None = None) -> float:
        """Share of queries for which some pattern, or one of them, admits the needed place."""
        bits = 0xFF if pattern is None else 1 << pattern
        at = self._places()
        return float((self.kinds[at] & bits > 0).mean()) if at else 0.0

    def _places(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        asked = np.flatnonzero((self.needed >= 0) & (self.needed + self.carried < self.weights.shape[1]))
        return (asked, self.needed[asked] + self.carried) if len(asked) else None


def attending_layers(row: Row) -> list[dict[str, Any]]:
    """The attending layers of a row as its first finished seed reports them: name, patterns, shares."""
    return next(iter(row.detail("attended")), {}).get("layers", [])


def load_attended(row: Row) -> AttendedLayer | None:
    """The layer of the row's first finished seed that puts most weight where the needed value is or was carried to.

    None where nothing is stored. Raises RunError naming an ``arrays.npz`` that is damaged.
    """
    layers = attending_layers(row)
    if not layers:
        return None
    path = next(run.folder for run in row.finished if run.results.get("details", {}).get("attended")) / "arrays.npz"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            names = [name for name in stored.files if name.startswith("attended_")]
            found = {name.removeprefix("attended_"): stored[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"'{path}' is damaged: {type(error).__name__}") from None
    if not found:
        return None
    return max(
        (_checked(found, row, number, carried, path) for number in range(len(layers)) for carried in CARRIED),
        key=lambda seen: seen.weight or 0.0,
    )


def draw_attended(ax: Axes, palette: Palette, seen: AttendedLayer) -> None:
    """Queries down, told tokens across: shade = weight, outline = which pattern admits the key, dot = needed value."""
    from matplotlib.patches import PathPatch

    n_queries, n_told = seen.weights.shape
    # One path for each shade and each pattern: a path for every cell would be megabytes.
    level = np.clip(np.round(seen.weights * SHADES), 0, SHADES).astype(int)
    for step in range(1, SHADES + 1):
        found = np.argwhere(level == step)
        if len(found):
            path = _boxes([(q, s, s + 1) for q, s in found], 0.0)
            ax.add_patch(PathPatch(path, facecolor=palette.heat, alpha=step / SHADES, linewidth=0, zorder=2))
    for p, name in enumerate(seen.patterns):
        admitted = seen.kinds & (1 << p) > 0
        runs = [(q, a, b) for q in range(n_queries) for a, b in _runs(admitted[q])]
        if runs:
            path = _boxes(runs, 0.08 + 0.1 * p)
            colour = palette.rows[pattern_colour(name)]
            ax.add_patch(PathPatch(path, fill=False, edgecolor=colour, linewidth=0.9, zorder=3, label=name))
    dotted = np.flatnonzero(seen.needed >= 0)
    ax.plot(seen.needed[dotted], dotted, "o", ms=2.6, color=palette.ink, linestyle="none", zorder=4)
    ax.set(xlim=(-0.6, n_told - 0.4), ylim=(n_queries - 0.4, -0.6))
    ax.set_xticks(range(n_told), seen.told)
    ax.set_yticks(range(n_queries), seen.queries)
    ax.tick_params(length=0, labelsize=7.5, pad=1)
    ax.set(xlabel="told", ylabel="asked")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def draw_needed_bars(ax: Axes, palette: Palette, face: FaceOff, panel: Panel) -> None:
    """Per row: how often the needed place is admitted (pale), and the weight on it (solid)."""
    drawn = [(row, seen) for row in panel.rows if (seen := load_attended(row)) and seen.weight is not None]
    for y, (row, seen) in enumerate(reversed(drawn)):
        for found, rise, alpha in ((seen.admitted(), 0.2, 0.4), (seen.weight or 0.0, -0.2, 1.0)):
            value = 100 * found
            ax.barh(y + rise, value, 0.36, color=palette.row(face, row.name), alpha=alpha, linewidth=0)
            ax.text(value + 1.5, y + rise, f"{value:.0f}", va="center", fontsize=8.5)
    name_bars(ax, [panel.called(row) for row, _ in reversed(drawn)], palette)
    ax.set_xlim(0, 112)
    ax.set_xticks(range(0, 101, 25))
    ax.set_xlabel("of the asked positions, %")


def pattern_colour(name: str) -> int:
    """The colour of a pattern's outline: the one that rows which add it alone have where there are many."""
    return ADDITIONS.get(ALIASES.get(name, name), 8)


def _boxes(boxes: list[tuple[int, int, int]], inset: float) -> Any:
    """One path of rectangles (row, first column, column after the last)."""
    from matplotlib.path import Path as Outline

    corners: list[tuple[float, float]] = []
    for q, a, b in boxes:
        left, right, top, bottom = a - 0.5 + inset, b - 0.5 - inset, q - 0.5 + inset, q + 0.5 - inset
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    return Outline(np.array(corners), codes * len(boxes))


def _runs(admitted: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and after-last column of every run of neighbours."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], admitted.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _checked(found: dict[str, npt.NDArray[Any]], row: Row, number: int, carried: int, path: Path) -> AttendedLayer:
    layer = attending_layers(row)[number]
    try:
        labels, queries, needed = found["labels"], found["queries"], found["needed"]
        weights, kinds = found[f"weights_{number}"].astype(np.float64), found[f"kinds_{number}"]
        told = slice(0, int(queries.min()))
        return AttendedLayer(
            row.name,
            number,
            tuple(layer["patterns"]),
            carried,
            [str(labels[q]) for q in queries],
            [str(label) for label in labels[told]],
            np.where(needed < told.stop, needed, -1),
            weights[:, told],
            kinds[:, told],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise RunError(f"'{path}' is damaged: what it holds of attention does not fit together ({error})") from None
