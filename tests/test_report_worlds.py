"""Reports of several worlds in one face-off: groups, metrics, ranks, published numbers, dreams to look at."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from many_worlds import CONTEXT, ENVS, FILM, QUERY, ROWS, SKILL, write_worlds
from recollect.core.errors import ConfigError, RunError
from recollect.eval.report.animation import MOST_BYTES, animation
from recollect.eval.report.attended_frames import draw_frames, frame_maps
from recollect.eval.report.data import FaceOff
from recollect.eval.report.dreams import above_zero, draw_error_dots, draw_horizon, draw_rebuilt, draw_share_bars
from recollect.eval.report.figures import PRINT
from recollect.eval.report.metrics import label, lower_is_better, shown
from recollect.eval.report.published import WORLDS, published_worlds
from recollect.eval.report.read import load_faceoff, result_rows
from recollect.eval.report.rows import look
from recollect.eval.report.tables import all_worlds, frame_tables, longer_tables, mean_ranks, places, table
from recollect.eval.report.text import answer, sentences
from recollect.eval.report.write import markdown_tables, write_report
from recollect.recipes import load_recipe
from recollect.train.run import FaceOff as Planned
from recollect.train.run import RunConfig, group_family
from test_report import Page
from toy_problem import toy_run

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

MEMORY, DOORS, ROOMS, MAZE = ENVS


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_worlds(tmp_path_factory.mktemp("worlds") / "face")


@pytest.fixture(scope="module")
def face(directory: Path) -> FaceOff:
    return load_faceoff(directory)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two worlds, three rows, and the page."""
    envs = {name: ENVS[name] for name in (MEMORY, DOORS)}
    where = write_worlds(tmp_path_factory.mktemp("written") / "face", envs=envs, rows=("rssm", "s5wm", "haxwm"))
    write_report(where)
    return where


def drawn(draw: Callable[..., None], **given: Any) -> Any:
    from matplotlib.figure import Figure

    ax = Figure(figsize=(5, 3), layout="constrained").subplots()
    draw(ax, PRINT, **given)
    return ax


class TestGroups:
    def run(self, group: str) -> RunConfig:
        return replace(toy_run(), group=group)

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "a\\b", "a\n"])
    def test_a_group_is_one_folders_name(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"run\.group must be one folder's name") as error:
            self.run(name)
        assert "\n" not in str(error.value)

    def test_a_family_follows_from_the_kind_of_problem_else_from_the_name(self) -> None:
        assert group_family("world", "maze-9x9") == "world"
        assert group_family("recall", "world") == "recall"
        assert group_family("toy", "world") == "world"
        assert group_family("toy", "maze-9x9") is None
        with pytest.raises(ConfigError, match="call the group recall or world"):
            Planned("toy", "Toy", (self.run("mazes"),))

    def test_problems_that_cannot_be_compared_need_groups_of_their_own(self) -> None:
        demo = load_recipe("demo-smoke")
        words, world = demo.pick("mamba2"), demo.pick("gru")
        with pytest.raises(ConfigError, match="group 'same' holds both recall and world problems"):
            Planned("x", "X", (replace(words, group="same"), replace(world, group="same")))

    def test_rows_are_picked_by_group(self) -> None:
        gru = load_recipe("demo-smoke").pick("gru")
        both = Planned("x", "X", (replace(gru, group="left-1"), replace(gru, group="right_2")))
        assert both.pick("gru", "right_2").group == "right_2"
        assert both.place(both.runs[0]) == "left-1/gru/seed0"
        with pytest.raises(ConfigError, match="add --group left-1 or --group right_2"):
            both.pick("gru")
        with pytest.raises(ConfigError, match="its groups are left-1, right_2"):
            both.pick("gru", "middle")

    def test_rows_keep_their_group_in_the_results(self, directory: Path) -> None:
        rows = result_rows(directory)
        assert [(row["group"], row["row"]) for row in rows] == [(group, row) for group in ENVS for row in ROWS]
        keys = {"recipe", "row", "metrics", "spread", "n_seeds", "params", "state_bytes", "commit", "device", "wall_s"}
        assert all(keys < row.keys() for row in rows)

    def test_a_group_with_two_headlines_is_refused(self, tmp_path: Path) -> None:
        write_worlds(tmp_path, rows=("rssm", "tssm"), envs={DOORS: ENVS[DOORS]})
        path = tmp_path / DOORS / "tssm" / "seed0" / "results.json"
        results = json.loads(path.read_text())
        path.write_text(json.dumps({**results, "headline": "doors_accuracy"}))
        with pytest.raises(RunError, match=f"group '{DOORS}' has no one metric .* doors_accuracy and generation_mse"):
            load_faceoff(tmp_path)


class TestNumbers:
    def test_columns_follow_from_what_the_environment_asks(self, face: FaceOff) -> None:
        def columns(group: str) -> list[str]:
            found = table(face, group).columns
            return [name for name in found[: found.index("parameters")] if not name.startswith("published")]

        assert columns(MEMORY) == [
            *("reward, imagining, %", "reward, observing, %", "reconstruction error", "generation error")
        ]
        assert columns(DOORS) == ["generation error", "doors, %", "tiles, %", "reconstruction error"]
        assert columns(ROOMS) == [
            *("generation error", "reconstruction error", "mean dream, error", "dreamed frames, dB")
        ]
        probed = ["walls probed, %", "objects probed, squared error", "objects probed, cells off"]
        assert columns(MAZE) == ["generation error", *probed, "reconstruction error", "dreamed frames, dB"]

    def test_names_that_are_not_known_say_what_they_are(self) -> None:
        assert (label("tools_used_accuracy"), label("longer_generation_mse")) == ("tools used, %", "generation error")
        assert shown("world", "generation_mse", ["generation_mse", "tools_accuracy"]) == [
            *("generation_mse", "tools_accuracy")
        ]
        assert [lower_is_better(m) for m in ("objects_rmse", "longer_generation_mse", "generation_psnr")] == [
            *(True, True, False)
        ]

    def test_errors_rank_from_the_smallest_and_shares_from_the_largest(self, face: FaceOff) -> None:
        for group in ENVS:
            assert [row.name for row in face.ranked(group)] == ["s5wm", "s4wm", "haxwm", "tssm", "rssm"]
        first = table(face, DOORS).rows[0]
        assert (first.name, first.cells[0].text, first.cells[0].best, first.cells[1].best) == ("s5wm", "1", True, True)
        assert [cell.best for cell in table(face, DOORS).rows[1].cells[:4]] == [False] * 4
        assert face.line(MEMORY) == 0.5
        assert face.line(DOORS) is None
        assert not any(row.form == "line" for row in table(face, DOORS).rows)

    def test_all_worlds_in_one_table(self, tmp_path: Path, face: FaceOff) -> None:
        found = all_worlds(face)
        assert found is not None
        assert found.columns[0] == f"{MEMORY}: reward, imagining, %"
        assert [(row.name, row.cells[0].text, row.cells[1].text, row.cells[4].text) for row in found.rows[:2]] == [
            ("s5wm", "95.0", "1", "1.0"),
            ("s4wm", "90.0", "2", "2.0"),
        ]
        alone = load_faceoff(write_worlds(tmp_path, rows=("rssm",), envs={DOORS: ENVS[DOORS]}))
        assert all_worlds(alone) is None

    def test_mean_ranks_are_of_rows_that_are_everywhere(self) -> None:
        ranks = mean_ranks({"x": {"b": 1.0, "a": 2.5, "c": 2.5}, "y": {"a": 1.0, "b": 2.0}})
        assert ranks == {"b": 1.5, "a": 1.75, "c": None}
        assert list(mean_ranks({"x": {"b": 1.0, "a": 2.0}, "y": {"c": 1.0, "a": 2.0}})) == ["a", "b", "c"]

    def test_rows_of_one_score_share_their_places(self, tmp_path: Path) -> None:
        skill = {"rssm": 1.0, "tssm": 0.2, "s4wm": 1.0}
        envs = {name: ENVS[name] for name in (MEMORY, DOORS)}
        face = load_faceoff(write_worlds(tmp_path, rows=("rssm", "tssm", "s4wm"), envs=envs, skill=skill))
        assert places(face, MEMORY) == {"rssm": 1.5, "s4wm": 1.5, "tssm": 3.0}
        found = all_worlds(face)
        assert found is not None
        assert [row.cells[-1].text for row in found.rows] == ["1.5", "1.5", "3.0", ""]

    def test_a_world_where_nobody_beats_the_mean_picture_has_no_leader(self, tmp_path: Path) -> None:
        envs = {name: ENVS[name] for name in (DOORS, ROOMS)}
        where = write_worlds(tmp_path, rows=("rssm", "s5wm"), envs=envs, skill={"rssm": 0.2, "s5wm": 0.9})
        for group, blank in ((DOORS, 9.0), (ROOMS, 1.5)):  # errors are 8 and 1
            for path in (where / group).glob("*/*/results.json"):
                results = json.loads(path.read_text())
                results["details"]["mean_picture_mse"] = blank
                path.write_text(json.dumps(results))
        face = load_faceoff(where)
        assert answer(face) == ["In worlds, s5wm leads or is level in 1 of 2."]
        said = " ".join(sentences(face))
        assert f"In {ROOMS}, no backbone has learned to dream yet: s5wm, the best, errs by 1" in said
        assert "the mean picture by 1.5" in said
        found = all_worlds(face)
        assert found is not None
        assert [cell.text for cell in found.rows[-1].cells] == ["9", "1.5", ""]
        assert "No memory: chance, or the error of the mean picture." in found.note
        assert [row.name for row in table(face, DOORS).rows] == ["s5wm", "rssm", "mean picture"]
        assert [cell.text for cell in table(face, ROOMS).rows[-1].cells][:3] == ["1.5", "", "1.5"]

    def test_where_every_world_has_another_leader_none_is_named(self, tmp_path: Path) -> None:
        envs = {name: ENVS[name] for name in (MEMORY, DOORS)}
        where = write_worlds(tmp_path, rows=("rssm", "s5wm"), envs=envs, skill={"rssm": 0.2, "s5wm": 0.9})
        for path in (where / DOORS / "rssm").glob("*/results.json"):
            results = json.loads(path.read_text())
            results["metrics"]["generation_mse"] = 0.01
            path.write_text(json.dumps(results))
        assert answer(load_faceoff(where)) == ["In worlds, no backbone leads in more than 1 of 2."]

    def test_longer_and_rebuilt_have_tables_of_their_own(self, face: FaceOff) -> None:
        (longer,) = longer_tables(face)
        assert longer.group == f"{MEMORY}-longer"
        assert longer.columns[0] == "reward, imagining, %"
        assert not any("longer" in name for name in table(face, MEMORY).columns)
        frames = frame_tables(face)
        assert [each.group for each in frames] == [f"{group}-frames" for group in ENVS]
        assert frames[0].columns[:2] == ("rebuilt context, error", "rebuilt query, error")
        assert frames[0].rows[0].cells[0].text == "0.45"

    def test_what_is_said_follows_the_numbers(self, face: FaceOff) -> None:
        assert answer(face) == ["In worlds, s5wm leads or is level in 4 of 4."]
        said = [text.replace("\u00a0", " ") for text in sentences(face)]
        assert said[0].startswith(f"In {MEMORY}, asked for the reward after imagining the way to it, s5wm gets 95.0 %")
        assert "rssm is not clearly better than chance." in said[0]
        doors = f"In {DOORS}, s5wm errs by 1 per imagined frame, s4wm by 2 and the last, rssm, by 9."
        assert said[1].startswith(doors)

    def test_errors_are_level_by_a_share_of_the_smaller(self, tmp_path: Path) -> None:
        skill = {"rssm": 0.5, "tssm": 0.51, "s4wm": 0.6}
        envs = {DOORS: ENVS[DOORS]}
        face = load_faceoff(write_worlds(tmp_path / "a", rows=("rssm", "tssm"), envs=envs, skill=skill))
        assert answer(face) == ["In worlds, tssm and rssm."]  # 4.9 and 5
        face = load_faceoff(write_worlds(tmp_path / "b", rows=("rssm", "s4wm"), envs=envs, skill=skill))
        assert answer(face) == ["In worlds, s4wm."]  # 4 and 5


class TestPublished:
    def test_numbers_are_those_of_the_paper(self) -> None:
        found = {
            (t.environment, t.metric): [t.values.get(row) for row in ("rssm", "tssm", "s4wm", "s5wm")] for t in WORLDS
        }
        assert found["distracting-memory-200", "inference_accuracy"] == [0.487, 0.999, 1.0, None]
        assert found["distracting-memory-400", "imagination_accuracy"] == [0.522, 0.510, 1.0, None]
        assert found["multi-doors-keys-7", "generation_mse"] == [6.28, 9.24, 0.10, None]
        assert found["multi-doors-keys-3", "reconstruction_mse"] == [0.05, 0.05, 0.01, None]
        assert found["memory-maze-9x9", "walls_accuracy"] == [0.950, 0.864, 0.884, 0.983]
        assert found["memory-maze-15x15", "objects_mse"] == [32.6, 35.1, 34.8, 25.3]
        assert len(found) == 6 + 6 + 4

    def test_only_the_very_task_is_called_the_same(self) -> None:
        def beside(env: dict[str, Any]) -> tuple[str, bool]:
            found = published_worlds(env)
            assert found is not None
            assert ("the same task" in found.note) == found.same
            assert ("compare the order" in found.note) != found.same
            return found.tables[next(iter(found.tables))].environment, found.same

        memory = ENVS[MEMORY]
        assert beside(memory) == ("distracting-memory-100", False)
        assert beside({**memory, "width": 200}) == ("distracting-memory-200", True)
        assert beside({**memory, "width": 200, "n_colours": 2}) == ("distracting-memory-200", False)
        assert beside({**ENVS[DOORS], "n_doors": 6}) == ("multi-doors-keys-5", False)
        assert beside({"kind": "maze", "size": 15}) == ("memory-maze-15x15", False)
        assert beside({"kind": "memory-maze", "size": 9, "steps": 1000}) == ("memory-maze-9x9", False)
        assert published_worlds(ENVS[ROOMS]) is None
        assert published_worlds(None) is None

    def test_they_stand_beside_the_rows_of_their_names(self, directory: Path, face: FaceOff) -> None:
        found = table(face, MAZE)
        at = found.columns.index("published: walls probed, %")
        assert {row.name: row.cells[at].text for row in found.rows} == {
            **{"s5wm": "98.3", "s4wm": "88.4", "haxwm": "-", "tssm": "86.4", "rssm": "95.0"}
        }
        assert "of memory-maze-9x9" in found.note
        assert "published" not in " ".join(table(face, ROOMS).columns)
        assert f"**Worlds: {MAZE}**" in markdown_tables(directory)


class TestFigures:
    def test_bars_and_diamonds_are_where_the_numbers_are(self, face: FaceOff) -> None:
        ax = drawn(draw_share_bars, face=face, group=MEMORY, metric="imagination_accuracy")
        widths = sorted(round(bar.get_width(), 6) for bar in ax.patches)
        assert widths == sorted([99.0] * 5 + [50 + 50 * skill for skill in SKILL.values()])
        diamonds = {round(float(line.get_xdata()[0]), 1) for line in ax.lines if line.get_gid() == "published"}
        assert diamonds == {49.6, 51.2, 100.0}
        assert "chance 50" in {text.get_text() for text in ax.texts}

    def test_errors_are_dots_on_a_logarithmic_axis(self, face: FaceOff) -> None:
        ax = drawn(draw_error_dots, face=face, group=DOORS, metric="generation_mse")
        assert ax.get_xscale() == "log"
        dots = [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() != "D" or not line.get_gid()]
        assert dots == pytest.approx([9.0, 6.0, 3.0, 2.0, 1.0])
        assert [t.get_text() for t in ax.get_yticklabels()] == ["rssm", "tssm", "haxwm", "s4wm", "s5wm"]

    def test_curves_of_the_horizon(self, face: FaceOff) -> None:
        ax = drawn(draw_horizon, face=face, group=MEMORY)
        assert ax.get_yscale() == "log"
        assert {text.get_text() for text in ax.texts if text.get_text()} == set(ROWS)
        x, y = ax.lines[0].get_data()
        assert (len(x), x[0], x[-1]) == (QUERY, 1, QUERY)
        assert y[-1] == pytest.approx(20 * 0.1 + 0.01)
        longer = drawn(draw_horizon, face=face, group=MEMORY, key="longer_generation_mse_curve")
        assert longer.lines[0].get_xdata()[-1] == 2 * QUERY
        rebuilt = drawn(draw_rebuilt, face=face, group=MEMORY)
        assert rebuilt.lines[0].get_xdata()[-1] == CONTEXT + QUERY - 1
        assert list(rebuilt.lines[-1].get_xdata()) == [CONTEXT, CONTEXT]

    def test_an_error_of_zero_can_be_drawn(self, tmp_path: Path) -> None:
        skill = {"rssm": 0.5, "s4wm": 1.0}
        face = load_faceoff(write_worlds(tmp_path, rows=("rssm", "s4wm"), envs={DOORS: ENVS[DOORS]}, skill=skill))
        ax = drawn(draw_error_dots, face=face, group=DOORS, metric="generation_mse")
        assert np.isfinite(ax.get_xlim()).all()
        assert above_zero([0.0, 10.0]) == pytest.approx([1e-5, 10.0])
        assert above_zero([0.0]) == [1.0]

    def test_more_rows_than_colours_are_told_apart_by_marker_and_line(self, tmp_path: Path) -> None:
        names = tuple(f"wm{i}" for i in range(12))
        skill = {name: i / 20 for i, name in enumerate(names)}
        face = load_faceoff(write_worlds(tmp_path, rows=names, envs={ROOMS: ENVS[ROOMS]}, skill=skill))
        looks = [look(face, name) for name in names]
        assert len({(each.colour, each.marker) for each in looks}) == 12
        assert looks[0].colour == looks[10].colour
        assert looks[0].line != looks[10].line

    def test_maps_of_frames(self, face: FaceOff) -> None:
        row = next(row for row in face.groups[MEMORY] if row.name == "haxwm")
        maps = frame_maps(row)
        assert [(seen.layer, seen.pattern) for seen in maps] == [
            *((0, "lsh"), (0, "key-selection"), (1, "lsh"), (1, "key-selection"))
        ]
        ax = drawn(draw_frames, seen=maps[1])
        (image,) = ax.images
        assert image.get_extent() == [0, CONTEXT + QUERY, CONTEXT + QUERY, CONTEXT]
        alpha = image.get_array()[..., 3]
        assert (alpha[:, 5] == 255).all()
        assert np.delete(alpha, 5, axis=1).max() == 0
        assert frame_maps(next(row for row in face.groups[MEMORY] if row.name == "rssm")) == []


class TestPage:
    def test_it_is_whole_and_needs_neither_network_nor_scripts(self, written: Path) -> None:
        text = (written / "report.html").read_text()
        page = Page(text)
        assert "script" not in page.tags
        assert all(source.startswith(("data:image/", "#")) for source in page.sources)
        assert len(page.ids) == len(set(page.ids))
        referenced = {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)}
        assert referenced <= set(page.ids)
        assert {MEMORY, DOORS} <= set(page.ids)
        assert "#fe01" not in text
        assert text.count("Which frames are attended to") == 2

    def test_episodes_are_chosen_with_radio_buttons(self, written: Path) -> None:
        text = (written / "report.html").read_text()
        browsers = re.findall(r'<div class="chooser".*?</div>', text, flags=re.DOTALL)
        assert len(browsers) == 2 * 3
        for browser in browsers:
            buttons = re.findall(r'<input type="radio" name="([^"]+)" id="([^"]+)"( checked)?>', browser)
            assert len({name for name, _, _ in buttons}) == 1
            assert [bool(checked) for *_, checked in buttons] == [True] + [False] * 5
            assert re.findall(r'<label for="([^"]+)">', browser) == [each for _, each, _ in buttons]
            assert re.findall(r"<label [^>]*>([^<]+)<", browser) == [
                *("first 1", "first 2", "best 1", "best 2", "worst 1", "worst 2")
            ]
            assert browser.count("<figure>") == 6
        for i in range(1, 7):
            assert f"input:nth-of-type({i}):checked ~ figure:nth-of-type({i})" in text
        assert (
            "First 2: rssm, test episode 1, frames 20 to 31, squared error 18 per frame, reward 1, predicted 0.10"
            in text
        )
        assert (
            "Best 1: s5wm, test episode 5, frames 20 to 31, squared error 6 per frame, reward 1, predicted 0.90" in text
        )
        assert "Worst 1: s5wm, test episode 7" in text
        doors = text[text.index(f'<section id="{DOORS}">') :]
        assert "predicted" not in doors[: doors.index("</section>")]

    def test_its_strips_are_those_of_the_episode(self, written: Path) -> None:
        from PIL import Image

        text = (written / "report.html").read_text()
        worst = text[text.index("Worst 1: s5wm") :]
        truth, imagined = re.findall(r'src="data:image/png;base64,([^"]+)"', worst)[:2]
        stored = np.load(written / MEMORY / "s5wm" / "seed0" / "arrays.npz")
        for address, frames in ((truth, stored["worst_truth"][0]), (imagined, stored["worst_imagined"][0])):
            image = np.array(Image.open(io.BytesIO(base64.b64decode(address))))
            np.testing.assert_array_equal(image[:, :16, :3], frames[0])
            np.testing.assert_array_equal(image[:, -16:, :3], frames[-1])

    def test_the_dreams_move_side_by_side(self, written: Path) -> None:
        from PIL import Image

        content = (written / f"dreams-{MEMORY}.webp").read_bytes()
        assert len(content) < MOST_BYTES
        assert base64.b64encode(content).decode() in (written / "report.html").read_text()
        moving: Any = Image.open(io.BytesIO(content))
        assert moving.n_frames == 2 * FILM
        stored = np.load(written / MEMORY / "s5wm" / "seed0" / "arrays.npz")
        moving.seek(FILM + 3)
        picture = np.array(moving.convert("RGB"))
        for column, frames in ((0, stored["film_truth"]), (1, stored["film_imagined"])):
            left = 8 + column * (96 if frames.shape[2] * 6 > 84 else 92)
            shown_ = picture[20 : 20 + 6 * 16 : 6, left : left + 6 * 16 : 6]
            difference = np.abs(shown_[2:, 2:].astype(int) - frames[1, 3][2:, 2:])
            assert np.median(difference) < 12

    def test_films_of_other_episodes_are_left_out_and_large_ones_thinned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from PIL import Image

        rows = ("rssm", "s5wm", "s4wm")
        write_worlds(tmp_path, rows=rows, envs={DOORS: ENVS[DOORS]})
        path = tmp_path / DOORS / "rssm" / "seed0" / "arrays.npz"
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "film_truth": 255 - arrays["film_truth"]})
        found = animation(load_faceoff(tmp_path), DOORS)
        assert found is not None
        assert "s5wm, s4wm, frames 20 to 31" in found.alt
        monkeypatch.setattr("recollect.eval.report.animation.MOST_BYTES", len(found.content) // 2)
        thinned = animation(load_faceoff(tmp_path), DOORS)
        assert thinned is not None
        assert len(thinned.content) <= len(found.content) // 2
        picture: Any = Image.open(io.BytesIO(thinned.content))
        assert 4 <= picture.n_frames < 2 * FILM
        np.savez(path, **{**arrays, "film_imagined": arrays["film_imagined"][:1]})
        with pytest.raises(RunError, match=r"arrays\.npz' is damaged: strips are not uint8 frames"):
            animation(load_faceoff(tmp_path), DOORS)

    def test_runs_without_films_have_no_animation(self, tmp_path: Path) -> None:
        write_worlds(tmp_path, rows=("rssm",), envs={ROOMS: ENVS[ROOMS]})
        (tmp_path / ROOMS / "rssm" / "seed0" / "arrays.npz").unlink()
        assert animation(load_faceoff(tmp_path), ROOMS) is None
        text = write_report(tmp_path).read_text()
        assert '<details class="' not in text
        assert not list(tmp_path.glob("dreams-*"))

    def test_the_same_data_as_json(self, written: Path) -> None:
        data = json.loads((written / "report.json").read_text())
        assert data["headlines"] == {MEMORY: "imagination_accuracy", DOORS: "generation_mse"}
        assert data["published_worlds"][MEMORY]["same"] is False
        rows = {row["row"]: row for row in data["groups"][DOORS]}
        assert rows["s5wm"]["metrics"]["doors_accuracy"]["mean"] == pytest.approx(0.9)
