from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from recollect.core.errors import RecollectError, RunError
from recollect.eval.report import figures as report_figures
from recollect.eval.report.data import binned, mean_of_curves
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.text import answer, human_bytes, human_seconds, sentences
from recollect.eval.report.write import markdown_tables, result_rows, terminal_table, write_report

RECALL = {"mamba2+hax": (0.96, 0.98), "gru<b>": (0.22, 0.26), "mamba2": (0.60, 0.70), "s4": (0.40, 0.44)}
IMAGINED = {"mamba2+hax": (0.90, 0.94), "gru<b>": (0.49, 0.53), "mamba2": (0.60, 0.64)}
STATE = {"mamba2+hax": 12_288, "gru<b>": 512, "mamba2": 8_192, "s4": 65_536, "rssm": 2_048}


def write_run(
    directory: Path, group: str, row: str, seed: int, score: float, *, finished: bool = True, n_steps: int = 40
) -> None:
    folder = directory / group / row / f"seed{seed}"
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(2, n_steps + 1, 2):
        lines.append({"step": step, "loss": 3.0 * 0.95**step, "lr": 1e-3, "steps_per_s": 4.0})
        if step % 10 == 0:
            name = "accuracy" if group == "recall" else "imagination_accuracy"
            lines.append({"step": step, "eval": {name: score * step / n_steps}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text("{}")
    packages = {"torch": "2.13.0", "numpy": "2.4.6"}
    environment = {"python": "3.11.9", "packages": packages, "command": ["recollect", "faceoff", "demo"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    if not finished:
        return
    results: dict[str, Any] = {
        "recipe": f"demo/{group}",
        "group": group,
        "row": row,
        "seed": seed,
        "fingerprint": "abcdef012345",
        "params": 83_824,
        "state_bytes": STATE[row],
        "commit": "1a3cc03",
        "device": "cpu",
        "steps": n_steps,
        "wall_s": 100.0 + seed,
    }
    if group == "recall":
        cells = {
            "axes": ["contexts", "keys"],
            "sizes": [[c, k] for c in (2, 3, 4) for k in (2, 3)],
            "accuracy": [1.0, score, score, score / 2, score, 0.1],
            "all_correct": [1.0, score, score, 0.0, score, 0.0],
        }
        oracles = {"uniform": 0.0625, "key-majority": 0.237, "perfect": 1.0}
        results["metrics"] = {"accuracy": score, "all_correct": score**4, "binding_gap": score - 0.237, "spare": None}
        results["details"] = {"cells": cells, "oracles": oracles, "key_budget": 24 if "hax" in row else 0}
    else:
        curve = [2.0 + (1 - score) * t for t in range(8)]
        results["metrics"] = {
            "imagination_accuracy": score,
            "inference_accuracy": 0.95,
            "reconstruction_mse": 1.5,
            "generation_mse": 3.25,
        }
        results["details"] = {"context": 8, "query": 8, "width": 20, "chance": 0.5, "generation_mse_curve": curve}
        rng = np.random.default_rng(5)
        truth = np.repeat(np.repeat(rng.integers(0, 256, (2, 12, 5, 5, 3)), 4, 2), 4, 3).astype(np.uint8)
        noise = np.random.default_rng(seed + len(row)).normal(0, 120 * (1 - score), truth.shape)
        np.savez(
            folder / "arrays.npz",
            strip_truth=truth,
            strip_imagined=np.clip(truth + noise, 0, 255).astype(np.uint8),
            strip_step=np.arange(9, 21),
            strip_reward_true=np.array([1.0, 0.0]),
            strip_reward_imagined=np.array([score, 1 - score]),
        )
    (folder / "results.json").write_text(json.dumps(results))


def write_faceoff(directory: Path, recall: dict[str, Any] = RECALL, imagined: dict[str, Any] = IMAGINED) -> Path:
    """Recall: all finished. World: mamba2 lacks seed 1, rssm has one unfinished and one missing run."""
    runs = [{"group": "recall", "row": row, "seed": 0, "problem": {}, "train": {}} for row in recall]
    runs += [{"group": "world", "row": row, "seed": 0, "problem": {}, "train": {}} for row in [*imagined, "rssm"]]
    directory.mkdir(parents=True, exist_ok=True)
    config = {"kind": "faceoff", "name": "demo", "title": "Facing off <here>", "runs": runs, "seeds": [0, 1]}
    (directory / "faceoff.json").write_text(json.dumps(config))
    for row, scores in recall.items():
        for seed, score in enumerate(scores):
            write_run(directory, "recall", row, seed, score)
    for row, scores in imagined.items():
        for seed, score in enumerate(scores):
            if (row, seed) != ("mamba2", 1):
                write_run(directory, "world", row, seed, score)
    write_run(directory, "world", "rssm", 0, 0.5, finished=False)
    return directory


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_faceoff(tmp_path_factory.mktemp("shared") / "faceoff")
    write_report(directory)
    return directory


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return write_faceoff(tmp_path / "faceoff")


class Page(HTMLParser):
    """Collects sources and checks that every element that opens also closes."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.sources += [value for key in ("src", "href", "xlink:href") if (value := found.get(key))]
        self.ids += [value] if (value := found.get("id")) else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_means_and_sample_deviations_are_those_computed_by_hand(shared: Path) -> None:
    rows = {(row["group"], row["row"]): row for row in result_rows(shared)}
    hax = rows["recall", "mamba2+hax"]
    assert hax["metrics"]["accuracy"] == pytest.approx(0.97)
    assert hax["spread"]["accuracy"] == pytest.approx(0.01 * 2**0.5)  # two values 0.02 apart, n - 1 = 1
    assert (hax["n_seeds"], hax["params"], hax["state_bytes"], hax["wall_s"]) == (2, 83_824, 12_288, 100.5)
    assert (hax["recipe"], hax["commit"], hax["device"]) == ("demo/recall", "1a3cc03", "cpu")
    single = rows["world", "mamba2"]
    assert (single["n_seeds"], single["spread"], single["metrics"]["imagination_accuracy"]) == (1, {}, 0.60)
    assert ("world", "rssm") not in rows
    assert json.loads((shared / "rows.json").read_text()) == result_rows(shared)


def test_page_is_whole_and_needs_no_network(shared: Path) -> None:
    text = (shared / "report.html").read_text()
    page = Page(text)
    assert "http" not in text
    assert "@import" not in text
    assert "script" not in page.tags
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "#fe01" not in text  # every stand-in colour has become a CSS variable
    # bars, 2 scatters, gap, 4 maps, difference, whole tables, 4 curves; reward bars, horizon, 4 curves
    assert page.tags.count("svg") == 20
    assert text.count('role="img"') == 20
    assert page.tags.count("img") == 2 * 4
    assert len(page.ids) == len(set(page.ids))


def test_names_are_escaped_everywhere(shared: Path) -> None:
    text = (shared / "report.html").read_text()
    assert "gru<b>" not in text
    assert "<here>" not in text
    assert text.count("gru&lt;b&gt;") > 10
    assert "gru&lt;b>" in markdown_tables(shared)


def test_strips_decode_to_the_frames_that_were_stored(shared: Path) -> None:
    from PIL import Image

    text = (shared / "report.html").read_text()
    first = re.search(r'alt="truth: 10 frames from step 9 to 20" src="data:image/png;base64,([^"]+)"', text)
    assert first is not None
    image = np.array(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    assert image.shape == (20, 10 * 21 - 1, 4)
    stored = np.load(shared / "world" / "mamba2" / "seed0" / "arrays.npz")["strip_truth"]
    np.testing.assert_array_equal(image[:, :20, :3], stored[0, 0])
    np.testing.assert_array_equal(image[:, -20:, :3], stored[0, -1])
    assert (image[:, 20, 3] == 0).all()
    assert "reward 1" in text
    assert "predicts 0.90" in text


def test_unfinished_and_missing_runs_are_said(shared: Path) -> None:
    text = (shared / "report.html").read_text()
    assert "Not everything is in: 3 of 16 runs have not finished." in text
    assert "seed 0: unfinished, at step 40; seed 1: not started" in text
    assert "world / mamba2 / seed 1: not started" in text
    data = json.loads((shared / "report.json").read_text())
    runs = {row["row"]: [run["status"] for run in row["runs"]] for row in data["groups"]["world"]}
    assert runs["rssm"] == ["unfinished", "not started"]
    assert runs["mamba2"] == ["finished", "not started"]


def test_tables_order_rows_and_mark_the_best(shared: Path) -> None:
    recall, world = markdown_tables(shared).split("**Worlds")
    lines = [line for line in recall.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["mamba2+hax", "mamba2", "s4", "gru&lt;b>", "*context-blind*", "*uniform*"]
    assert "**97.0 ± 1.4**" in lines[2]
    assert "| 65.0 ± 7.1 |" in lines[3]
    assert "12.0 KiB" in lines[2]
    assert "| 24 |" in lines[2]
    assert "| - |" in lines[3]
    assert "largest" not in recall  # nobody reports that metric here
    assert "| 23.7 |" in recall
    assert "| *chance* | 50.0 | 50.0 |" in world
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(terminal_table(shared))
    shown = console.export_text()
    assert "97.0 ± 1.4" in shown.replace("\u00a0", " ")
    assert "gru<b>" in shown


def test_headline_follows_the_numbers(tmp_path: Path) -> None:
    def said(name: str, recall: dict[str, Any], imagined: dict[str, Any]) -> tuple[str, str]:
        face = load_faceoff(write_faceoff(tmp_path / name, recall, imagined))
        return " ".join(answer(face)), " ".join(sentences(face)).replace("\u00a0", " ")

    short, long = said("same", RECALL, IMAGINED)
    assert short == "In words and in worlds, mamba2+hax."
    assert "mamba2+hax gets 97.0 ± 1.4 % of the values right, mamba2 65.0 %" in long
    assert "a guesser that ignores the context gets 23.7 %" in long
    assert "gru<b> is not clearly better than a guesser that ignores the context." in long
    assert "gru<b> is not clearly better than chance." in long
    assert "mamba2+hax carries 12.0 KiB of state per sequence; the largest, s4, 64.0 KiB." in long

    short, long = said("other", {**RECALL, "s4": (0.99, 0.99), "mamba2+hax": (0.5, 0.5)}, {"gru<b>": (0.8, 0.8)})
    assert short == "In words, s4. In worlds, gru<b>."
    assert "s4 also carries the largest state, 64.0 KiB per sequence." in long

    short, long = said("level", {**RECALL, "s4": (0.97, 0.97)}, {"gru<b>": (0.52, 0.54), "mamba2": (0.50, 0.5)})
    assert short == "In words, mamba2+hax and s4. In worlds, none yet."
    assert "mamba2+hax and s4 are level" in long

    short, long = said("scattered", {**RECALL, "s4": (0.99, 0.5)}, {"gru<b>": (0.52, 0.54), "mamba2": (0.50, 0.5)})
    assert short == "In words, mamba2+hax. In worlds, none yet."
    assert (
        "no backbone remembers yet: gru<b>, the best, gets 53.0 ± 1.4 % of the rewards right; chance gets 50.0 %"
        in long
    )


def test_summary_picture(shared: Path) -> None:
    from PIL import Image

    image = Image.open(shared / "summary.png")
    assert image.size == (1600, 900)
    assert len(np.unique(np.array(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_same_input_gives_the_same_bytes(fresh: Path) -> None:
    names = ("report.html", "report.json", "rows.json", "summary.png")
    write_report(fresh)
    first = {name: (fresh / name).read_bytes() for name in names}
    write_report(fresh)
    assert all((fresh / name).read_bytes() == first[name] for name in names)
    assert not list(fresh.glob(".*.tmp"))


def test_colours_stay_with_their_backbone(shared: Path) -> None:
    face = load_faceoff(shared)
    palette = report_figures.PRINT
    colours = [palette.row(face, name) for name in face.row_names]
    assert face.row_names == [*RECALL, "rssm"]
    assert len(set(colours)) == len(colours)
    assert report_figures.SCREEN.row(face, "mamba2") == report_figures.SCREEN.rows[2]


def test_one_group_and_one_seed(tmp_path: Path) -> None:
    config = {"name": "small", "runs": [{"group": "recall", "row": "s4", "seed": 3}]}
    (tmp_path / "faceoff.json").write_text(json.dumps(config))
    write_run(tmp_path, "recall", "s4", 3, 0.9)
    text = write_report(tmp_path).read_text()
    assert "In words, s4." in text
    assert "One seed each" in text
    assert "±" not in text
    assert 'id="world"' not in text


def test_curves_join_a_resumed_log_and_forgive_a_cut_line(fresh: Path) -> None:
    path = fresh / "recall" / "s4" / "seed0" / "metrics.jsonl"
    lines = [{"step": 1, "loss": 4.0, "steps_per_s": 2.0}, {"step": 3, "loss": 9.0}, {"step": 3, "loss": 2.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    run = next(run for run in load_faceoff(fresh).runs if run.row == "s4" and run.seed == 0)
    steps, loss = run.curve("loss", "step")
    assert (steps.tolist(), loss.tolist()) == ([1.0, 3.0], [4.0, 2.0])
    assert run.curve("loss", "seconds")[0].tolist() == [0.5, 0.5]
    path.write_text(
        '{"step": 2, "loss": 1.0, "elapsed_s": 9.0}\n{"step": 2, "eval": {"accuracy": 0.5}, "headline": 0.5}\n'
    )
    run = next(run for run in load_faceoff(fresh).runs if run.row == "s4" and run.seed == 0)
    assert run.curve("accuracy", "seconds", evaluation=True)[0].tolist() == [9.0]
    path.write_text('{"step": 5, "lo\n{"step": 6}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl' is damaged: line 1"):
        load_faceoff(fresh)


def test_curves_of_validations_end_with_the_last_step_and_not_before_its_test(fresh: Path) -> None:
    path = fresh / "recall" / "s4" / "seed0" / "metrics.jsonl"
    scores = [(2, "valid", 0.3), (4, "valid", 0.5), (4, "test", 0.9)]
    lines = [{"step": 4, "loss": 1.0}, *({"step": n, "split": s, "eval": {"accuracy": a}} for n, s, a in scores)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = next(run for run in load_faceoff(fresh).runs if run.row == "s4" and run.seed == 0)
    steps, accuracy = run.curve("accuracy", "step", evaluation=True)
    assert (steps.tolist(), accuracy.tolist()) == ([2.0, 4.0], [0.3, 0.5])
    assert run.curve("loss", "step")[1].tolist() == [1.0]


def test_mean_of_curves_interpolates_inside_the_common_range() -> None:
    x, y = mean_of_curves([(np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])), (np.array([1.0, 4.0]), np.ones(2))])
    assert x.tolist() == [1.0, 2.0, 4.0]
    assert y.tolist() == [1.0, 1.5, 2.5]


def test_binned_keeps_the_mean() -> None:
    x = np.arange(1000.0)
    bx, by = binned(x, 3 * x, n_bins=100)
    assert bx.size == 100
    assert by.tolist() == [3 * (10 * i + 4.5) for i in range(100)]


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B"), (4096, "4.0 KiB"), (3 * 2**20, "3.0 MiB"), (2**31, "2.0 GiB"), (None, "-")]
)
def test_bytes_are_human(value: float | None, text: str) -> None:
    assert human_bytes(value).replace("\u00a0", " ") == text


@pytest.mark.parametrize(("value", "text"), [(4.25, "4.2 s"), (59, "59 s"), (200, "3 min 20 s"), (3_900, "1 h 05 min")])
def test_seconds_are_human(value: float, text: str) -> None:
    assert human_seconds(value).replace("\u00a0", " ") == text


def one_line(error: pytest.ExceptionInfo[RecollectError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_missing_directory_and_missing_faceoff(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        write_report(tmp_path / "nowhere")
    one_line(error, "nowhere", "does not exist")
    with pytest.raises(RunError) as error:
        write_report(tmp_path)
    one_line(error, "faceoff.json")


def test_no_finished_run_writes_nothing(fresh: Path) -> None:
    for path in fresh.rglob("results.json"):
        path.unlink()
    with pytest.raises(RunError) as error:
        write_report(fresh)
    one_line(error, "faceoff.json", "has finished")
    assert not (fresh / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"metrics": {"accu', "not JSON"),
        ("[]", "not a JSON object"),
        ('{"metrics": 3}', "'metrics'"),
        ('{"metrics": {"accuracy": "high"}}', "'metrics'"),
        ('{"metrics": {"loss": 1.0}}', "'accuracy' is missing"),
        ('{"metrics": {"accuracy": 1.0}, "row": "other"}', "another run"),
    ],
)
def test_damaged_results_are_named(fresh: Path, content: str, reason: str) -> None:
    (fresh / "recall" / "s4" / "seed1" / "results.json").write_text(content)
    with pytest.raises(RunError) as error:
        write_report(fresh)
    one_line(error, "recall/s4/seed1/results.json", reason)


def test_damaged_arrays_are_named(fresh: Path) -> None:
    path = fresh / "world" / "mamba2" / "seed0" / "arrays.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError) as error:
        write_report(fresh)
    one_line(error, "world/mamba2/seed0/arrays.npz", "damaged")
    np.savez(path, strip_truth=np.zeros((1, 2, 4, 4, 3)), strip_imagined=np.zeros(1), strip_step=np.arange(2))
    with pytest.raises(RunError) as error:
        write_report(fresh)
    one_line(error, "arrays.npz", "uint8 frames")
    assert not (fresh / "report.html").exists()


def test_bad_faceoff_files_are_named(fresh: Path) -> None:
    def fails(config: dict[str, Any], *parts: str) -> None:
        (fresh / "faceoff.json").write_text(json.dumps(config))
        with pytest.raises(RunError) as error:
            write_report(fresh)
        one_line(error, "faceoff.json", *parts)

    fails({"runs": []}, "no runs")
    fails({"runs": [{"row": "s4"}]}, "run 0")
    fails({"runs": [{"group": "wrold", "row": "s4"}]}, "wrold", "did you mean 'world'")
    fails({"runs": [{"group": "world", "row": "s4", "seed": "zero"}]}, "'zero'")


def test_missing_extra_says_what_to_install(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(report_figures, "import_module", absent)
    with pytest.raises(RecollectError, match=r"pip install 'recollect\[report\]'"):
        write_report(fresh)


def test_world_runs_without_strips_still_make_a_report(fresh: Path) -> None:
    for path in fresh.rglob("arrays.npz"):
        path.unlink()
    shutil.rmtree(fresh / "recall" / "s4" / "seed1")
    text = write_report(fresh).read_text()
    assert "<img" not in text
    assert "In words and in worlds, mamba2+hax." in text
