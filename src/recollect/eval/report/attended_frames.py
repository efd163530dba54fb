"""Maps of which earlier frames each dreamed-of frame attends to, from what ``eval.attended_frames`` stored."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from recollect.core.errors import RunError
from recollect.eval.report.attended import attending_layers, pattern_colour
from recollect.eval.report.data import Floats, Row
from recollect.eval.report.figures import ROW_COLOURS, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FrameMap:
    """One pattern of one layer of one backbone: weights (Q, S), and the positions at which rows and columns begin."""

    row: str
    layer: int
    pattern: str
    weights: Floats
    queries: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    context: int

    @property
    def title(self) -> str:
        """What is shown, in words."""
        return f"{self.row}, attention {self.layer + 1}: {self.pattern}"


def frame_maps(row: Row) -> list[FrameMap]:
    """The maps of a row's first finished seed that has any, layer by layer.

    Raises RunError naming an ``arrays.npz`` that is damaged.
    """
    run = next((run for run in row.finished if run.results["details"].get("attended")), None)
    if run is None or not (run.folder / "arrays.npz").is_file():
        return []
    path = run.folder / "arrays.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files if name.startswith("frames_")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"'{path}' is damaged: {type(error).__name__}") from None
    context = int(run.results["details"]["attended"].get("context", 0))
    maps: list[FrameMap] = []
    for i, layer in enumerate(attending_layers(row) if found else ()):
        weights, queries, keys = (found.get(f"frames_{key}") for key in (f"weights_{i}", "queries", "keys"))
        if weights is None or queries is None or keys is None:
            raise RunError(f"'{path}' is damaged: it holds no map of attention {i + 1}")
        if weights.shape != (len(layer["patterns"]), len(queries) - 1, len(keys) - 1):
            raise RunError(f"'{path}' is damaged: its maps of attention are not of the size that it says")
        for pattern, weight in zip(layer["patterns"], weights.astype(np.float64), strict=True):
            maps.append(FrameMap(row.name, i, str(pattern), weight, queries, keys, context))
    return maps


def draw_frames(ax: Axes, palette: Palette, seen: FrameMap) -> None:
    """Frames of the query down, all frames across: the fuller the colour, the more weight; a line ends the context.

    One raster: thousands of cells as paths would be megabytes. Its colour is that of the pattern in recall's pictures.
    """
    from matplotlib.colors import to_rgb

    picture = np.zeros((*seen.weights.shape, 4))
    picture[..., :3] = to_rgb(ROW_COLOURS[pattern_colour(seen.pattern)])
    # The square root: a weight spread over many frames would not be seen beside one that is not.
    picture[..., 3] = np.sqrt(np.clip(seen.weights / max(float(seen.weights.max()), 1e-9), 0, 1))
    extent = (float(seen.keys[0]), float(seen.keys[-1]), float(seen.queries[-1]), float(seen.queries[0]))
    ax.imshow((255 * picture).astype(np.uint8), extent=extent, interpolation="nearest", aspect="auto")
    ax.axvline(seen.context, color=palette.ink, linewidth=1, linestyle=(0, (4, 3)))
    ax.set(xlabel="frame attended to", ylabel="frame of the query")
    ax.grid(visible=False)
