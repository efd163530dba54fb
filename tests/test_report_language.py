"""Reports of language models: losses and answers found, in tables, words, figures and pictures."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from many_languages import LENGTHS, ROWS, SKILL, STEP, TASKS, TRAINED, loss_of, share_of, write_languages
from many_rows import write_many_rows
from many_worlds import ENVS, write_worlds
from recollect.core.errors import RunError
from recollect.eval.report.data import FaceOff
from recollect.eval.report.figures import PRINT
from recollect.eval.report.language import chosen, longest, maps, positions, share_found
from recollect.eval.report.language_plates import (
    draw_found,
    draw_found_bars,
    draw_loss_dots,
    draw_nats,
    draw_suite_maps,
    language_plates,
)
from recollect.eval.report.metrics import at_length, headline_of, lower_is_better
from recollect.eval.report.page import chapters
from recollect.eval.report.publish import publish
from recollect.eval.report.rates import rate_tables
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.rows import legend, look, mixers, panels
from recollect.eval.report.summary import _parts, summary_png  # pyright: ignore[reportPrivateUsage]
from recollect.eval.report.tables import tables
from recollect.eval.report.text import answer, sentences
from recollect.eval.report.write import markdown_tables, result_rows, terminal_table, write_report
from test_report import Page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

FEW = ("none", "SW", "HAX")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages") / "face")


@pytest.fixture(scope="module")
def face(directory: Path) -> FaceOff:
    return load_faceoff(directory)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows, and the page."""
    where = write_languages(tmp_path_factory.mktemp("written") / "face", rows=FEW)
    write_report(where)
    return where


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write_languages(tmp_path / "face", rows=FEW)


def drawn(draw: Callable[..., None], **given: Any) -> Any:
    from matplotlib.figure import Figure

    ax = Figure(figsize=(5, 3), layout="constrained").subplots()
    draw(ax, PRINT, **given)
    return ax


def changed(directory: Path, group: str, row: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every seed's results of a row."""
    for path in (directory / group / row).glob("seed*/results.json"):
        results = json.loads(path.read_text())
        change(results)
        path.write_text(json.dumps(results))


def merged(out: Path, *directories: Path) -> Path:
    """One face-off of the groups of several."""
    runs: list[dict[str, Any]] = []
    for directory in directories:
        runs += json.loads((directory / "faceoff.json").read_text())["runs"]
        for group in (path for path in directory.iterdir() if path.is_dir()):
            shutil.copytree(group, out / group.name)
    (out / "faceoff.json").write_text(json.dumps({"name": "all", "title": "All", "runs": runs, "seeds": [0]}))
    return out


def text(value: str) -> str:
    return value.replace("\u00a0", " ")


class TestNumbers:
    def test_names_of_metrics(self) -> None:
        assert [at_length(name) for name in ("loss_2048", "joint-recall_8192", "all_512", "loss", "accuracy")] == [
            *(("loss", 2048), ("joint-recall", 8192), ("all", 512), None, None)
        ]
        assert [lower_is_better(name) for name in ("loss", "loss_4096", "perplexity", "joint-recall_4096")] == [
            *(True, True, True, False)
        ]
        assert headline_of("language", {}) == "loss", "a run that has not finished, too, is ranked by its loss"

    def test_rows_are_ranked_by_loss(self, face: FaceOff) -> None:
        assert [row.name for row in face.ranked("language")] == sorted(ROWS, key=lambda row: -SKILL[row])
        assert face.line("language") is None
        assert face.trained == {"language": TRAINED}

    def test_runs_of_other_lengths_have_none_in_common(self, fresh: Path) -> None:
        config = json.loads((fresh / "faceoff.json").read_text())
        config["runs"][1]["problem"]["row_length"] = 512
        (fresh / "faceoff.json").write_text(json.dumps(config))
        assert load_faceoff(fresh).trained == {}

    def test_what_is_found_is_the_suites_own_average(self, face: FaceOff) -> None:
        row = face.ranked("language")[0]
        stat = share_found(row, 4096)
        assert stat is not None
        seeds = [
            np.mean(
                [
                    np.mean(
                        [share_of(SKILL["HAX"], task, 4096, d, seed) for d in ((None,) if last else (0.0, 0.5, 1.0))]
                    )
                    for task in TASKS
                    for last in [task == "common-words"]
                ]
            )
            for seed in (0, 1)
        ]
        assert stat.mean == pytest.approx(np.mean(seeds))
        assert stat.std == pytest.approx(np.std(seeds, ddof=1))

    def test_and_the_mean_of_those_that_fit_where_that_is_absent(self, tmp_path: Path) -> None:
        write_languages(tmp_path, rows=FEW, short=("joint-recall",))
        face = load_faceoff(tmp_path)
        row = face.ranked("language")[0]
        assert "all_2048" not in row.reported
        stat = share_found(row, 2048)
        assert stat is not None
        assert stat.mean == pytest.approx(np.mean([0.9 * 0.9, 0.9 * 0.9, 0.9]) * 0.95)
        assert "at 2,048 the 3 of 4 tasks that fit" in table_of(face).note
        assert "8,192 the" not in table_of(face).note

    def test_positions_are_means_over_seeds_and_differences_are_taken_seed_by_seed(self, face: FaceOff) -> None:
        rows = {row.name: row for row in face.groups["language"]}
        assert longest(list(rows.values())) == 8192
        seen = positions(rows["HAX"], 8192)
        assert (seen.first[0], seen.last[0], seen.last[-1]) == (16, 31, 8191)
        at = seen.first.index(1024)
        assert seen.nats[at].mean == pytest.approx(loss_of(0.9, 0) + STEP / 2 + 2 / 1024**0.6 - 0.09)
        assert seen.nats[at].std == pytest.approx(STEP / 2**0.5)
        less = positions(rows["HAX"], 8192, less=rows["none"])
        assert less.nats[at].mean == pytest.approx(-0.2 * 0.8 - 0.01 * 0.8 * 10)
        assert less.nats[at].std == pytest.approx(0.0, abs=1e-9), "what a seed does to both rows is no difference"

    def test_maps_are_means_over_seeds(self, face: FaceOff) -> None:
        row = next(row for row in face.groups["language"] if row.name == "KS")
        cells = {(case["task"], case["length"], case["depth"]): case["found"] for case in maps(row)}
        assert len(cells) == 3 * (3 * 3 + 1)
        assert cells["multi-key", 4096, 0.5] == pytest.approx(0.7 * 0.9 * 0.5 * 0.95)
        assert cells["common-words", 2048, None] == pytest.approx(0.7 * 0.95)

    def test_the_rows_of_the_maps(self, face: FaceOff) -> None:
        rows = face.ranked("language")
        assert [(row.name, why) for row, why in chosen(rows)] == [
            *(("HAX", "finds most"), ("none", "without attention"), ("D", "finds least"))
        ]
        assert [row.name for row, _ in chosen([row for row in rows if row.name != "D"])] == ["HAX", "none"]

    def test_published_rows_hold_every_number(self, directory: Path) -> None:
        rows = {row["row"]: row for row in result_rows(directory)}
        assert rows["HAX"]["metrics"]["loss"] == pytest.approx(loss_of(0.9, 0) + STEP / 2)
        assert {f"{task}_{n}" for task in TASKS for n in LENGTHS} < rows["HAX"]["metrics"].keys()


def table_of(face: FaceOff, name: str = "language") -> Any:
    return next(found for found in tables(face) if found.group == name)


class TestTables:
    def test_losses_answers_and_costs(self, face: FaceOff) -> None:
        found = table_of(face)
        assert [text(name) for name in found.columns] == [
            *("loss", "loss at 2,048", "loss at 4,096", "loss at 8,192"),
            *("found at 2,048, %", "found at 4,096, %", "found at 8,192, %"),
            *("parameters", "trained", "state", "steps", "time", "steps/s", "seeds"),
        ]
        first = found.rows[0]
        assert first.name == "HAX"
        assert text(first.cells[0].text) == "2.322 ± 0.003"
        assert text(first.cells[7].text) == "2.17 M"
        assert text(first.cells[9].text) == "773.4 KiB"
        assert first.cells[-1].text == "2 of 2"
        for i in range(7):
            assert [row.name for row in found.rows if row.cells[i].best] == ["HAX"]
        assert "Trained on rows of 2,048 tokens." in found.note
        assert "published" not in " ".join(found.columns)
        assert "squared" not in found.note

    def test_the_best_of_a_column_need_not_be_the_first_row(self, fresh: Path) -> None:
        changed(fresh, "language", "SW", lambda results: results["metrics"].update({"all_8192": 1.0, "loss_4096": 1.0}))
        found = table_of(load_faceoff(fresh))
        best = {text(found.columns[i]): row.name for row in found.rows for i, cell in enumerate(row.cells) if cell.best}
        assert best["found at 8,192, %"] == "SW"
        assert best["loss at 4,096"] == "SW"
        assert best["loss"] == "HAX"

    def test_every_task_by_length(self, face: FaceOff) -> None:
        found = table_of(face, "language-suite")
        assert found.corner == "task, tokens"
        assert found.columns == (*(row.name for row in face.ranked("language")), "guesser", "chance")
        assert [row.name for row in found.rows] == [f"{task}, {n:,}" for task in TASKS for n in LENGTHS]
        lines = {row.name: row.cells for row in found.rows}
        cells = lines["joint-recall, 8,192"]
        assert text(cells[0].text) == "9.6 ± 0.7"  # 90 % of 45 %, quartered; the second seed has nine tenths
        assert [cell.best for cell in cells] == [True] + [False] * 11
        assert (cells[-2].text, cells[-1].text) == ("25.0", "2.0")
        assert lines["needle-noise, 2,048"][-2].text == ""
        assert "Guesser: " in found.note
        assert "10 prompts at each depth and seed" in found.note

    def test_what_is_found_by_place(self, face: FaceOff) -> None:
        found = table_of(face, "language-places")
        assert found.columns == tuple(row.name for row in face.ranked("language"))
        names = ("beginning", "middle", "end")
        assert [row.name for row in found.rows] == [f"{n:,}, {place}" for n in LENGTHS for place in names]
        cell = found.rows[-1].cells[0]
        # Two tasks find 90 % of a quarter at the end, joint recall half of it, the second seed nine tenths; the task
        # without a place is not in it.
        assert text(cell.text) == "17.8 ± 1.3"
        assert cell.best
        assert float(text(found.rows[-3].cells[0].text).split()[0]) == pytest.approx(0.8 * 17.8, abs=0.1)

    def test_one_place_alone_has_no_table(self, fresh: Path) -> None:
        def once(results: dict[str, Any]) -> None:
            suite = results["details"]["suite"]
            suite["rows"] = [case for case in suite["rows"] if case["depth"] in (None, 0.5)]

        for row in FEW:
            changed(fresh, "language", row, once)
        assert [table.group for table in tables(load_faceoff(fresh))] == ["language", "language-suite"]

    def test_where_nothing_is_found_nothing_is_best(self, tmp_path: Path) -> None:
        write_languages(tmp_path, rows=FEW, skill=dict.fromkeys(FEW, 0.0))
        face = load_faceoff(tmp_path)
        assert (
            "At 8,192 tokens, 4 times the trained length, no row finds any of the suite's answers."
            in sentences(face)[0]
        )
        assert "are level, at 2.502 nats" in sentences(face)[0]
        assert not any(cell.best for row in table_of(face, "language-suite").rows for cell in row.cells)

    def test_without_lengths_or_questions(self, fresh: Path) -> None:
        def bare(results: dict[str, Any]) -> None:
            results["metrics"] = {"loss": results["metrics"]["loss"]}
            results["details"] = {}

        for row in FEW:
            changed(fresh, "language", row, bare)
        face = load_faceoff(fresh)
        assert [found.group for found in tables(face)] == ["language"]
        assert [text(name) for name in table_of(face).columns[:2]] == ["loss", "parameters"]
        assert [plate.title for plate in language_plates(face, "language")] == [
            *("How well text is foretold", "How it was learned")
        ]
        assert len(sentences(face)[0].split(". ")) == 3

    def test_rows_without_results_stand_below(self, fresh: Path) -> None:
        (fresh / "language" / "SW" / "seed1" / "results.json").unlink()
        for path in (fresh / "language" / "HAX").glob("seed*/results.json"):
            path.unlink()
        found = table_of(load_faceoff(fresh))
        assert [(row.name, row.form) for row in found.rows] == [("SW", "row"), ("none", "row"), ("HAX", "waiting")]
        assert found.rows[-1].cells[0].text == "seed 0: unfinished, at step 300; seed 1: unfinished, at step 300"
        assert {len(row.cells) for row in found.rows} == {len(found.columns)}

    def test_in_a_terminal_of_eighty_columns(self, directory: Path) -> None:
        buffer = io.StringIO()
        Console(file=buffer, width=80).print(terminal_table(directory))
        shown = text(buffer.getvalue())
        assert re.search(r"HAX +2\.322 ± 0\.003 +2\.314 ± 0\.003 +17\.4 ± 1\.3 +773\.4 KiB", shown)
        assert "needle-noise" not in shown

    def test_each_is_published_by_its_name(
        self, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("recollect.eval.report.publish.write_report", lambda directory: directory)  # it is there
        (tmp_path / "docs").mkdir()
        page = tmp_path / "docs" / "language.md"
        page.write_text(
            "<!-- results language-micro language -->\n<!-- end results -->\n"
            "<!-- results language-micro language-suite -->\n<!-- end results -->\n"
        )
        publish(written, tmp_path)
        first, second = page.read_text().split("<!-- end results -->")[:2]
        assert "| HAX | **2.322 ± 0.003** |" in first
        assert "needle-noise" not in first
        assert "| task, tokens | HAX |" in second
        assert "| multi-key, 8,192 | **19.2 ± 1.4** |" in second
        assert "> On text, HAX." in second
        with pytest.raises(RunError, match="no table 'language-suit'; did you mean 'language-suite'"):
            markdown_tables(written, "language-suit")

    def test_rates_are_compared_to_three_digits(self, fresh: Path) -> None:
        for row in FEW:
            for i, lr in enumerate((0.001, 0.003)):
                shutil.copytree(fresh / "language" / row, fresh / "language" / row / f"lr{lr:g}", ignore=_only_seeds)
                for seed in (0, 1):
                    path = fresh / "language" / row / f"lr{lr:g}" / f"seed{seed}" / "results.json"
                    results = json.loads(path.read_text())
                    results["validation"]["value"] = 2.3401 + 0.002 * i
                    path.write_text(json.dumps(results))
        config = json.loads((fresh / "faceoff.json").read_text())
        (fresh / "faceoff.json").write_text(json.dumps({**config, "lrs": [0.001, 0.003]}))
        (found,) = rate_tables(load_faceoff(fresh))
        assert found.title == "Learning rates tried: text"
        cells = found.rows[0].cells
        assert [cell.best for cell in cells] == [True, False]
        assert text(cells[0].text).startswith("2.340 ± 0.000 (test 2.482)")


def _only_seeds(path: str, names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("lr")}


class TestWords:
    def test_who_leads_what_attention_brings_and_what_is_found(self, face: FaceOff) -> None:
        assert answer(face) == ["On text, HAX."]
        (said,) = sentences(face)
        assert text(said) == (
            "On text, HAX has the lowest loss, 2.322 ± 0.003 nats per token of held-out text, recommended 2.342 and "
            "the last, D, 2.492. Attention takes 0.160 nats off the loss: HAX 2.322 against 2.482 of none, the same "
            "model without it (none-longer 2.470). At 8,192 tokens, 4 times the trained length, HAX and recommended "
            "find most of the suite's answers, 17.4 ± 1.3 % at best, none 1.9 %, D 1.0 %. HAX also carries the "
            "largest state, 773.4 KiB per sequence."
        )

    def test_losses_within_a_hundredth_of_a_nat_are_level(self, tmp_path: Path) -> None:
        skill = {"none": 0.5, "SW": 0.53, "HAX": 0.54}  # 2.400, 2.394, 2.392
        face = load_faceoff(write_languages(tmp_path / "a", rows=FEW, skill=skill, seeds=1))
        assert answer(face) == ["On text, HAX, SW and none."]
        said = text(sentences(face)[0])
        assert "HAX, SW and none are level, at 2.392 to 2.400 nats" in said
        assert "Attention makes no clear difference to the loss: HAX 2.392 against 2.400 of none" in said
        skill["none"] = 0.48
        face = load_faceoff(write_languages(tmp_path / "b", rows=FEW, skill=skill, seeds=1))
        assert answer(face) == ["On text, HAX and SW."]

    def test_many_that_are_level_are_counted(self, tmp_path: Path) -> None:
        rows = ("none", "SW", "KS", "LSH", "HAX", "D")
        level = dict.fromkeys(rows, 0.5)
        face = load_faceoff(write_languages(tmp_path / "a", rows=rows, skill={**level, "D": 0.1}, seeds=1))
        assert answer(face) == ["On text, 5 of 6 backbones are level."]

    def test_attention_that_harms(self, tmp_path: Path) -> None:
        skill = {"none": 0.9, "SW": 0.1, "HAX": 0.5}
        face = load_faceoff(write_languages(tmp_path, rows=FEW, skill=skill, seeds=1))
        said = text(sentences(face)[0])
        assert "On text, none has the lowest loss, 2.320 nats" in said
        assert "Attention adds 0.080 nats to the loss: HAX 2.400 against 2.320 of none" in said

    def test_little_more_than_chance_is_called_so(self, tmp_path: Path) -> None:
        skill = {"none": 0.1, "SW": 0.2, "HAX": 0.3}
        face = load_faceoff(write_languages(tmp_path, rows=FEW, skill=skill, seeds=1))
        said = text(sentences(face)[0])
        assert "no row finds clearly more than chance: HAX, the first, 6.1 % of the suite's answers" in said

    def test_several_groups_are_told_apart(self, tmp_path: Path) -> None:
        face = load_faceoff(write_languages(tmp_path, rows=FEW, groups=("code", "prose")))
        assert answer(face) == ["On text, HAX leads or is level in 2 of 2."]
        assert [said[:23] for said in sentences(face)] == ["On text (code), HAX has", "On text (prose), HAX ha"]
        assert [found.title for found in tables(face)] == [
            f"Text: {name}{table}"
            for name in ("code", "prose")
            for table in ("", ", what is found where", ", every task of the long-context suite")
        ]


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A world and a text."""
    worlds = write_worlds(tmp_path / "worlds", rows=("haxwm",), envs={"maze-9x9": ENVS["maze-9x9"]})
    return merged(tmp_path / "face", worlds, write_languages(tmp_path / "text", rows=FEW, seeds=1))


class TestOtherFamilies:
    def test_they_stand_beside_each_other(self, both: Path) -> None:
        face = load_faceoff(both)
        assert answer(face) == ["In worlds, haxwm.", "On text, HAX."]
        assert [found.group for found in tables(face)] == [
            *("maze-9x9", "language", "language-places", "language-suite")
        ]
        world, text_ = chapters(face, {})
        assert (world.title, text_.title) == ("Worlds: maze-9x9", "Text")
        assert world.browsers
        assert not text_.browsers
        assert not text_.reels
        assert text_.plates[0].title == "How well text is foretold"
        assert summary_png(face, "?", "!").startswith(b"\x89PNG")

    def test_families_that_agree_share_a_sentence(self, both: Path) -> None:
        face = load_faceoff(both)
        groups = {
            group: tuple(replace(row, name="HAX" if row.name == "haxwm" else row.name) for row in rows)
            for group, rows in face.groups.items()
        }
        assert answer(replace(face, groups=groups)) == ["In worlds and on text, HAX."]

    def test_problems_that_cannot_be_compared(self, fresh: Path) -> None:
        config = json.loads((fresh / "faceoff.json").read_text())
        config["runs"][1]["problem"] = {"kind": "recall"}
        (fresh / "faceoff.json").write_text(json.dumps(config))
        with pytest.raises(RunError, match="group 'language' holds language and recall problems"):
            load_faceoff(fresh)

    def test_names_of_patterns_are_not_read_as_mixers(self, tmp_path: Path) -> None:
        recall = write_many_rows(tmp_path / "recall")
        alone = load_faceoff(recall)
        text_rows = write_languages(tmp_path / "text", seeds=1)
        face = load_faceoff(merged(tmp_path / "face", recall, text_rows))
        assert mixers(face) == mixers(alone)
        name = alone.row_names[3]
        assert look(face, name) == look(alone, name)
        assert [called for called, _ in legend(face, "language")] == list(ROWS)
        assert len({look(face, row).colour for row in ROWS}) == 10
        assert len(panels(face, face.ranked("language"))) == 1


class TestFigures:
    def test_dots_are_where_the_losses_are(self, face: FaceOff) -> None:
        ax = drawn(draw_loss_dots, face=face, group="language")
        dots = [float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
        assert dots == pytest.approx(sorted((loss_of(skill, 0) + STEP / 2 for skill in SKILL.values()), reverse=True))
        assert [name.get_text() for name in ax.get_yticklabels()][-1] == "HAX"
        assert ax.get_xscale() == "linear"
        assert {note.get_text() for note in ax.texts} >= {"2.322", "2.492"}
        low, high = ax.get_xlim()
        assert low < min(dots)
        assert high > max(dots)

    def test_nats_by_position(self, face: FaceOff) -> None:
        ax = drawn(draw_nats, face=face, group="language")
        hax = next(line for line in ax.lines if line.get_color() == PRINT.row(face, "HAX"))
        x, y = hax.get_data()
        assert (len(x), x[0]) == (9, pytest.approx((16 * 31) ** 0.5))
        assert y[6] == pytest.approx(loss_of(0.9, 0) + STEP / 2 + 2 / 1024**0.6 - 0.09)
        assert len(ax.collections) == 10, "a band over the seeds of every row"
        assert f"trained at {TRAINED:,}" in {note.get_text() for note in ax.texts}
        assert set(ROWS) <= {note.get_text() for note in ax.texts}
        plain = next(row for row in face.groups["language"] if row.name == "none")
        less = drawn(draw_nats, face=face, group="language", less=plain)
        assert "none" not in {note.get_text() for note in less.texts}
        assert less.get_ylabel() == "nats per token, less those of none"

    def test_shares_by_length(self, face: FaceOff) -> None:
        ax = drawn(draw_found, face=face, group="language")
        lines = [line for line in ax.lines if list(line.get_xdata()) == list(LENGTHS)]
        assert len(lines) == 10 + 1  # the last is chance
        assert list(lines[-1].get_ydata()) == pytest.approx([2.0] * 3)
        stat = share_found(face.ranked("language")[0], 2048)
        assert stat is not None
        assert lines[0].get_ydata()[0] == pytest.approx(100 * stat.mean)
        assert ax.get_ylim() == (0, 105)
        bars = drawn(draw_found_bars, face=face, group="language", length=8192)
        assert max(bar.get_width() for bar in bars.patches) == pytest.approx(17.36, abs=0.01)
        assert bars.get_xlim()[1] < 30, "an axis to 100 % would hide what little is found"

    def test_maps_of_a_row(self, face: FaceOff) -> None:
        rows = [row for row, _ in chosen(face.ranked("language"))]
        ax = drawn(draw_suite_maps, row=rows[0], shown=rows, trained=TRAINED)
        written = [note.get_text() for note in ax.texts]
        assert [name for name in written if name in TASKS] == list(TASKS)
        assert [name.get_text() for name in ax.get_yticklabels()] == ["0 %", "50 %", "100 %"] * 3 + ["any"]
        assert [name.get_text() for name in ax.get_xticklabels()] == ["2k", "4k", "8k"]
        cells = {(round(note.get_position()[1], 1), note.get_position()[0]): note.get_text() for note in ax.texts}
        assert cells[1.0, 0] == "68"  # needle-noise at 2,048, depth 0: 0.9 x 0.8 x 0.95
        assert cells[3.0, 2] == "21"  # at 8,192, depth 1: 0.9 / 4 x 0.95
        assert [float(line.get_xdata()[0]) for line in ax.lines] == [0.5]
        filled = [patch for patch in ax.patches if patch.get_alpha() is not None]
        assert max(patch.get_alpha() for patch in filled) == pytest.approx(0.9 * 0.95)


class TestPage:
    def test_it_is_whole_and_needs_no_network(self, written: Path) -> None:
        html = (written / "report.html").read_text()
        page = Page(html)
        assert "http" not in html
        assert "script" not in page.tags
        assert len(page.ids) == len(set(page.ids))
        assert "#fe01" not in html
        # dots, nats, less none; found twice; maps of HAX and none; four curves
        assert page.tags.count("svg") == 3 + 2 + 2 + 4
        assert '<th scope="col">task, tokens</th>' in html
        assert html.count('<th scope="col">backbone</th>') == 2
        for title in ("How well text is foretold", "Where in the text it is found", "Held-out loss by steps"):
            assert title in html
        assert "frames" not in html
        assert "reward" not in html

    def test_its_curves_of_losses_have_numbers_on_their_axes(self, face: FaceOff) -> None:
        from recollect.eval.report.figures import draw_curves

        (panel,) = panels(face, face.groups["language"])
        ax = drawn(draw_curves, face=face, panel=panel, name="loss", axis="step", evaluation=True)
        assert (ax.get_yscale(), ax.get_ylabel()) == ("linear", "nats per token")

    def test_the_same_data_as_json(self, written: Path) -> None:
        data = json.loads((written / "report.json").read_text())
        assert data["headlines"] == {"language": "loss"}
        assert data["lines"]["chance"] is None
        row = next(row for row in data["groups"]["language"] if row["row"] == "HAX")
        assert [len(suite["rows"]) for suite in row["suite"]] == [30, 30]
        assert row["by_position"][0]["8192"]["geometric"][-1]["to"] == 8192
        assert row["trained_params"] == 2_170_000

    def test_the_picture(self, written: Path) -> None:
        from PIL import Image

        with Image.open(written / "summary.png") as picture:
            assert picture.size == (1600, 900)
        titles = [part.title for part in _parts(load_faceoff(written), [])]
        assert titles == ["Loss on held-out text", "Found in contexts of 8,192 tokens"]

    def test_damage_is_named(self, fresh: Path) -> None:
        changed(fresh, "language", "SW", lambda results: results["metrics"].pop("loss"))
        with pytest.raises(RunError, match=r"SW/seed0/results\.json' is damaged: metric 'loss' is missing"):
            write_report(fresh)
