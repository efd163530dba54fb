"""Several learning rates for every row: where the runs lie, which rate is chosen, and that tests never choose it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fragile_problem import fragile_run, sound
from recollect.cli import main
from recollect.core.config import from_dict, to_dict
from recollect.core.errors import ConfigError, RunError
from recollect.eval.report.data import FaceOff as Read
from recollect.eval.report.data import Row
from recollect.eval.report.publish import publish
from recollect.eval.report.rates import rate_tables, undecided
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.selection import validation_score
from recollect.eval.report.write import markdown_tables, result_rows, write_report
from recollect.train.run import FaceOff
from recollect.train.sweep import prepare, run_faceoff


def tried(*lrs: float, seeds: tuple[int, ...] = (0,)) -> FaceOff:
    return replace(sound(), lrs=lrs, seeds=seeds)


def write(
    directory: Path,
    scores: dict[str, list[tuple[float | None, float] | None]],
    *,
    diverged: str = "",
    stated: bool = True,
) -> Path:
    """A face-off directory of one row: per rate and seed (validation, test), or None for a run that is half done."""
    seeds = list(range(max(map(len, scores.values()))))
    runs = [{"group": "recall", "row": "mamba2", "seed": 0}]
    config = {"name": "rates", "title": "Rates", "runs": runs, "seeds": seeds, "lrs": [float(lr) for lr in scores]}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "faceoff.json").write_text(json.dumps(config))
    for lr, found in scores.items():
        for seed, pair in enumerate(found):
            folder = directory / f"recall/mamba2/lr{lr}/seed{seed}"
            folder.mkdir(parents=True)
            validation, test = pair or (0.999, 0.999)
            lines: list[dict[str, Any]] = [{"step": 2, "loss": 1.0}]
            if validation is not None:
                lines += [{"step": 2, "eval": {"accuracy": 0.123}}, {"step": 4, "eval": {"accuracy": validation}}]
            if pair is not None:
                lines += [{"step": 6, "eval": {"accuracy": test}}]
                facts = {"params": 9, "state_bytes": 8, "steps": 6, "wall_s": 1.0, "seed": seed, "headline": "accuracy"}
                results = {**facts, "group": "recall", "row": "mamba2", "metrics": {"accuracy": test}}
                if stated:
                    results["validation"] = {"step": 4, "metric": "accuracy", "value": validation}
                (folder / "results.json").write_text(json.dumps(results))
            elif lr == diverged:
                (folder / "bad_batch-00000005.safetensors").write_bytes(b"")
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def row_of(face: Read) -> Row:
    (row,) = face.groups["recall"]
    return row


def test_every_row_gets_every_rate_and_its_first_seed_early() -> None:
    face = tried(1e-3, 3e-3, seeds=(0, 1))
    places = [face.place(run) for run in face.expanded()]
    assert places == [
        f"recall/{row}/{lr}/seed{seed}" for seed in (0, 1) for lr in ("lr0.001", "lr0.003") for row in ("first", "last")
    ]
    assert {run.train.lr for run in face.expanded()} == {1e-3, 3e-3}
    assert all(face.place(run).split("/")[2] == f"lr{run.train.lr:g}" for run in face.expanded())


def test_without_rates_nothing_is_other_than_before() -> None:
    face = replace(sound(), seeds=(0, 1))
    assert face.expanded() == tuple(replace(run, seed=seed) for seed in (0, 1) for run in face.runs)
    assert [face.place(run) for run in face.expanded()] == [run.name for run in face.expanded()]
    old = to_dict(face)
    del old["lrs"]
    assert from_dict(FaceOff, old) == face, "a face-off written before there were rates"


@pytest.mark.parametrize("lrs", [(0.0,), (-1e-3,), (1e-3, 1e-3), (0.001, 0.00100000001), (float("inf"),)])
def test_rates_that_mean_nothing(lrs: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="positive learning rates that differ"):
        tried(*lrs)


def test_a_choice_needs_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = replace(sound(), runs=(fragile_run("first"), fragile_run("last", eval_every=0)))
    assert replace(blind, lrs=(1e-3,)).lrs == (1e-3,), "nothing to choose"
    with pytest.raises(ConfigError, match=r"row 'last' has train\.eval_every=0"):
        replace(blind, lrs=(1e-3, 3e-3))
    words = ["faceoff", "fragile_problem:sound", "--out", str(tmp_path / "x"), "--lrs", "1e-3", "3e-3"]
    assert main([*words, "train.eval_every=0"]) == 2
    assert "never validated" in capsys.readouterr().err
    assert main([*words, "train.lr=1"]) == 2
    error = capsys.readouterr().err
    assert "give --lrs instead of train.lr=" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_rates_and_seeds_may_be_added_and_rates_not_left_out(tmp_path: Path) -> None:
    first = run_faceoff(tried(1e-2), tmp_path)
    assert {job.status for job in first} == {"finished"}
    more = prepare(tried(1e-2, 3e-2, seeds=(0, 1)), tmp_path)
    assert sorted(job.name for job in more if job.status == "finished") == sorted(job.name for job in first)
    assert len(more) == 8
    with pytest.raises(RunError, match=r"left out here \(0\.03\); rates may only be added: --lrs 0\.01 0\.03"):
        prepare(tried(1e-2), tmp_path)
    with pytest.raises(RunError, match=r"left out here \(0\.01, 0\.03\)"):
        prepare(sound(), tmp_path)
    with pytest.raises(RunError, match=r"runs\.0\.train\.steps: 6 -> 7"):
        prepare(tried(1e-2, 3e-2).overridden(["train.steps=7"]), tmp_path)


def test_the_command_line_sets_rates_and_the_report_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recollect.cli.commands.signal.signal", lambda *_: None)
    words = ["faceoff", "fragile_problem:sound", "--out", str(tmp_path), "--lrs", "1e-6", "1e-2"]
    assert main([*words, "--seeds", "0", "1"]) == 0
    assert "provisional" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "recall/first").iterdir()) == ["lr0.01", "lr1e-06"]
    assert json.loads((tmp_path / "recall/first/lr0.01/seed1/config.json").read_text())["train"]["lr"] == 1e-2
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["row"], row["lr"], row["n_seeds"]) for row in rows] == [("first", 0.01, 2), ("last", 0.01, 2)]
    page = (tmp_path / "report.html").read_text()
    assert page.count("Learning rates tried: words") == 1
    assert 'id="title-recall-rates"' in page
    data = json.loads((tmp_path / "report.json").read_text())["groups"]["recall"][0]
    assert [trial["lr"] for trial in data["trials"]] == [1e-6, 1e-2]
    assert (data["lr"], data["provisional"]) == (1e-2, False)
    assert "Learning rates" not in markdown_tables(tmp_path)


@pytest.mark.parametrize("stated", [True, False])
def test_validation_chooses_and_the_tests_of_that_rate_are_reported(tmp_path: Path, stated: bool) -> None:
    """The tests say the opposite everywhere, and the last line of every log is a test."""
    scores: dict[str, list[tuple[float | None, float] | None]] = {
        "0.001": [(0.5, 1.0), (0.6, 1.0), (0.7, 1.0)],
        "0.003": [(0.9, 0.0), (0.3, 0.2), (0.9, 0.1)],
        "0.01": [(0.6, 0.9), (0.6, 0.9), (0.6, 0.9)],
    }
    face = load_faceoff(write(tmp_path, scores, stated=stated))
    row = row_of(face)
    assert (row.lr, row.provisional) == (0.003, False)
    assert [run.folder.parent.name for run in row.runs] == ["lr0.003"] * 3
    assert row.score is not None
    assert row.score.mean == pytest.approx(0.1)
    means = [trial.validation.mean for trial in row.trials if trial.validation]
    assert means == pytest.approx([0.6, 0.7, 0.6])
    assert [trial.test.mean for trial in row.trials if trial.test] == pytest.approx([1.0, 0.1, 0.9])
    assert [trial.finished for trial in row.trials] == [3, 3, 3]
    (published,) = result_rows(tmp_path)
    assert published["lr"] == 0.003
    assert published["metrics"]["accuracy"] == pytest.approx(0.1)


def test_whatever_the_tests_say_the_choice_stays(tmp_path: Path) -> None:
    chosen: set[float | None] = set()
    for i, (a, b) in enumerate([(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (float("nan"), 1.0)]):
        face = load_faceoff(write(tmp_path / str(i), {"0.1": [(0.2, a)], "0.01": [(0.3, b)]}, stated=bool(i % 2)))
        chosen.add(row_of(face).lr)
    assert chosen == {0.01}


def test_of_equals_the_first_is_chosen(tmp_path: Path) -> None:
    assert row_of(load_faceoff(write(tmp_path, {"0.1": [(0.2, 0.0)], "0.01": [(0.2, 1.0)]}))).lr == 0.1


def test_a_rate_that_lacks_a_seed_is_not_chosen_yet_and_the_row_says_so(tmp_path: Path) -> None:
    face = load_faceoff(write(tmp_path, {"0.1": [(0.2, 0.3), (0.2, 0.3)], "0.01": [(0.9, 0.9), None]}))
    row = row_of(face)
    assert (row.lr, row.provisional, face.provisional) == (0.1, True, [row])
    assert [trial.finished for trial in row.trials] == [2, 1]
    line = "recall/mamba2: learning rate 0.1 is provisional (2 of 2 at 0.1, 1 of 2 at 0.01 seeds finished)"
    assert undecided(tmp_path) == [line]
    (table,) = rate_tables(face)
    assert "mamba2: learning rate 0.1 is provisional" in table.note
    shown = [cell.text.replace("\u00a0", " ") for cell in table.rows[0].cells]
    assert shown == ["20.0 ± 0.0 (test 30.0)", "90.0 (test 90.0) 1 of 2 seeds"]
    assert [cell.best for cell in table.rows[0].cells] == [True, False]
    write_report(tmp_path)
    with pytest.raises(RunError, match="mamba2 at another learning rate"):
        publish(tmp_path, tmp_path)


def test_while_no_rate_is_complete_the_best_so_far_is_shown(tmp_path: Path) -> None:
    row = row_of(load_faceoff(write(tmp_path, {"0.1": [(0.2, 0.3), None], "0.01": [(0.9, 0.1), None]})))
    assert (row.lr, row.provisional) == (0.01, True)


def test_a_rate_that_diverged_is_out_and_nothing_waits_for_it(tmp_path: Path) -> None:
    scores: dict[str, list[tuple[float | None, float] | None]] = {
        "0.1": [(0.99, 0.99), None],
        "0.01": [(0.5, 0.4), (0.5, 0.4)],
    }
    face = load_faceoff(write(tmp_path, scores, diverged="0.1"))
    assert (row_of(face).lr, row_of(face).provisional) == (0.01, False)
    (table,) = rate_tables(face)
    assert table.rows[0].cells[0].text.endswith("diverged")


def test_one_rate_needs_no_validation(tmp_path: Path) -> None:
    row = row_of(load_faceoff(write(tmp_path, {"0.01": [(None, 0.4)]})))
    assert (row.lr, row.provisional) == (0.01, False)
    assert not rate_tables(load_faceoff(tmp_path))


def test_without_any_validation_nothing_is_chosen(tmp_path: Path) -> None:
    row = row_of(load_faceoff(write(tmp_path, {"0.1": [(None, 1.0)], "0.01": [(None, 0.4)]}, stated=False)))
    assert (row.lr, row.provisional) == (None, True)
    assert "no learning rate has a validation score yet" in undecided(tmp_path)[0]


def test_what_counts_as_validation() -> None:
    log = [{"step": 2, "eval": {"a": 0.1}}, {"step": 4, "eval": {"a": 0.2}}, {"step": 6, "eval": {"a": 0.9}}]
    plain = {"headline": "a", "steps": 6}
    assert validation_score(plain, log) == ("a", 0.2)
    assert validation_score({**plain, "validation": None}, log) == ("a", 0.2)
    assert validation_score({**plain, "validation": {"step": 4, "metric": "a", "value": None}}, log) == ("a", 0.2)
    assert validation_score({**plain, "validation": {"step": 2, "metric": "b", "value": 0.5}}, log) == ("b", 0.5)
    assert validation_score(plain, log[2:]) is None, "only the test was logged"
    assert validation_score({"headline": "a"}, log) is None, "which line is the test is not known"
    assert validation_score({}, log) is None
    nothing = [{"step": 2, "eval": {"a": None}}]
    assert validation_score(plain, nothing) is None


def test_a_damaged_list_of_rates_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"0.1": [(0.2, 0.3)]})
    config = json.loads((tmp_path / "faceoff.json").read_text())
    (tmp_path / "faceoff.json").write_text(json.dumps({**config, "lrs": ["high"]}))
    with pytest.raises(RunError, match="'lrs' is not a list of learning rates"):
        load_faceoff(tmp_path)
