"""The command line: fast help, one line for every mistake, and what each command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import recollect
from recollect.cli import arguments, main
from recollect.core.errors import RecollectError
from recollect.train.loop import StoppedError, train
from toy_problem import toy_run

TOY = "toy_problem:faceoff"
COMMANDS = ["list", "train", "resume", "eval", "imagine", "faceoff", "report", "bench", "data", "envs"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    train(toy_run(), directory)
    return directory


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must end in exit code 2 and one line on stderr; returns that line."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("recollect: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_help_of_every_command_shows_examples_and_never_imports_torch() -> None:
    """In one process, for all of them: what help costs is what it imports."""
    code = (
        "import sys, io, contextlib\n"
        "from recollect.cli import main\n"
        f"for words in {[[], *[[command] for command in COMMANDS]]!r}:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        try: main([*words, '--help'])\n"
        "        except SystemExit as leave: assert leave.code == 0, words\n"
        "    text = out.getvalue()\n"
        "    assert 'Examples' in text, words\n"
        "    assert not words or f'recollect {words[0]} ' in text.split('Examples:')[1], words\n"
        "heavy = {'torch', 'numpy', 'gymnasium', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_top_level_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"• {command} " in text for command in COMMANDS)


def test_the_entry_point_and_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "recollect", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"recollect {recollect.__version__}\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["list", "layrs"], ["train", "demo"], ["bench", "speed"]])
def test_what_does_not_parse_exits_2_and_points_to_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(words)
    assert leave.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_assignments_may_stand_anywhere() -> None:
    expected = ("train.steps=3", "train.lr=1")
    for words in (
        ["faceoff", "demo", "--seeds", "0", "1", "train.steps=3", "train.lr=1"],
        ["faceoff", "demo", "train.steps=3", "--seeds", "0", "1", "train.lr=1"],
        ["faceoff", "train.steps=3", "train.lr=1", "demo", "--seeds", "0", "1"],
    ):
        assert arguments.parse(words) == arguments.FaceOff("demo", expected, seeds=(0, 1))


def test_mistakes_in_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert "unknown recipe 'demoo'; did you mean 'demo'?" in fails(capsys, "train", "demoo", "--row", "gru", *out)
    assert "no row 'god'; did you mean 'good'?" in fails(capsys, "train", TOY, "--row", "god", *out)
    assert "no row 'good' in group 'world'" in fails(capsys, "train", TOY, "--row", "good", "--group", "world", *out)
    assert "unknown key 'lrr'; did you mean 'lr'?" in fails(capsys, "train", TOY, "--row", "good", "train.lrr=1", *out)
    assert "unknown key 'stps'; did you mean 'steps'?" in fails(capsys, "faceoff", TOY, "train.stps=1", *out)
    assert "expected int, got 'many'" in fails(capsys, "faceoff", TOY, "train.steps=many", *out)
    assert "train.steps must be at least 1" in fails(capsys, "train", TOY, "--row", "good", "train.steps=0", *out)
    assert "no module 'no_such_module'" in fails(capsys, "faceoff", "no_such_module:f", *out)
    assert "has no function 'nothing'" in fails(capsys, "faceoff", "toy_problem:nothing", *out)
    assert "returned int, not a FaceOff" in fails(capsys, "faceoff", "toy_problem:not_a_faceoff", *out)
    assert "distinct seeds" in fails(capsys, "faceoff", TOY, "--seeds", "1", "1", *out)
    assert "use cpu or cuda" in fails(capsys, "train", TOY, "--row", "good", "--device", "tpu", *out)
    assert "unknown layer 'gruu'; did you mean 'gru'?" in fails(capsys, "bench", "layers", "--layers", "gruu")
    assert not (tmp_path / "run").exists(), "a mistake left something behind"


def test_mistakes_in_directories(capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: Path) -> None:
    missing = str(tmp_path / "missing")
    for words in (["eval", missing], ["resume", missing], ["imagine", missing]):
        assert "missing/config.json does not exist" in fails(capsys, *words)
    assert "missing" in fails(capsys, "report", missing)
    assert "only world models imagine" in fails(capsys, "imagine", str(trained))
    changed = fails(capsys, "train", TOY, "--row", "good", "--out", str(trained), "train.lr=0.5")
    assert "train.lr: 0.01 -> 0.5" in changed
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in fails(capsys, "eval", str(tmp_path))
    with pytest.raises(StoppedError):
        train(toy_run(), tmp_path / "run", stop=lambda: True)
    (tmp_path / "run/checkpoints/step-00000001.safetensors").write_bytes(b"short")
    assert "delete" in fails(capsys, "resume", str(tmp_path / "run"))
    assert "delete" in fails(capsys, "eval", str(tmp_path / "run"))


def test_a_loss_that_is_not_finite_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", TOY, "--row", "bad", "--out", str(tmp_path), "train.log_every=100"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "loss is nan at step 20" in error


def test_train_resume_and_eval_print_the_metrics(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trained: Path
) -> None:
    directory = tmp_path / "run"
    words = [
        "train",
        TOY,
        "--row",
        "wide",
        "--seed",
        "3",
        "--out",
        str(directory),
        "train.steps=4",
        "train.log_every=2",
    ]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "step 4  " in first
    assert "finished after 4 steps" in first
    assert main(["resume", str(directory)]) == 0
    assert "step 4  " not in capsys.readouterr().out, "a finished run ran again"
    assert main(["eval", str(trained), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((trained / "results.json").read_text())["metrics"]
    assert main(["eval", str(trained), "--best"]) == 0
    assert "error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("layers", {"name", "summary", "config", "tiny_state_bytes"}),
        ("tasks", {"name", "summary", "config"}),
        ("envs", {"name", "summary", "observation", "context", "query", "config"}),
    ],
)
def test_list(what: str, keys: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(set(row) == keys for row in rows)
    assert main(["list", what]) == 0
    text = capsys.readouterr().out
    assert all(row["name"] in text for row in rows)


def test_list_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.recipes.RECIPES", {"toy": TOY})
    assert main(["list", "recipes", "--json"]) == 0
    toy, *families = json.loads(capsys.readouterr().out)
    assert toy == {"name": "toy", "summary": "A toy face-off", "seeds": [0], "rows": {"recall": "good,bad,wide"}}
    assert [family["name"] for family in families] == ["worlds-micro-ENV", "worlds-mini-ENV", "worlds-paper-ENV"]
    assert "on the environment ENV" in families[0]["summary"]


@pytest.mark.parametrize("extra", ["there", "missing"])
def test_faceoff_ends_in_a_report(
    extra: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are finished beforehand, so nothing is trained here; ``test_sweep`` trains."""
    for row in ("good", "wide"):
        run = recipe_run(row)
        train(run, tmp_path / run.name)
    asked: list[Path] = []

    def write_report(directory: Path) -> Path:
        asked.append(directory)
        if extra == "missing":
            raise RecollectError("the report needs matplotlib")
        return directory / "report.html"

    monkeypatch.setattr("recollect.eval.report.write.write_report", write_report)
    monkeypatch.setattr("recollect.eval.report.write.terminal_table", lambda _directory: "a table")
    monkeypatch.setattr("recollect.eval.report.rates.undecided", lambda _directory: [])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    code = main(["faceoff", "toy_problem:finished_faceoff", "--out", str(tmp_path), "train.steps=3"])
    captured = capsys.readouterr()
    assert code == 0
    assert asked == [tmp_path]
    assert "a table" in captured.out
    if extra == "there":
        assert f"report: {tmp_path}/report.html" in captured.out
    else:
        assert captured.err.count("\n") == 1
        assert f"recollect report {tmp_path}" in captured.err


def recipe_run(row: str):
    from recollect.recipes import load_recipe

    return load_recipe("toy_problem:finished_faceoff").overridden(["train.steps=3"]).pick(row)
