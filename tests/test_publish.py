"""Publishing fills marked blocks, writes rows and the picture, and refuses what is not finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recollect.core.errors import RunError
from recollect.eval.report.publish import publish
from recollect.eval.report.write import answer_of
from recollect.recipes import load_recipe
from recollect.train.sweep import run_faceoff

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def test_a_face_off_is_published_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    whole = load_recipe("demo-smoke")
    face = replace(whole, runs=(whole.pick("mamba2", "recall"), whole.pick("gru", "world")))
    directory, project = tmp_path / "face", tmp_path / "project"
    run_faceoff(face, directory, workers=2)

    (project / "docs").mkdir(parents=True)
    marked = "before\n<!-- results demo-smoke -->\noutdated\n<!-- end results -->\nafter\n"
    (project / "README.md").write_text(marked)
    (project / "docs" / "other.md").write_text("<!-- results another -->\nkept\n<!-- end results -->\n")
    written = publish(directory, project)
    rows = json.loads((project / "results" / "demo-smoke.json").read_text())
    assert {row["row"] for row in rows} == {"mamba2", "gru"}
    text = (project / "README.md").read_text()
    assert text.startswith("before\n<!-- results demo-smoke -->\n")
    assert text.endswith("<!-- end results -->\nafter\n")
    assert "outdated" not in text
    assert answer_of(directory) in text
    assert f"{100 * rows[0]['metrics']['accuracy']:.1f}" in text
    assert (project / "docs" / "demo-smoke.png").read_bytes().startswith(b"\x89PNG")
    assert (project / "docs" / "other.md").read_text().count("kept") == 1
    assert {path.name for path in written} == {"demo-smoke.json", "demo-smoke.png", "README.md"}

    publish(directory, project)
    assert (project / "README.md").read_text() == text

    marked = "<!-- results demo-smoke world -->\noutdated\n<!-- end results -->\n"
    (project / "docs" / "other.md").write_text(marked)
    publish(directory, project)
    one = (project / "docs" / "other.md").read_text()
    assert "| gru |" in one
    assert "| mamba2 |" not in one
    assert (project / "README.md").read_text() == text
    (project / "docs" / "other.md").write_text(marked.replace("world", "worlds"))
    with pytest.raises(RunError, match="no table 'worlds'; did you mean 'world'"):
        publish(directory, project)
    (project / "docs" / "other.md").unlink()

    (directory / "world" / "gru" / "seed0" / "results.json").unlink()
    before = (project / "results" / "demo-smoke.json").read_bytes()
    with pytest.raises(RunError, match=r"is not finished .*gru seed 0"):
        publish(directory, project)
    assert (project / "results" / "demo-smoke.json").read_bytes() == before
