"""The face-off of language models: every row goes on from one base, as far, on the same text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from recollect.eval.report.write import write_report
from recollect.models.beside import PATTERNS
from recollect.recipes import load_recipe
from recollect.train.language import LanguageConfig
from recollect.train.loop import train


@pytest.mark.parametrize("name", ["language-micro", "language-mini", "language-smoke"])
def test_rows_differ_in_their_attention_alone(name: str) -> None:
    runs = {run.row: run for run in load_recipe(name).runs}
    beside = ("HAX-follow", "LSH-follow", "HAX-published", "recommended")
    assert list(runs) == ["none", "none-longer", *PATTERNS, *beside]
    plain = runs["none"]
    assert isinstance(plain.problem, LanguageConfig)
    for row, run in runs.items():
        assert isinstance(run.problem, LanguageConfig)
        assert replace(run.problem, beside=None) == plain.problem
        assert (run.problem.beside is None) == row.startswith("none")
        assert (run.train == plain.train) == (row != "none-longer")
    assert 1.1 * plain.train.steps < runs["none-longer"].train.steps < 2 * plain.train.steps
    budgets = {row: run.problem.beside.n_keys for row, run in runs.items() if row.split("-")[0] in PATTERNS}
    assert len(set(budgets.values())) == 1, "every pattern of the paper has the same budget"


def test_two_rows_train_are_asked_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    face = load_recipe("language-smoke")
    runs = tuple(run for run in face.runs if run.row in ("none", "HAX"))
    found = {}
    for run in runs:
        results = train(run, tmp_path / "faceoff" / run.group / run.row / "seed0")
        found[run.row] = results["metrics"]
        assert results["details"]["suite"]["averages"]
    assert set(found["none"]) == set(found["HAX"]) >= {"loss", "loss_256", "needle-noise_256"}
    # Both go on from the base; attention's gates are open from the start.
    assert found["HAX"]["loss"] == pytest.approx(found["none"]["loss"], abs=0.5)
    assert found["HAX"]["loss"] != found["none"]["loss"]
    bases = [path for path in (tmp_path / "data").glob("model-*") if path.is_dir()]
    assert len(bases) == 1, "the base is trained once"
    from recollect.core.config import to_dict

    described = {"name": face.name, "title": face.title, "runs": [to_dict(run) for run in runs], "seeds": [0]}
    (tmp_path / "faceoff" / "faceoff.json").write_text(json.dumps(described))
    page = write_report(tmp_path / "faceoff").read_text()
    assert "On text" in page
    assert "Where in the text it is found" in page
