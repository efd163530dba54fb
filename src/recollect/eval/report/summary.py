"""The one-picture summary of a face-off, for a README."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from recollect.eval.report.data import FaceOff, Stat
from recollect.eval.report.dreams import PAIRS, draw_error_dots, draw_share_bars, published_values
from recollect.eval.report.figures import PRINT, draw_accuracy_bars, require_matplotlib, settings
from recollect.eval.report.language import share_found, suite_lengths
from recollect.eval.report.language_plates import draw_found_bars, draw_loss_dots
from recollect.eval.report.metrics import REWARDS, label
from recollect.eval.report.published import published_for, published_worlds
from recollect.eval.report.rows import Panel, panels
from recollect.eval.report.strips import Film, films, strip_gap, strip_image
from recollect.eval.report.tables import mean_ranks, places
from recollect.eval.report.text import metric_text, task_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME_ROOM = 0.125
"""Part of the picture's width that the names beside bars may take."""

MATRIX = 1.6
"""Width of all backbones by all worlds against that of other parts, where there are more than two."""

HEADING = 13
"""Letters of a line over a column that is too narrow for its heading."""


def summary_png(face: FaceOff, question: str, headline: str) -> bytes:
    """One 1600 x 900 picture: question, answer, how every row does, and one filmstrip of the best imagination."""
    matplotlib = require_matplotlib()
    worlds = [group for group in face.groups_of("world") if face.ranked(group)]
    strip = next((film for group in worlds for film in films(face, group)), None)
    parts = _parts(face, worlds)
    with matplotlib.rc_context(settings(PRINT, size=17.0)):
        figure = matplotlib.figure.Figure(figsize=(16, 9), dpi=100, facecolor=PRINT.paper)
        figure.text(0.025, 0.965, question, fontsize=19, va="center", color=PRINT.muted)
        heading = figure.text(0.025, 0.908, headline, fontsize=32, va="center", color=PRINT.ink)
        taken = heading.get_window_extent().width / (0.95 * figure.bbox.width)
        heading.set_fontsize(32 / max(1.0, taken))
        bottom = 0.40 if strip else 0.10
        published = published_for(face.name)
        alone, panelled = len(parts) == 1, len(parts) > len({part.group for part in parts})
        most = max(part.n_rows for part in parts) if panelled else 1
        weights = [part.weight if len(parts) > 2 else 1.0 for part in parts]
        left = 0.135 if len(parts) < 3 else 0.02 + NAME_ROOM
        for part, weight in zip(parts, weights, strict=True):
            each = 0.99 * weight / sum(weights)
            width = 0.84 if alone else each - NAME_ROOM - 0.03
            tall = (0.77 - bottom) * min(1.0, (1 + part.n_rows) / (1 + most))
            ax = figure.add_axes((left, 0.77 - tall, width, tall))
            title = ax.set_title(part.title, loc="left", pad=32, fontsize=18)
            room = min(0.97 * each, 0.985 - left) * figure.bbox.width
            title.set_fontsize(18 * min(1.0, room / max(title.get_window_extent().width, 1.0)))
            part.draw(ax, alone)
            left += each
            for name in ax.get_yticklabels():  # a long name must not run off the page, or into the other bars
                room = (NAME_ROOM - 0.005) * figure.bbox.width
                name.set_fontsize(16.0 * min(1.0, room / name.get_window_extent().width))
        note = "" if len(worlds) != 1 else _noted(face, worlds[0])
        if published is not None:
            note = f"Diamonds: {published.source}" + ("" if face.name == published.same_task else ", on larger tables")
        figure.text(0.975, 0.855, note, fontsize=15, ha="right", color=PRINT.muted)
        if strip:
            _draw_film(figure, strip)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


class _Part(NamedTuple):
    """One set of axes of the picture."""

    group: str
    title: str
    n_rows: int
    draw: Callable[[Axes, bool], None]
    """Given the axes and whether they are the only ones."""
    weight: float = 1.0
    """Its width against that of others, where there are more than two."""


def _parts(face: FaceOff, worlds: Sequence[str]) -> list[_Part]:
    """Bars for recall, and for one world; all backbones by all worlds where there are several; losses on text.

    Beside the losses of a face-off of one language group alone, what is found at its greatest length.
    """
    parts: list[_Part] = []
    published = published_for(face.name)
    paper = published.accuracy if published else None
    for group in (group for group in face.groups_of("recall") if face.ranked(group)):
        for panel in panels(face, face.ranked(group)):

            def bars(ax: Axes, alone: bool, panel: Panel = panel) -> None:
                draw_accuracy_bars(ax, PRINT, face, panel, paper, all_guessers=alone)

            title = panel.title or f"{task_name(face, group).capitalize()}: values right"
            parts.append(_Part(group, title, len(panel.rows), bars))
    if len(worlds) > 1:
        n_rows = len({row.name for group in worlds for row in face.ranked(group)})
        matrix = _Part("", "", n_rows, lambda ax, _: draw_matrix(ax, face), MATRIX)
        parts.append(matrix)  # its columns say what they are
    for group in worlds if len(worlds) == 1 else ():
        metric, n_rows = face.headline(group), len(face.ranked(group))
        if metric in PAIRS:
            title = "Rewards: observing (pale), imagining (solid)" if metric in REWARDS else label(metric)
            draw = partial(_draw_shares, face=face, group=group, metric=metric)
        else:
            title, draw = f"{group}: {label(metric)}", partial(_draw_errors, face=face, group=group, metric=metric)
        parts.append(_Part(group, title, n_rows, draw))
    texts = [group for group in face.groups_of("language") if face.ranked(group)]
    for group in texts:
        ranked, named = face.ranked(group), f" ({group})" if len(texts) > 1 else ""
        dots = partial(_draw_losses, face=face, group=group)
        parts.append(_Part(group, f"Loss on held-out text{named}", len(ranked), dots))
        lengths = suite_lengths(ranked)
        if lengths and len(parts) == 1 and len(texts) == 1:
            shares = partial(_draw_found, face=face, group=group, length=lengths[-1])
            n_rows = sum(share_found(row, lengths[-1]) is not None for row in ranked)
            parts.append(_Part(group, f"Found in contexts of {lengths[-1]:,} tokens", n_rows, shares))
    return parts


def _noted(face: FaceOff, group: str) -> str:
    """What the diamonds are, where a backbone of the group has one."""
    beside, metric = published_worlds(face.environment(group)), face.headline(group)
    drawn = published_values(face, group, metric).keys() & {row.name for row in face.ranked(group)}
    if beside is None or not drawn:
        return ""
    table = beside.tables[metric]
    return f"Diamonds: {table.source}" + ("" if beside.same else f", of {table.environment}")


def _draw_shares(ax: Axes, _: bool, face: FaceOff, group: str, metric: str) -> None:
    draw_share_bars(ax, PRINT, face, group, metric)


def _draw_errors(ax: Axes, _: bool, face: FaceOff, group: str, metric: str) -> None:
    draw_error_dots(ax, PRINT, face, group, metric)


def _draw_losses(ax: Axes, _: bool, face: FaceOff, group: str) -> None:
    draw_loss_dots(ax, PRINT, face, group)


def _draw_found(ax: Axes, _: bool, face: FaceOff, group: str, length: int) -> None:
    draw_found_bars(ax, PRINT, face, group, length)


def draw_matrix(ax: Axes, face: FaceOff) -> None:
    """Backbones by environments: each cell what ranks there, the fuller the colour, the better its place."""
    from matplotlib.patches import Rectangle

    groups = [group for group in face.groups_of("world") if face.ranked(group)]
    found = {group: places(face, group) for group in groups}
    names = list(mean_ranks(found))
    for i, name in enumerate(names):
        for j, group in enumerate(groups):
            if name not in found[group]:
                continue
            full = 1 - (found[group][name] - 1) / max(len(found[group]) - 1, 1)
            shade = Rectangle((j - 0.48, i - 0.45), 0.96, 0.9, facecolor=PRINT.heat, alpha=0.06 + 0.84 * full, lw=0)
            ax.add_patch(shade)
            score = next(row.score for row in face.ranked(group) if row.name == name)
            text = metric_text(face.headline(group), score and Stat(score.mean, None, score.n))
            ax.text(j, i, text, ha="center", va="center", fontsize=15 if len(names) <= 12 else 11)
    ax.set(xlim=(-0.5, len(groups) - 0.5), ylim=(len(names) - 0.5, -0.5))
    what = [f"{group}\n{label(face.headline(group))}" for group in groups]
    size = 13.0 if len(groups) <= 4 else 10.0
    ax.set_xticks(range(len(groups)), what, fontsize=size)
    ax.xaxis.tick_top()
    figure: Any = ax.get_figure(root=True)
    room = 0.97 * figure.bbox.width * ax.get_position().width / len(groups)
    if _widest(ax) > room:
        what = ["\n".join(line for part in text.split("\n") for line in wrap(part, HEADING)) for text in what]
        ax.set_xticks(range(len(groups)), what, fontsize=size)
        size *= min(1.0, room / _widest(ax))
        ax.set_xticks(range(len(groups)), what, fontsize=size)
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelcolor=PRINT.ink)


def _widest(ax: Axes) -> float:
    """Pixels of the widest name on the x axis."""
    return max(name.get_window_extent().width for name in ax.get_xticklabels())


def _draw_film(figure: Any, film: Film) -> None:
    """Truth and the best backbone's imagination, large, with the time index under every frame."""
    shown = film.strips[:2]
    for i, strip in enumerate(shown):
        n_frames, height, width, _ = strip.frames.shape
        ax = figure.add_axes((0.135, 0.185 - 0.135 * i, 0.84, 0.125))
        image = strip_image(strip.frames)
        ax.imshow(image, interpolation="nearest", aspect="equal", extent=(0, image.shape[1], height, 0))
        ax.set_anchor("W")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        gap = strip_gap(width)
        ticks = [j * (width + gap) + width / 2 for j in range(n_frames)] if i == len(shown) - 1 else []
        ax.set_xticks(ticks, [str(step) for step in film.steps] if ticks else [])
        ax.set_yticks([height / 2], [strip.name])
        ax.tick_params(length=0)
        ax.tick_params(axis="y", labelcolor=PRINT.ink)
