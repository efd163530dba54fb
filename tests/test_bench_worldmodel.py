"""`recollect bench worldmodel`: what is timed, what it is compared with, and that one failing case costs no other."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.cli import main
from recollect.eval.bench import cases as bench_cases
from recollect.eval.bench import worldmodel as bench
from recollect.eval.bench.measure import Peak, Timing
from recollect.eval.bench.worldmodel import FULL, HORIZON, config_of, episodes, ratios, refusal, row_names, vision
from recollect.models.presets import PRESETS
from recollect.models.vision import Tiles
from recollect.models.world_model import WorldModel

CPU = torch.device("cpu")
WORDS = ["bench", "worldmodel", "--presets", "rssm,tssm", "tssm-full", "--lengths", "8,16", "--d-model", "32"]
WORDS += ["--batch", "2", "--threads", "1", "--seconds", "0.005"]
LENGTHS = (8, 16)


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "worldmodel.json").read_text())


def measured(train: float = 1.0, imagine: float = 1.0) -> dict[str, Any]:
    """What ``measure`` returns, of a row that makes so many frames a second."""
    return {
        **{"status": "measured", "params": 1, "state_bytes": 1, "repeats": 3, "pass_s": 0.1, "peak_bytes": 1000},
        **{"train_steps_per_s": train, "train_frames_per_s": train, "imagine_frames_per_s": imagine},
        "imagine_step_ms": 1.0,
    }


class Scripted:
    """Stands in for the worker: replies by row and length, and remembers what it was asked."""

    def __init__(self, replies: Callable[[str, int], dict[str, Any]]) -> None:
        self.replies, self.asked = replies, list[tuple[str, int]]()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, _call: str, arguments: dict[str, Any], **_: object) -> dict[str, Any]:
        key = arguments["row"], arguments["length"]
        self.asked.append(key)
        return self.replies(*key)


def test_a_run(tmp_path: Path) -> None:
    code, out, err = run(*WORDS, "--out", str(tmp_path))
    assert code == 0, err
    data = read(tmp_path)
    rows = {(row["row"], row["length"]): row for row in data["rows"]}
    assert list(rows) == [(name, n) for name in ("rssm", "tssm", FULL) for n in LENGTHS]
    for (name, length), row in rows.items():
        config = config_of(name, length, 32, Tiles(hidden=32))
        assert row["status"] == "measured", row
        assert row["params"] == sum(p.numel() for p in WorldModel(config).parameters())
        assert row["state_bytes"] == config.dynamics.state_bytes(seen=length)
        assert row["train_frames_per_s"] == pytest.approx(2 * length * row["train_steps_per_s"])
        assert row["imagine_frames_per_s"] > 0
        assert row["imagine_step_ms"] > 0
        assert 0 <= row["peak_bytes"] < 2**28
    assert rows["tssm", 8]["state_bytes"] == rows["tssm", 16]["state_bytes"]
    assert rows[FULL, 8]["state_bytes"] < rows[FULL, 16]["state_bytes"] < rows["tssm", 16]["state_bytes"]
    for each in data["ratios"]:
        ours = rows[each["row"], each["length"]]
        for ratio, other, column in (
            ("train_vs_rssm", "rssm", "train_frames_per_s"),
            ("imagine_vs_tssm", "tssm", "imagine_frames_per_s"),
            ("imagine_vs_tssm_full", "tssm-full", "imagine_frames_per_s"),
        ):
            assert each[ratio] == pytest.approx(ours[column] / rows[other, each["length"]][column])
    assert len(data["ratios"]) == len(rows)
    assert data["settings"]["size"]["d_model"] == data["settings"]["size"]["hidden"] == 32
    assert data["settings"]["horizon"] == HORIZON
    assert data["settings"]["image_size"] is None
    assert (tmp_path / "worldmodel.png").read_bytes().startswith(b"\x89PNG")
    assert "training and imagination of 2 episodes side by side" in out
    assert "/ full" in out
    assert f"{data['ratios'][2]['train_vs_rssm']:.2f} x" in out
    before = (tmp_path / "worldmodel.json").read_text()
    _, out, err = run(*WORDS, "--out", str(tmp_path))
    assert "measured 0 cases" in out
    assert err == ""
    assert json.loads(before)["rows"] == read(tmp_path)["rows"]


def test_a_failing_case_keeps_the_others_and_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failure = {"status": "failed", "why": "ValueError: no"}
    worker = Scripted(lambda row, n: failure if (row, n) == ("rssm", 8) else measured())
    monkeypatch.setattr(bench_cases, "Worker", lambda: worker)
    code, out, _ = run(*WORDS, "--out", str(tmp_path))
    assert code == 1
    assert "failed: ValueError: no" in " ".join(out.split())
    assert len(worker.asked) == 6
    assert [row["row"] for row in read(tmp_path)["rows"] if row["status"] == "measured"].count("rssm") == 1
    found = {(each["row"], each["length"]): each for each in read(tmp_path)["ratios"]}
    assert ("rssm", 8) not in found
    assert found["tssm", 8]["train_vs_rssm"] is None, "compared with another length"
    assert found[FULL, 8]["imagine_vs_tssm"] == found["tssm", 16]["train_vs_rssm"] == 1.0
    monkeypatch.setattr(bench_cases, "Worker", lambda: again)
    again = Scripted(lambda *_: measured(train=0.5))
    code, out, _ = run(*WORDS, "--out", str(tmp_path))
    assert (code, again.asked) == (0, [("rssm", 8)])
    assert "measured 1 cases" in out
    found = {(each["row"], each["length"]): each for each in read(tmp_path)["ratios"]}
    assert found["tssm", 8]["train_vs_rssm"] == 2.0


def test_a_size_that_a_row_cannot_have_is_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "not divisible by n_heads" in refusal("tssm", 8, 30)
    assert refusal("s5wm", 8, 30) == ""
    worker = Scripted(lambda *_: measured())
    monkeypatch.setattr(bench_cases, "Worker", lambda: worker)
    words = ["--presets", "tssm,s5wm", "--lengths", "8", "--d-model", "30", "--out", str(tmp_path)]
    code, out, _ = run("bench", "worldmodel", *words)
    assert (code, worker.asked) == (0, [("s5wm", 8)])
    assert "not divisible by n_heads" in " ".join(out.split())


def test_ratios_are_against_their_own_baseline() -> None:
    speeds = {"rssm": (2.0, 100.0), "tssm": (5.0, 10.0), FULL: (1.0, 4.0), "s5wm": (8.0, 40.0)}
    rows = [{"row": name, "length": 1000, **measured(*speed)} for name, speed in speeds.items()]
    rows.append({"row": "rssm", "length": 2000, "status": "skipped", "why": "slow"})
    rows.append({"row": "s5wm", "length": 2000, **measured(7.0, 7.0)})
    found = {(each["row"], each["length"]): each for each in ratios(rows)}
    assert found["s5wm", 1000] == {
        **{"row": "s5wm", "length": 1000, "train_vs_rssm": 4.0},
        **{"imagine_vs_tssm": 4.0, "imagine_vs_tssm_full": 10.0},
    }
    assert found["tssm", 1000]["train_vs_rssm"] == 2.5
    assert found[FULL, 1000]["imagine_vs_tssm"] == 0.4
    assert found["s5wm", 2000]["train_vs_rssm"] is None
    assert ("rssm", 2000) not in found


@pytest.mark.parametrize("observation", ["tiles", "pixels"])
def test_what_is_timed(monkeypatch: pytest.MonkeyPatch, observation: str) -> None:
    """Memory and time are of steps that train on whole episodes; dreams start after all of the context."""
    length, models, seen, dreamed, timed = 136, [], [], [], []
    observe, imagine, imagine_step, loss = (
        getattr(WorldModel, name) for name in ("observe", "imagine", "imagine_step", "loss")
    )

    def watched(self: WorldModel, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            seen.append((torch.is_grad_enabled(), batch.is_first.shape[1]))
        return observe(self, batch, *args, **kwargs)

    def dreams(self: WorldModel, state: Any, actions: torch.Tensor, **kwargs: Any) -> Any:
        found = imagine(self, state, actions, **kwargs)
        dreamed.append((actions.shape[1], found.observation.shape[1], kwargs["generator"] is not None))
        return found

    def steps(self: WorldModel, *args: Any, **kwargs: Any) -> Any:
        alone.append(kwargs["generator"] is not None)
        return imagine_step(self, *args, **kwargs)

    def trained(self: WorldModel, batch: Any, *args: Any) -> Any:
        models.append((self, batch.is_first.shape[1]))
        return loss(self, batch, *args)

    def timing(run: Callable[[], object], *_: object, **kwargs: float) -> Timing:
        before = snapshot()
        counts = len(models), len(dreamed), len(alone)
        run()
        after = [now - then for now, then in zip((len(models), len(dreamed), len(alone)), counts, strict=True)]
        timed.append((after, before != snapshot(), kwargs))
        return Timing(2.0, 3)

    def peak(run: Callable[[], object], _: torch.device) -> Peak:
        assert all(p.grad is None for p in models[-1][0].parameters()), "gradients are not on top of the model"
        run()
        return Peak(77, 5.0)

    def snapshot() -> list[float]:
        return [float(p.detach().double().square().sum()) for p in models[-1][0].parameters()]

    alone: list[bool] = []
    for name, stand_in in (("observe", watched), ("imagine", dreams), ("imagine_step", steps), ("loss", trained)):
        monkeypatch.setattr(WorldModel, name, stand_in)
    monkeypatch.setattr(bench, "median_time", timing)
    monkeypatch.setattr(bench, "peak_of", peak)
    size = 40 if observation == "pixels" else None
    common: dict[str, Any] = {"batch": 2, "threads": 1, "device": "cpu", "seconds": 0.0}
    row = bench.measure("s5wm", length, d_model=8, observation=observation, image_size=size, **common)
    assert [steps for _, steps in models] == [bench.WARM_LENGTH] * 2 + [length] * 2
    assert seen == [(False, length)]
    assert set(dreamed) == {(HORIZON, HORIZON, True)}
    assert all(alone)
    kinds = [(after, changed) for after, changed, _ in timed]
    assert kinds == [([1, 0, 0], True), ([0, 1, 0], False), ([0, 0, 1], False)]
    assert timed[0][2] == {"first_s": 5.0}
    assert row["peak_bytes"] == 77
    assert (row["train_steps_per_s"], row["train_frames_per_s"]) == (0.5, length)
    assert row["imagine_frames_per_s"] == HORIZON
    assert row["imagine_step_ms"] == 2000.0


def test_rows() -> None:
    names = row_names()
    assert set(names) == {*PRESETS, FULL}
    assert names.index(FULL) == names.index("tssm") + 1
    for name in names:
        assert refusal(name, 4000, 256) == "", "the command's own width"
    like, full = (config_of(name, 99, 32, Tiles()).dynamics for name in ("tssm", FULL))
    assert full.chunk is None
    assert full.state_bytes() != like.state_bytes()


def test_episodes_are_whole_and_of_the_kind_asked_for() -> None:
    config = config_of("s5wm", 8, 32, vision("pixels", 40, 32))
    batch = episodes(config, 3, 5, CPU)
    assert batch.observation.shape == (3, 5, 40, 40, 3)
    assert int(batch.observation.max()) > 200
    assert batch.is_first.sum(1).tolist() == [1, 1, 1]
    assert batch.is_first[:, 0].all()
    assert batch.action.sum(-1).tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]] * 3
    tiles = episodes(config_of("s5wm", 8, 32, Tiles(n_codes=3)), 3, 50, CPU)
    assert int(tiles.observation.max()) == 2
    WorldModel(config)._check(batch)
