"""Training language models on text, and the commands under ``recollect lm``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.cli import main
from recollect.core.config import override
from recollect.core.errors import ConfigError, DataError
from recollect.hf.loading import load_any, load_model
from recollect.models.beside import Beside
from recollect.text.made import MadeCorpus
from recollect.text.store import build_store
from recollect.text.suite import load_suite
from recollect.text.suite.corpus import corpus
from recollect.text.tokenizer import ByteTokenizer
from recollect.train.language import LanguageConfig, SuiteQuestions, language_run, parse_layers, save_model
from recollect.train.loop import StoppedError, load_trained, train
from recollect.train.run import RunConfig


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of documents."""
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    documents = corpus(0, 40, load_suite("tiny").tasks, length=(300, 700))
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def store(text: Path) -> Path:
    """A store of them with a fifth held out."""
    build_store([str(text)], text.parent / "store", ByteTokenizer(), valid_share=0.2)
    return text.parent / "store"


@pytest.fixture(scope="module")
def hax_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with attention beside its layers."""
    root = tmp_path_factory.mktemp("model")
    assert main(["lm", "random", "--out", str(root / "tiny")]) == 0
    assert main(["lm", "convert", str(root / "tiny"), "--out", str(root / "hax"), "--hax", "k=8"]) == 0
    return root / "hax"


def run_on(store: Path, *assignments: str, **more: Any) -> RunConfig:
    options = {"layers": "mamba2+hax", "d_model": 32, "steps": 4, "row_length": 64, "batch_size": 2, "lr": 3e-3}
    run = language_run(str(store), **{**options, **more})
    return override(run, ["train.eval_every=2", "problem.valid_rows=4", *assignments])


def test_it_learns_and_the_saved_model_scores_the_same(store: Path, tmp_path: Path) -> None:
    results = train(run_on(store, steps=30), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    valid = [record["eval"]["loss"] for record in records if record.get("split") == "valid"]
    assert valid[0] > 5
    assert results["metrics"]["loss"] < valid[0] - 0.3
    model = load_any(save_model(tmp_path / "run"))
    _, problem, trained = load_trained(tmp_path / "run")
    tokens = torch.randint(0, 256, (1, 50))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, trained(tokens).logits)
    assert problem.describe(trained)["params"] == sum(p.numel() for p in model.parameters())


def test_stopped_and_resumed_it_ends_in_the_same_bits(store: Path, tmp_path: Path) -> None:
    run, asked = run_on(store, steps=6), iter([False, False, False, True])
    whole = train(run, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(run, tmp_path / "parts", stop=lambda: next(asked))
    assert train(run, tmp_path / "parts")["metrics"] == whole["metrics"]


def test_attention_alone_can_be_trained(store: Path, hax_model: Path, tmp_path: Path) -> None:
    run = run_on(store, model=str(hax_model), trains="attention", steps=8)
    results = train(run, tmp_path / "run")
    before, (_, _, after) = load_model(hax_model), load_trained(tmp_path / "run")
    changed = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == {name for name, _ in before.named_parameters() if ".attention." in name or name.endswith(".gate")}
    assert 0 < results["trained_params"] < results["params"]


def test_closed_gates_start_where_the_checkpoint_was(store: Path, hax_model: Path) -> None:
    """And with them open by training nothing is lost: the first loss is that of the model without attention."""
    problem = run_on(store, model=str(hax_model)).problem.build()
    plain = run_on(store, model=str(hax_model)).problem.build()
    model, other = problem.build_model().eval(), plain.build_model().eval()
    with torch.no_grad():
        for block in other.backbone.layers:
            block.mixer.attention.to_qk.weight.normal_()
    streams = __import__("recollect.core.seeding", fromlist=["Streams"]).Streams(0)
    batch = problem.batch(1, streams, torch.device("cpu"))
    assert torch.equal(model.loss(*batch)[0], other.loss(*batch)[0])


def test_the_end_measures_positions_and_asks_the_suite(store: Path, tmp_path: Path) -> None:
    run = run_on(store, "problem.lengths=[128,256]", "problem.long_rows=2")
    questions = SuiteQuestions(tasks=("needle-noise",), lengths=(256,), depths=(0.5,), n=2)
    run = replace(run, problem=replace(run.problem, questions=questions))
    results = train(run, tmp_path / "run")
    assert {"loss", "loss_128", "loss_256", "needle-noise_256"} <= results["metrics"].keys()
    assert results["details"]["by_position"]["256"]["linear"]
    assert results["details"]["suite"]["rows"][0]["status"] == "measured"


def test_text_and_the_model_to_go_on_from_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows that differ in their attention go on from one pretrained model on one text."""
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "data"))
    made = MadeCorpus(30, (300, 700), tasks=("needle-noise",), vocab_size=300, valid_share=0.2)
    base = run_on(Path("unused"), layers="2*mamba2", steps=3)
    base = replace(base, problem=replace(base.problem, data=made))
    found = []
    for beside in (None, Beside(4, "SW")):
        problem = LanguageConfig(made, base, beside, row_length=64, batch_size=2, valid_rows=2)
        run = replace(base, problem=problem, train=replace(base.train, steps=2))
        found.append(train(run, tmp_path / str(beside is None)))
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "data").iterdir()) == ["made", "model", "model"]
    assert found[0]["params"] < found[1]["params"]
    records = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("True", "False")
    ]
    assert records[0]["step"] == records[1]["step"]
    # The window begins with its gate closed: one step later it may differ, and before it, it did not.
    models = [LanguageConfig(made, base, beside).build().build_model().eval() for beside in (None, Beside(4, "SW"))]
    tokens = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_what_cannot_be_trained_is_told_of(store: Path, hax_model: Path, tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"layers": "mamba2+hex"}, "'hex' is not N"),
        ({"layers": "0*mamba2"}, "is not N"),
        ({"trains": "attention", "layers": "mamba2"}, "no layer of the model has sparse attention"),
        ({"model": str(tmp_path / "nowhere")}, "does not exist"),
        ({"row_length": 10**6}, "is longer than all"),
        ({"min_tokens": 10**6}, "no document"),
    )
    for i, (options, message) in enumerate(cases):
        with pytest.raises((ConfigError, DataError), match=message):
            train(run_on(store, **options), tmp_path / str(i))
    with pytest.raises(DataError):
        train(run_on(tmp_path / "no-store"), tmp_path / "run")
    with pytest.raises(ConfigError, match="either model"):
        LanguageConfig("x", "model", layers=parse_layers("gru", 8))


def test_a_store_of_another_vocabulary_is_refused(store: Path, tmp_path: Path) -> None:
    run = run_on(store)
    run = replace(run, problem=replace(run.problem, vocab_size=100))
    with pytest.raises(ConfigError, match="whose ids go up to 257"):
        train(run, tmp_path / "run")


def test_layers_by_name() -> None:
    assert [layer.kind for layer in parse_layers("2*mamba2 + hax+mlp", 32)] == ["mamba2", "mamba2", "hax", "mlp"]


def test_the_commands_in_a_row(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a public checkpoint to text: what the guide does."""

    def do(*words: Any) -> str:
        assert main(["lm", *map(str, words)]) == 0
        return capsys.readouterr().out

    do("random", "--family", "mamba", "--layout", "state-spaces", "--out", tmp_path / "public")
    assert "state-spaces layout: 2 of mamba, 64 wide" in do(
        "convert", tmp_path / "public", "--out", tmp_path / "model", "--hax", "k=8", "planes=fixed"
    )
    assert "tokens" in do("tokenize", text, "--out", tmp_path / "store", "--valid-share", "0.2")
    small = ("--steps", "3", "--row-length", "64", "--batch-size", "2")
    out = do(
        "train", "--data", tmp_path / "store", "--model", tmp_path / "model", *small, "--out", tmp_path / "run",
        "problem.valid_rows=2",
    )  # fmt: skip
    assert f"model: {tmp_path / 'run' / 'model'}" in out
    asked = ("--suite", "tiny", "--tasks", "needle-noise", "--lengths", "256", "--depths", "0.5", "--n", "2")
    out = do("eval", tmp_path / "run" / "model", *asked, "--data", tmp_path / "store", "--out", tmp_path / "long")
    assert "needle-noise" in out
    assert {path.name for path in (tmp_path / "long").iterdir()} == {
        "suite.json",
        "suite.png",
        "positions.json",
        "positions.png",
    }
    assert do("generate", tmp_path / "run" / "model", "--prompt", "In", "--n", "5").startswith("In")
    assert "transformers layout" in do("export", tmp_path / "run" / "model", "--out", tmp_path / "back")
    assert type(load_any(tmp_path / "back")).__name__ == "MambaForCausalLM"


def test_writing_is_flat_in_state_and_reproducible(hax_model: Path) -> None:
    from recollect.hf.stream import Stream

    model, tokenizer = load_model(hax_model), ByteTokenizer()
    sizes = []
    for prompt in ("In", "In " * 900):
        stream = Stream(model, tokenizer, prompt, 12, temperature=1.0, top_p=0.9, seed=3)
        assert "".join(stream) == "".join(Stream(model, tokenizer, prompt, 12, temperature=1.0, top_p=0.9, seed=3))
        sizes.append(stream.summary.rpartition("has ")[2])
    assert sizes[0] == sizes[1]
    greedy = "".join(Stream(model, tokenizer, "In", 12))
    ids = model.generate(torch.tensor([tokenizer.encode("In")]), max_new_tokens=12, do_sample=False)
    assert greedy == tokenizer.decode(ids[0, 2:].tolist()).replace("<|endoftext|>", "")
    with pytest.raises(ConfigError, match="has no tokens"):
        Stream(model, tokenizer, "", 3)


def test_writing_through_a_recorded_step_is_the_same_writing(hax_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.core.steps import Steps
    from recollect.hf import stream

    model, tokenizer = load_model(hax_model), ByteTokenizer()
    plain = "".join(stream.Stream(model, tokenizer, "In Paris", 12))
    made: list[Steps[Any]] = []

    def recorded(step: Any, state: Any) -> Steps[Any]:
        made.append(Steps(step, state, record=lambda run: run))
        return made[0]

    monkeypatch.setattr(stream, "Steps", recorded)
    assert "".join(stream.Stream(model, tokenizer, "In Paris", 12)) == plain
    assert made[0].why == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "nowhere", "--out", "x"], "not a folder with a checkpoint"),
        (["convert", "nowhere", "--out", "x", "--hax", "keys=3"], "give k=N"),
        (["convert", "nowhere", "--out", "x", "--hax", "dual=1"], "'1' is not true or false"),
        (["train", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["eval", "nowhere", "--out", "x"], "nowhere"),
        (["eval", "nowhere", "--suite", "short", "--out", "x"], "nowhere"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere"),
        (["generate", "nowhere", "--prompt", ""], "--prompt is empty"),
        (["tokenize", "nowhere.txt", "--out", "x"], "nowhere.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["lm", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_two_processes_train_as_one_does(store: Path, hax_model: Path, tmp_path: Path) -> None:
    """Under torchrun, in shards, on the command line: the same losses, and one model at the end."""
    words = ["lm", "train", "--data", str(store), "--model", str(hax_model), "--steps", "4", "--row-length", "64"]
    words += ["--batch-size", "4", "--lr", "1e-3", "problem.valid_rows=2", "train.log_every=1"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    shared = [*words, "--out", str(tmp_path / "two"), "--parallel", "fsdp"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "recollect", *shared]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: ") == 1
    found = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([record["cross_entropy"] for line in lines if "cross_entropy" in (record := json.loads(line))])
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    results = [json.loads((tmp_path / name / "results.json").read_text())["metrics"] for name in ("one", "two")]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-4)
    assert load_model(tmp_path / "two" / "model").num_parameters() == load_model(hax_model).num_parameters()


def test_the_demonstration_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step once; a second time only what shows results."""
    words = ["lm", "demo", "--out", str(tmp_path / "demo"), "--steps", "2", "--documents", "20"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert main(words) == 0
    again = capsys.readouterr().out
    for step in ("random", "convert", "corpus", "tokenize"):
        assert f"$ recollect lm {step}" in first
        assert f"$ recollect lm {step}" not in again
    for step in ("train", "eval", "generate"):
        assert f"$ recollect lm {step}" in first
        assert f"$ recollect lm {step}" in again
    assert (tmp_path / "demo" / "run" / "model" / "model.safetensors").exists()
