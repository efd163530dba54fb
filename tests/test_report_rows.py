"""Reports of many rows: told apart, named without overlap, beside published numbers, small enough to open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from many_rows import ROWS, write_many_rows
from recollect.core.errors import RunError
from recollect.eval.report.attended import draw_attended, draw_needed_bars, load_attended
from recollect.eval.report.data import FaceOff
from recollect.eval.report.figures import PRINT, draw_accuracy_bars, draw_curves, draw_gap_bars, name_ends
from recollect.eval.report.maps import differences, draw_difference, draw_table_heat, draw_whole_by_size, whole_by_size
from recollect.eval.report.published import published_for, published_note
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.rows import OTHERS, Panel, added_to, legend, look, mixer_of, panels
from recollect.eval.report.scatter import box_of, draw_price_scatter, places
from recollect.eval.report.text import sentences, steps_to
from recollect.eval.report.write import markdown_tables, terminal_table, write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many_rows(tmp_path_factory.mktemp("many") / "face", ranges=((2, 4), (2, 5)), n_attended=(2, 3))


@pytest.fixture(scope="module")
def face(directory: Path) -> FaceOff:
    return load_faceoff(directory)


def drawn(draw: Callable[..., None], **given: Any) -> Any:
    from matplotlib.figure import Figure

    ax = Figure(figsize=(820 / 72, 430 / 72), layout="constrained").subplots()
    draw(ax, PRINT, **given)
    return ax


def named(face: FaceOff, name: str) -> Any:
    return next(row for row in face.groups["recall"] if row.name == name)


def test_names_are_read_as_mixer_and_addition() -> None:
    assert [mixer_of(n) for n in ("mamba-2x", "mamba2+window+dilated", "conv+attention")] == ["mamba", "mamba2", "conv"]
    assert [added_to(n) for n in ("mamba-2x", "mamba2+window+dilated", "s5")] == ["2x", "window+dilated", "nothing"]


def test_every_row_looks_like_no_other_and_additions_share_a_colour(face: FaceOff) -> None:
    looks = {name: look(face, name) for name in face.row_names}
    assert len({(each.colour, each.marker) for each in looks.values()}) == len(ROWS) == 24
    assert looks["mamba+hax"].colour == looks["mamba2+hax"].colour == looks["gated_deltanet+hax"].colour
    assert looks["mamba+hax"].marker == looks["mamba"].marker != looks["mamba2"].marker
    mamba = [looks[name].colour for name in ROWS if mixer_of(name) == "mamba"]
    assert len(set(mamba)) == len(mamba)
    labels = [label for label, _ in legend(face, "recall")]
    assert "mixer alone" in labels
    assert "▲ samba" in labels


def test_panels_hold_every_row_once(face: FaceOff) -> None:
    shown = panels(face, face.ranked("recall"))
    assert [panel.title for panel in shown] == ["mamba", "mamba2", OTHERS]
    assert sorted(row.name for panel in shown for row in panel.rows) == sorted(ROWS)
    assert shown[0].called(named(face, "mamba")) == "plain"
    assert shown[0].called(named(face, "mamba-2x")) == "2x"
    assert shown[2].called(named(face, "samba")) == "samba"


def test_published_numbers_are_those_of_the_paper(directory: Path, face: FaceOff) -> None:
    table = published_for("recall-published")
    assert table is not None
    assert published_for("demo") is None
    assert published_note("demo") == ""
    paper = (
        [16.3, 7.8, 18.7, 16.6, 16.4, 11.6, 36.6, 38.0, 34.5],
        [36.6, 19.6, 70.6, 48.6, 49.3, 13.5, 60.1, 74.3, 59.2],
    )
    columns = ("", "+dilated", "+window", "+window+dilated", "+sink", "+lsh", "+ks", "+hax", "-2x")
    for mixer, numbers in zip(("mamba", "mamba2"), paper, strict=True):
        assert [100 * table.accuracy[mixer + added] for added in columns] == pytest.approx(numbers)
    assert table.accuracy["samba"] == 0.063
    assert "Only recall-published is the same task" in published_note("recall-mini")
    assert "Only" not in published_note("recall-published")

    lines = markdown_tables(directory).splitlines()
    names = [cell.strip() for cell in lines[2].split("|")]
    at = names.index("published, %")
    cells = {parts[1].strip(): parts for line in lines[4:] if len(parts := [c.strip() for c in line.split("|")]) > at}
    assert cells["mamba2+hax"][at] == "74.3"
    assert cells["mamba2+full"][at] == "-"
    ax = drawn(draw_accuracy_bars, face=face, panel=panels(face, face.ranked("recall"))[1], published=table.accuracy)
    diamonds = {round(float(x[0]), 1) for line in ax.lines if (x := line.get_xdata()) is not None and line.get_gid()}
    assert diamonds == {float(n) for n in paper[1]}


def test_steps_to_a_level_are_counted_from_the_log(directory: Path, face: FaceOff) -> None:
    row = named(face, "mamba2+hax")
    firsts: list[int] = []
    for seed in range(3):
        log = (directory / "recall" / "mamba2+hax" / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in log]
        firsts.append(min(line["step"] for line in lines if line.get("eval", {}).get("accuracy", 0) >= 0.5))
    assert steps_to(row, 0.5) == (sum(firsts) / 3, 3)
    assert steps_to(named(face, "samba"), 0.99) is None
    assert "steps to 50" in markdown_tables(directory)


@pytest.mark.parametrize("price", ["state_bytes", "params"])
def test_names_of_points_do_not_overlap(face: FaceOff, price: str) -> None:
    ax = drawn(draw_price_scatter, face=face, price=price)
    names = [row.name for row in face.ranked("recall")]
    points = [(row.field(price), 100 * row.score.mean) for row in face.ranked("recall") if row.score]
    room = (750.0, 370.0)
    found = places(ax, points, names, room, 8.5)
    low, high = np.log2(ax.get_xlim())
    boxes = [
        box_of(room[0] * (np.log2(x) - low) / (high - low), room[1] * y / 108, place, 5.2 * len(name), 9)
        for (x, y), place, name in zip(points, found, names, strict=True)
    ]
    clashes = sum(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for i, a in enumerate(boxes) for b in boxes[:i]
    )
    assert clashes == 0
    assert sorted(text.get_text() for text in ax.texts) == sorted(names)


def test_names_of_curves_stand_apart_in_one_column(face: FaceOff) -> None:
    panel = panels(face, face.ranked("recall"))[0]
    ax = drawn(draw_curves, face=face, panel=panel, name="accuracy", axis="step", evaluation=True)
    texts = [text for text in ax.texts if text.get_text()]
    assert {text.get_text() for text in texts} == {panel.called(row) for row in panel.rows}
    assert len({text.xy[0] for text in texts}) == 1
    low, high = ax.get_ylim()
    tall = 430 - 65
    heights = sorted((text.xy[1] - low) / (high - low) * tall + text.get_position()[1] for text in texts)
    assert min(np.diff(heights)) > 10


def test_no_curves_need_no_names() -> None:
    drawn(lambda ax, _: name_ends(ax, []))


def test_maps_show_every_cell_of_the_published_grid(tmp_path: Path) -> None:
    rows = ("mamba2", "mamba2+hax")
    face = load_faceoff(write_many_rows(tmp_path, rows=rows, seeds=2))
    ax = drawn(draw_table_heat, row=named(face, "mamba2"))
    assert len(ax.patches) == len(ax.texts) == 144
    ((best, base),) = differences(face)
    assert (best.name, base.name) == rows[::-1]
    ax = drawn(draw_difference, row=best, base=base)
    cells = [np.mean([d["accuracy"] for d in r.detail("cells")], axis=0) for r in (best, base)]
    assert [float(t.get_text()) for t in ax.texts] == pytest.approx((100 * (cells[0] - cells[1])).tolist(), abs=0.51)
    x, y = whole_by_size(base)
    assert x.size < 30
    assert ((y >= 0) & (y <= 1)).all()


@pytest.mark.parametrize(
    ("axes", "ranges", "cells"), [(("pairs",), ((2, 9),), 8), (("a", "b", "c"), ((1, 2), (2, 3), (2, 5)), 16)]
)
def test_maps_of_one_axis_and_of_three(
    tmp_path: Path, axes: tuple[str, ...], ranges: tuple[tuple[int, int], ...], cells: int
) -> None:
    write_many_rows(tmp_path, rows=("mamba2", "mamba2+hax"), seeds=1, axes=axes, ranges=ranges, n_attended=(2, 2))
    face = load_faceoff(tmp_path)
    row = named(face, "mamba2")
    ax = drawn(draw_table_heat, row=row)
    assert len(ax.texts) == cells
    assert (ax.get_xlabel(), ax.get_ylabel()) == (axes[-1], " x ".join(axes[:-1]))
    x, y = whole_by_size(row)
    sizes, whole = row.detail("cells")[0]["sizes"], row.detail("cells")[0]["all_correct"]
    for n, value in zip(x, y, strict=True):
        assert value == pytest.approx(np.mean([w for s, w in zip(sizes, whole, strict=True) if np.prod(s) == n]))
    ax = drawn(draw_whole_by_size, face=face, panel=Panel("", face.groups["recall"]))
    assert len(ax.lines) == 2
    assert write_report(tmp_path).is_file()


def test_gap_bars_reach_as_far_as_the_gap(face: FaceOff) -> None:
    panel = panels(face, face.ranked("recall"))[2]
    ax = drawn(draw_gap_bars, face=face, panel=panel)
    gaps = [100 * row.metric("binding_gap").mean for row in reversed(panel.rows)]  # pyright: ignore
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(gaps)


def test_the_picture_of_attention_shows_what_was_stored(directory: Path, face: FaceOff) -> None:
    row = named(face, "mamba2+hax")
    seen = load_attended(row)
    assert seen is not None
    assert (seen.number, seen.carried) == (1, 0)
    stored = np.load(directory / "recall" / "mamba2+hax" / "seed0" / "arrays.npz")
    told = seen.weights.shape[1]
    np.testing.assert_allclose(seen.weights, stored["attended_weights_1"][:, :told].astype(float))
    ax = drawn(draw_attended, seen=seen)
    assert [t.get_text() for t in ax.get_xticklabels()] == stored["attended_labels"][:told].tolist()
    outlines = {patch.get_label(): patch for patch in ax.patches if not patch.get_fill()}
    assert list(outlines) == ["lsh", "key-selection"]
    width = 0.0
    for box in outlines["lsh"].get_path().vertices.reshape(-1, 5, 2):
        width += round(box[1, 0] - box[0, 0])
    assert width == (seen.kinds & 1).sum()
    shaded = sum(len(p.get_path().vertices) // 5 for p in ax.patches if p.get_fill())
    assert shaded == (np.round(seen.weights * 8) >= 1).sum()
    x, y = ax.lines[0].get_data()
    assert (np.asarray(x) == stored["attended_needed"][np.asarray(y)]).all()
    bars = drawn(draw_needed_bars, face=face, panel=Panel("", (row,)))
    shares = row.detail("attended")[0]["layers"][1]["shares"]["any"]
    wanted = [100 * shares["admitted"], 100 * shares["weight"]]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx(wanted, rel=1e-3)  # stored in half precision
    assert seen.admitted(0) == pytest.approx(row.detail("attended")[0]["layers"][1]["shares"]["lsh"]["admitted"])
    assert load_attended(named(face, "mamba2")) is None


def test_a_value_is_looked_for_where_the_mixer_may_have_carried_it(tmp_path: Path) -> None:
    write_many_rows(tmp_path, rows=("mamba2+hax",), seeds=1, ranges=((2, 3), (2, 3)), n_attended=(2, 2))
    path = tmp_path / "recall" / "mamba2+hax" / "seed0" / "arrays.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    needed = arrays["attended_needed"]
    weights = np.zeros_like(arrays["attended_weights_0"])
    weights[np.arange(len(needed)), needed + 2] = 1.0
    np.savez(path, **{**arrays, "attended_weights_0": weights})
    seen = load_attended(named(load_faceoff(tmp_path), "mamba2+hax"))
    assert seen is not None
    # The last value told is carried beyond what was told: it is not counted.
    assert (seen.number, seen.carried, seen.weight) == (0, 2, 1.0)
    np.savez(path, **{**arrays, "attended_needed": np.full_like(needed, -1)})
    seen = load_attended(named(load_faceoff(tmp_path), "mamba2+hax"))
    assert seen is not None
    assert seen.weight is None


def test_damaged_arrays_of_attention_are_named(tmp_path: Path) -> None:
    write_many_rows(tmp_path, rows=("mamba2+hax",), seeds=1, ranges=((2, 3), (2, 3)), n_attended=(2, 2))
    path = tmp_path / "recall" / "mamba2+hax" / "seed0" / "arrays.npz"
    np.savez(path, attended_labels=np.array(["a"]))
    with pytest.raises(RunError, match=r"arrays\.npz' is damaged"):
        write_report(tmp_path)
    path.write_bytes(b"PK")
    with pytest.raises(RunError, match=r"arrays\.npz' is damaged"):
        write_report(tmp_path)


def test_a_task_without_a_blind_guesser_is_held_against_the_best_one(tmp_path: Path) -> None:
    write_many_rows(tmp_path, rows=("mamba2",), seeds=1, axes=("pairs",), ranges=((2, 5),))
    path = tmp_path / "recall" / "mamba2" / "seed0" / "results.json"
    results = json.loads(path.read_text())
    del results["metrics"]["binding_gap"]
    results["details"] |= {"blind": None, "oracles": {"uniform": 0.0625, "frequent": 0.1, "perfect": 1.0}}
    path.write_text(json.dumps(results))
    config = json.loads((tmp_path / "faceoff.json").read_text())
    config["runs"][0]["problem"]["task"]["kind"] = "associative-recall"
    (tmp_path / "faceoff.json").write_text(json.dumps(config))
    face = load_faceoff(tmp_path)
    assert face.guesser == ("frequent", 0.1)
    said = " ".join(sentences(face))
    assert "On associative recall" in said
    assert "the guesser 'frequent' gets 10.0" in said
    text = write_report(tmp_path).read_text()
    assert "Words: associative recall" in text
    assert "Context-binding gap" not in text


def test_half_the_page_of_24_rows_on_the_published_grid_is_half_of_5_mb(tmp_path: Path) -> None:
    from rich.console import Console

    rows = ROWS[10:22]
    write_many_rows(tmp_path, rows=rows, seeds=1)
    page = write_report(tmp_path)
    text = page.read_text()
    assert page.stat().st_size < 2.5e6
    assert text.count('class="wide"') == 2 + 8  # two scatters, and a picture for each row with attention
    assert "#fe01" not in text
    assert not re.findall(r' d="[^"]*\.\d{3}', text)
    console = Console(width=80, record=True)
    console.print(terminal_table(tmp_path))
    shown = console.export_text()
    assert all(f"  {name} " in shown for name in rows)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
