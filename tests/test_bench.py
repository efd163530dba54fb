"""The benches: tiny runs through the command line, what is skipped and why, resuming, the arithmetic of summaries."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.cli import main
from recollect.core.errors import ConfigError, RecollectError
from recollect.core.layer import LayerOut, SequenceLayer
from recollect.eval.bench import cases as bench_cases
from recollect.eval.bench.attention import KINDS, crossover, summary
from recollect.eval.bench.cases import Case, Record, forecast, run_cases
from recollect.eval.bench.figures import spread
from recollect.eval.bench.layers import error_of, ratios
from recollect.eval.bench.peers import BEST, PEERS
from recollect.eval.bench.rows import VARIANTS, config_of, refusal, row_names, sizes
from recollect.layers import LAYERS

CPU = torch.device("cpu")
TINY = ["--threads", "1", "--seconds", "0.005"]
LAYERS_RUN = ["bench", "layers", "--layers", "gru,mamba2", "attention-full", "--lengths", "8..16", *TINY]
LAYERS_RUN += ["--d-model", "64", "--batch", "2"]
PNG = b"\x89PNG"


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run over three layers and their peers: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("layers")
    code, out, err = run(*LAYERS_RUN, "--out", str(folder))
    assert code == 0, err
    return folder, out, err


def test_layers_rows_say_everything(layers: tuple[Path, str, str]) -> None:
    folder, _, _ = layers
    data = read(folder, "layers")
    assert set(data) == {"bench", "schema", "commit", "code", "settings", "environment", "peers", "ratios", "rows"}
    assert data["settings"] == {
        **{"d_model": 64, "batch": 2, "threads": 1, "device": "cpu", "seconds": 0.005, "dtype": "float32"},
        "checked_positions": 256,
    }
    assert data["environment"]["packages"]["torch"] == version("torch")
    assert "diff" not in data["environment"]
    ours = [row for row in data["rows"] if row["row"] in ("gru", "mamba2", "attention-full")]
    assert [(row["row"], row["length"]) for row in ours] == [
        (name, length) for name in ("gru", "mamba2", "attention-full") for length in (8, 16)
    ]
    for row in ours:
        config = config_of(row["row"], 64)
        assert row["status"] == "measured"
        assert row["peer_of"] is None
        assert row["params"] == sum(p.numel() for p in config.build().parameters())
        assert row["state_bytes"] == config.state_bytes(seen=row["length"])
        assert row["repeats"] >= 3
        assert row["error_positions"] == row["length"]
        assert 0 <= row["error_relative"] < 1e-4
        assert min(row[f"{what}_tokens_per_s"] for what in ("forward", "both", "step")) > 0
        assert row["peak_bytes"] < 2**28
        assert row["commit"] == data["commit"]


def test_layers_measure_their_peers(layers: tuple[Path, str, str]) -> None:
    folder, out, _ = layers
    data = read(folder, "layers")
    wanted = {label for label, peer in PEERS.items() if peer.row in ("gru", "mamba2", "attention-full")}
    assert {row["row"] for row in data["rows"]} - {"gru", "mamba2", "attention-full"} == wanted
    rows = {(row["row"], row["length"]): row for row in data["rows"]}
    for label in wanted:
        for length in (8, 16):
            assert rows[label, length]["status"] == "measured", rows[label, length]
            assert rows[label, length]["peer_of"] == PEERS[label].row
            assert rows[label, length]["step_tokens_per_s"] > 0
    assert rows["transformers Mamba2", 8]["params"] == rows["mamba2", 8]["params"], "not the same widths"
    pairs = {(each["row"], each["peer"]) for each in data["ratios"]}
    assert pairs == {
        ("gru", "torch GRU"),
        ("mamba2", "transformers Mamba2"),
        ("mamba2", BEST),
        ("attention-full", "torch SDPA"),
    }
    for each in data["ratios"]:
        mine, theirs = rows[each["row"], each["length"]], rows[each["taken"], each["length"]]
        assert each["both"] == pytest.approx(mine["both_tokens_per_s"] / theirs["both_tokens_per_s"])
        assert each["memory"] is None or each["memory"] == pytest.approx(mine["peak_bytes"] / theirs["peak_bytes"])
    assert "gru / torch GRU" in out
    assert "ours / peer, forward + backward speed" in out


def test_layers_are_drawn_and_progress_is_told(layers: tuple[Path, str, str]) -> None:
    folder, out, err = layers
    assert (folder / "layers.png").read_bytes().startswith(PNG)
    assert f"picture: {folder}/layers.png" in out
    n_cases = len(read(folder, "layers")["rows"])
    assert err.count(" left\n") == n_cases
    assert f"[{n_cases}/{n_cases}] " in err
    assert f"measured {n_cases} cases" in out


def test_the_same_command_measures_only_what_is_missing(
    layers: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = layers
    (tmp_path / "layers.json").write_bytes((folder / "layers.json").read_bytes())
    before = read(tmp_path, "layers")["rows"]
    code, out, err = run(*LAYERS_RUN, "--out", str(tmp_path))
    assert (code, err) == (0, "")
    assert "measured 0 cases" in out
    assert read(tmp_path, "layers")["rows"] == before
    monkeypatch.setattr(bench_cases, "Worker", lambda: Scripted({16: row_of_layers()}))
    kept = [row for row in before if (row["row"], row["length"]) != ("gru", 16)]
    data = {**read(tmp_path, "layers"), "rows": kept}
    (tmp_path / "layers.json").write_text(json.dumps(data))
    _, out, _ = run(*LAYERS_RUN, "--out", str(tmp_path))
    assert "measured 1 cases" in out
    assert len(read(tmp_path, "layers")["rows"]) == len(before)


def test_other_settings_and_damage_are_refused(
    layers: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = layers
    text = (folder / "layers.json").read_text()
    words = ["bench", "layers", "--layers", "gru", "--lengths", "8", "--d-model", "64", "--no-peers"]
    for stored, wanted in (
        (text, "settings.batch: 2 -> 8"),
        (text.replace(json.loads(text)["code"], "0" * 12), "code: 000000000000 ->"),
        ("{", "is not a record of this bench"),
        ("[]", "is not a record of this bench"),
    ):
        (tmp_path / "layers.json").write_text(stored)
        code, out, err = run(*words, *TINY, "--out", str(tmp_path))
        assert (code, out) == (2, "")
        assert wanted in err
        assert "--fresh" in err
        assert err.count("\n") == 1
        assert (tmp_path / "layers.json").read_text() == stored, "what was there is gone"
    monkeypatch.setattr(bench_cases, "Worker", lambda: Scripted({8: row_of_layers()}))
    code, out, _ = run(*words, *TINY, "--out", str(tmp_path), "--fresh")
    assert code == 0
    assert [row["row"] for row in read(tmp_path, "layers")["rows"]] == ["gru"]


def test_attention(tmp_path: Path) -> None:
    words = ["bench", "attention", "--lengths", "8..32", "--heads", "2", "--d-head", "4", *TINY, "--out", str(tmp_path)]
    code, out, err = run(*words)
    assert code == 0, err
    data = read(tmp_path, "attention")
    assert {(row["row"], row["length"]) for row in data["rows"]} == {
        (kind, n) for kind in (*KINDS, "sdpa") for n in (8, 16, 32)
    }
    for row in data["rows"]:
        assert row["status"] == "measured", row
        assert row["both_ms"] > 0
    assert [each["row"] for each in data["summary"]] == [*KINDS, "sdpa"]
    assert set(data["summary"][0]) == {
        *("row", "crossover", "crossover_note", "speed_ratio_16384"),
        *("time_growth_16384_131072", "memory_growth_16384_131072"),
    }
    assert (tmp_path / "attention.png").read_bytes().startswith(PNG)
    assert "faster from" in out
    _, out, _ = run(*words)
    assert "measured 0 cases" in out


def test_decode(tmp_path: Path) -> None:
    words = ["bench", "decode", "--layers", "gru", "attention", "attention-full", "--seen", "8", "96", "--d-model", "8"]
    code, _, err = run(*words, *TINY, "--out", str(tmp_path))
    assert code == 0, err
    data = read(tmp_path, "decode")
    rows = {(row["row"], row["seen"]): row for row in data["rows"]}
    assert {name: rows[name, 8]["grows"] for name in ("gru", "attention", "attention-full")} == {
        **{"gru": False, "attention": False, "attention-full": True}
    }
    for (name, seen), row in rows.items():
        assert row["step_ms"] > 0
        assert row["state_bytes"] == config_of(name, 8).state_bytes(seen=seen)
    growth = {each["row"]: each["state_growth"] for each in data["summary"]}
    assert growth["gru"] == growth["attention"] == 1.0
    assert growth["attention-full"] > 10
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)
    _, out, _ = run(*words, *TINY, "--out", str(tmp_path))
    assert "measured 0 cases" in out
    assert "state grows" in out


# What is skipped


class Scripted:
    """Stands in for the worker: replies by size, and remembers what it was asked."""

    def __init__(self, replies: dict[int, dict[str, Any]]) -> None:
        self.replies, self.asked = replies, []

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, _call: str, arguments: dict[str, Any], **_: object) -> dict[str, Any]:
        size = next(arguments[name] for name in ("n", "length", "seen") if name in arguments)
        self.asked.append(size)
        return self.replies[size]


def scripted(
    monkeypatch: pytest.MonkeyPatch, folder: Path, replies: dict[int, dict[str, Any]], *, budget_s: float = 10.0
) -> tuple[list[int], list[dict[str, Any]], Record]:
    worker = Scripted(replies)
    monkeypatch.setattr(bench_cases, "Worker", lambda: worker)
    cases = [Case("a", n, "nothing:nothing", {"n": n}) for n in sorted(replies)]
    record = run_cases("x", cases, size_name="n", settings={}, out=folder, budget_s=budget_s, device=CPU)
    assert json.loads((folder / "x.json").read_text())["rows"] == record.rows
    return worker.asked, record.rows, record


def timed(seconds: float, n_bytes: int = 1000) -> dict[str, Any]:
    return {"status": "measured", "pass_s": seconds, "peak_bytes": n_bytes}


def test_what_would_take_too_long_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Growth is what was seen: quadratic here, so 4 passes of 4 s at 400, of which 10 s are allowed."""
    replies = {100: timed(0.25), 200: timed(1.0), 400: timed(4.0), 800: timed(16.0)}
    asked, rows, _ = scripted(monkeypatch, tmp_path, replies)
    assert asked == [100, 200]
    assert [row["status"] for row in rows] == ["measured", "measured", "skipped", "skipped"]
    assert rows[2]["why"] == "about 16 s expected, 10 s allowed"
    asked, rows, _ = scripted(monkeypatch, tmp_path, replies, budget_s=16.5)
    assert asked == [400, 800], "a larger budget goes on; beyond 10 s a pass counts once"
    assert {row["status"] for row in rows} == {"measured"}
    assert scripted(monkeypatch, tmp_path, replies, budget_s=16.5)[0] == []


def test_what_would_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_cases, "available_bytes", lambda _: 2**30)
    replies = {1: timed(0.1, 2**28), 2: timed(0.1, 2**29), 4: timed(0.1, 2**30)}
    asked, rows, _ = scripted(monkeypatch, tmp_path, replies)
    assert asked == [1, 2]
    assert rows[-1]["why"] == "about 1.0 GiB expected, 1.0 GiB free"


def test_what_ran_over_is_tried_again_with_more_time_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    over = {"status": "skipped", "why": "took more than 80 s", "ran_over": True}
    asked, rows, record = scripted(monkeypatch, tmp_path, {1: timed(0.1), 2: over, 4: timed(0.1)})
    assert asked == [1, 2]
    assert rows[-1]["why"] == "2 was too much already"
    assert record.newly == 2
    assert scripted(monkeypatch, tmp_path, {1: timed(0.1), 2: timed(0.1), 4: timed(0.1)})[0] == []
    assert scripted(monkeypatch, tmp_path, {1: timed(0.1), 2: timed(0.1), 4: timed(0.1)}, budget_s=20.0)[0] == [2, 4]


def test_a_case_that_fails_leaves_the_others_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = {"status": "failed", "why": "ValueError: no"}
    asked, rows, _ = scripted(monkeypatch, tmp_path, {1: failed, 2: timed(0.1)})
    assert asked == [1, 2]
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert scripted(monkeypatch, tmp_path, {1: timed(0.1), 2: timed(0.1)})[0] == [1]


def test_a_missing_package_is_one_line_and_a_reason_in_every_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from recollect.eval.bench import peers as bench_peers

    monkeypatch.setattr(bench_peers, "find_spec", lambda _: None)
    monkeypatch.setattr(bench_cases, "Worker", lambda: Scripted({8: row_of_layers(), 16: row_of_layers()}))
    code, out, err = run("bench", "layers", "--layers", "mamba2", "--lengths", "8..16", *TINY, "--out", str(tmp_path))
    assert code == 0
    left_out = [row for row in read(tmp_path, "layers")["rows"] if row["row"] in PEERS]
    assert {row["why"] for row in left_out} == {"transformers is not installed: pip install 'recollect[peers]'"}
    assert err.count("recollect[peers]") == 1
    assert out.count("skipped: ") == len(left_out)


def row_of_layers() -> dict[str, Any]:
    speeds = {f"{what}_tokens_per_s": 1.0 for what in ("forward", "both", "step")}
    return {**timed(0.1), **speeds, "peer_of": None, "params": 1, "state_bytes": 1, "repeats": 3}


def test_two_commands_do_not_write_one_record(tmp_path: Path) -> None:
    from recollect.core.files import locked

    tmp_path.joinpath("x.json").write_text("{}")
    with locked(tmp_path / ".x.lock", wait=False), pytest.raises(RecollectError, match="another command is writing"):
        run_cases("x", [], size_name="n", settings={}, out=tmp_path, budget_s=1.0, device=CPU)


def test_growth_goes_on() -> None:
    assert forecast([], 8) is None
    assert forecast([(4, 2.0)], 16) == pytest.approx(8.0)
    assert forecast([(256, 1.0), (512, 4.0)], 1024) == pytest.approx(16.0)
    assert forecast([(256, 1.0), (512, 1.0)], 1024) == pytest.approx(2.0), "at least linear"
    assert forecast([(256, 1.0), (512, 64.0)], 1024) == pytest.approx(512.0), "at most cubic"


# Arithmetic


def test_sizes_and_names() -> None:
    assert sizes(["256..2048"]) == [256, 512, 1024, 2048]
    assert sizes(["8,4", 16, "3..13"]) == [3, 4, 6, 8, 12, 16]
    for bad in ("0", "8..4", "x", "4..", "", "-3"):
        with pytest.raises(ConfigError, match="lengths: "):
            sizes([bad])
    assert row_names(["s5,gru", "s5"]) == ["s5", "gru"]
    assert row_names() == [*LAYERS, *VARIANTS]


@pytest.mark.parametrize("row", [*LAYERS, *VARIANTS])
def test_every_layer_has_a_row(row: str) -> None:
    """At the width of the command's default, inner layers included."""
    assert refusal(row, 256) == ""
    assert config_of(row, 256).d_model == 256


def test_a_width_that_a_layer_cannot_have_is_a_reason() -> None:
    assert "divisible" in refusal("attention", 6)


def test_the_error_sees_a_forward_that_is_not_the_fold() -> None:
    layer = LAYERS["gru"].Config(8).build()
    x = torch.randn(1, 12, 8)
    assert error_of(layer, x)["error_max"] < 1e-5

    def wrong(self: SequenceLayer, x: torch.Tensor) -> LayerOut:
        out = type(layer).forward(self, x)
        return LayerOut(out.y + 0.5, out.state, out.aux)

    layer.forward = wrong.__get__(layer)  # type: ignore[method-assign]
    error = error_of(layer, x)
    assert error["error_max"] == pytest.approx(0.5, rel=1e-3)
    assert error["error_relative"] > 0.5


def test_crossover() -> None:
    full = {100: 1.0, 400: 8.0, 1600: 100.0}
    assert crossover({100: 2.0, 400: 4.0}, full) == {"crossover": 200.0, "crossover_note": ""}
    assert crossover({100: 0.5, 400: 4.0}, full)["crossover_note"] == "below 100"
    assert crossover({100: 2.0, 400: 9.0}, full)["crossover_note"] == "above 400"
    back = crossover({100: 0.5, 400: 16.0, 1600: 50.0}, full)["crossover"]
    assert back == pytest.approx(800.0), "from where it stays ahead"
    assert crossover({3: 1.0}, full) == {"crossover": None, "crossover_note": ""}


def test_summary_reads_measured_rows_only() -> None:
    def row(name: str, length: int, ms: float) -> dict[str, Any]:
        return {"row": name, "length": length, "status": "measured", "both_ms": ms, "peak_bytes": 10 * length}

    skipped = {"row": "sdpa", "length": 131_072, "status": "skipped", "why": "slow"}
    found = {
        each["row"]: each
        for each in summary([row("hax", 16_384, 2.0), row("hax", 131_072, 18.0), row("sdpa", 16_384, 9.0), skipped])
    }
    assert found["hax"]["speed_ratio_16384"] == 4.5
    assert found["hax"]["time_growth_16384_131072"] == 9.0
    assert found["hax"]["memory_growth_16384_131072"] == 8.0
    assert found["sdpa"]["time_growth_16384_131072"] is None


def test_the_best_of_a_family_speaks_for_it() -> None:
    def row(name: str, speed: float) -> dict[str, Any]:
        of = PEERS[name].row if name in PEERS else None
        return {**row_of_layers(), "row": name, "length": 8, "both_tokens_per_s": speed, "peer_of": of}

    chunks = {32: 3.0, 64: 5.0, 128: 4.0}
    rows = [row("mamba2", 10.0), *(row(f"transformers Mamba2, chunk {n}", speed) for n, speed in chunks.items())]
    (found,) = ratios(rows)
    assert (found["peer"], found["taken"], found["both"]) == (BEST, "transformers Mamba2, chunk 64", 2.0)


def test_names_are_spread() -> None:
    assert spread([], 10.0, 100.0) == []
    assert spread([5.0, 50.0], 10.0, 100.0) == [5.0, 50.0]
    for wanted in ([50.0] * 4, [0.0, 0.0, 1.0], [99.0, 100.0, 100.0], [1.0, 40.0, 41.0, 90.0]):
        placed = spread(wanted, 10.0, 100.0)
        assert all(b - a >= 10.0 - 1e-9 for a, b in pairwise(placed))
        assert placed[0] >= 0
        assert placed[-1] <= 100


# The command line


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["layers", "--layers", "gruu"], "unknown layer 'gruu'; did you mean 'gru'?"),
        (["layers", "--layers", "gru,s55"], "unknown layer 's55'; did you mean 's5'?"),
        (["layers", "--lengths", "0"], "lengths: '0' must be at least 1"),
        (["layers", "--lengths", "8..x"], "neither a number nor a range"),
        (["layers", "--threads", "0"], "threads must be at least 1"),
        (["layers", "--device", "cuda:99"], "--device cpu"),
        (["layers", "--device", "tpu"], "use cpu or cuda"),
        (["layers", "--budget-seconds", "0"], "budget-seconds must be positive"),
        (["attention", "--heads", "0"], "heads, d_head, batch and threads must be at least 1"),
        (["attention", "--lengths", "-1"], "must be at least 1"),
        (["decode", "--seen", "0"], "seen: '0' must be at least 1"),
        (["decode", "--layers", "nothing"], "unknown layer 'nothing'"),
        (["worldmodel", "--presets", "rsm"], "unknown world model 'rsm'; did you mean 'rssm'?"),
        (["worldmodel", "--lengths", "0"], "lengths: '0' must be at least 1"),
        (["worldmodel", "--batch", "0"], "d_model, batch and threads must be at least 1"),
        (["worldmodel", "--observation", "pixels", "--image-size", "50"], "size 50 cannot be halved to 5 or less"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], wanted: str, tmp_path: Path) -> None:
    if "cuda:99" in words and torch.cuda.is_available():
        wanted = "does not exist"
    code, out, err = run("bench", *words, "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert wanted in err
    assert err.startswith("recollect: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("layers", "attention", "decode", "worldmodel"):
        code, out, err = run("bench", name, "--out", str(tmp_path / "file"))
        assert (code, out) == (2, "")
        assert "cannot be written" in err
        assert err.count("\n") == 1


def test_help_has_examples_and_never_imports_torch() -> None:
    code = (
        "import sys, io, contextlib\n"
        "from recollect.cli import main\n"
        "for name in ('layers', 'attention', 'decode', 'worldmodel'):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        try: main(['bench', name, '--help'])\n"
        "        except SystemExit as leave: assert leave.code == 0\n"
        "    assert f'recollect bench {name}' in out.getvalue().split('Examples:')[1]\n"
        "    assert '--fresh' in out.getvalue()\n"
        "assert not {'torch', 'numpy', 'numba', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_matplotlib_the_record_still_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_cases, "Worker", lambda: Scripted({8: row_of_layers()}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["bench", "layers", "--layers", "gru", "--lengths", "8", "--no-peers", *TINY, "--out", str(tmp_path)]
    code, out, err = run(*words)
    assert code == 0
    assert "gru" in out
    assert read(tmp_path, "layers")["rows"]
    assert "no picture: " in err
    assert "recollect[report]" in err
    assert not (tmp_path / "layers.png").exists()
