"""Evaluation over long contexts: cheats and constants score as they must, and every way of computing agrees."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.core.errors import ConfigError, RecollectError, RunError
from recollect.eval import long_context
from recollect.eval.long_context import averages, evaluate_long, perplexity_by_position, weights_digest
from recollect.eval.long_models import OwnModel, TransformersModel, as_long_model
from recollect.layers.attention import Attention
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.text.suite import TINY, Needles, Suite, prompt_of
from recollect.text.suite.names import listed
from recollect.text.tokenizer import ByteTokenizer
from recollect.train.stopping import StoppedError
from solving import solve

BYTES = ByteTokenizer()
SMALL = Suite(
    {name: TINY[name] for name in ("multi-key", "joint-recall-dense", "common-words")}, (512, 700), (0.0, 1.0)
)


class Answering:
    """A model that writes what ``answer`` makes of the text, and foretells that with all certainty there is."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer = answer
        self.rows = 0
        self.batches = 0

    def answers(self, prompt: Tensor, real: Tensor | None, n: int) -> Tensor:
        assert real is not None
        self.rows += len(prompt)
        self.batches += 1
        texts = [BYTES.decode(row[kept].tolist()) for row, kept in zip(prompt, real, strict=True)]
        ids = [[*BYTES.encode(self.answer(text)), *[BYTES.eos_id] * n][:n] for text in texts]
        return torch.tensor(ids)

    def generate(self, prompt: Tensor, n_tokens: int, real: Tensor | None = None) -> Tensor:
        return self.answers(prompt, real, n_tokens)

    def forced(self, prompt: Tensor, answers: Tensor, real: Tensor | None = None) -> Tensor:
        return 100.0 * F.one_hot(self.answers(prompt, real, answers.shape[1]), BYTES.vocab_size).float()

    def nll(self, tokens: Tensor, chunk: int = 1) -> Tensor:
        return torch.zeros(tokens.shape[0], tokens.shape[1] - min(chunk, 1))


def language_model(kind: str = "mamba2") -> LanguageModel:
    layers = {"mamba2": Mamba2.Config.tiny(), "hax": HAX.Config.tiny(), "attention": Attention.Config.tiny()}
    config = Backbone.Config.alternating(8, (Mamba2.Config.tiny(), layers[kind]), 2.0)
    return LanguageModel(LanguageModel.Config(BYTES.vocab_size, config, embedding_std=0.5)).double().eval()


def scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "commit")} for row in result["rows"]]


def test_a_perfect_model_finds_everything() -> None:
    cheat = Answering(lambda text: f" {listed(solve(text))}.")
    suite = Suite(TINY, (700,), (0.0, 0.5))
    result = evaluate_long(cheat, BYTES, suite, n=3)
    assert len(result["rows"]) == 2 * len(TINY) - 2
    for row in result["rows"]:
        assert (row["found"], row["exact"], row["n"]) == (1.0, 1.0, 3)
        assert row["nll"] == pytest.approx(0, abs=1e-6)
        assert row["found_se"] == row["exact_se"] == 0
        assert 580 < row["tokens"] <= 700 - 8
    assert all(row["found"] == 1 for row in result["averages"])
    assert {row["task"] for row in result["averages"]} == {*TINY, "all"}
    assert json.loads(json.dumps(result)) == result


def test_a_constant_model_finds_what_is_there_by_chance_only() -> None:
    """It is right where 4821 is, and forced it is right digit by digit; its certainty costs it 100 nats a digit."""
    suite = Suite({"needle-noise": TINY["needle-noise"]}, (600,), (0.5,))
    answers = [prompt_of("needle-noise", TINY["needle-noise"], 0, 600, 0.5, i, reserve=8).answers[0] for i in range(4)]
    assert len(set(answers)) == 4
    (row,) = evaluate_long(Answering(lambda _: f" {answers[2]}."), BYTES, suite, n=4)["rows"]
    assert (row["found"], row["exact"]) == (0.25, 0.25)
    assert row["found_se"] == pytest.approx(0.5 / 2)
    wrong = np.mean([[a != b for a, b in zip(answer, answers[2], strict=True)] for answer in answers])
    assert row["nll"] == pytest.approx(100 * wrong, rel=1e-3)
    assert row["chance"] == pytest.approx(1 / 9000)
    assert row["guesser"] is None


def test_a_model_that_knows_the_key_alone_scores_as_the_guesser() -> None:
    """It answers with the first code that its key has anywhere: right where that stands in the asked place."""

    def blind(text: str) -> str:
        thing = text.rpartition("code for ")[2][:-3]
        return f" {text.partition(f'the code for {thing} is ')[2][:4]}."

    suite = Suite({"joint-recall": TINY["joint-recall"]}, (512,), (0.5,))
    (row,) = evaluate_long(Answering(blind), BYTES, suite, n=150)["rows"]
    assert row["guesser"] == pytest.approx(1 / 3, abs=1e-3)
    assert abs(row["found"] - row["guesser"]) < 3 * row["found_se"]


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    model = language_model()
    torch.nn.init.zeros_(model.embedding.weight)
    for row in evaluate_long(model, BYTES, SMALL, n=1, lengths=(512,), depths=(0.5,))["rows"]:
        assert row["nll"] == pytest.approx(math.log(257), rel=1e-5)
        assert row["found"] == row["exact"] == 0


def test_only_the_answers_own_tokens_count() -> None:
    """Neither the spaces, commas and "and" between them, nor the full stop, in bytes; words keep their space."""
    prompt = prompt_of("multi-value", replace(TINY["multi-value"], n_values=3), 0, 600, 0.5, 0)
    asked = long_context._asked(prompt, BYTES)
    text = "".join(chr(i) if kept else "_" for i, kept in zip(asked.answer, asked.counts, strict=True))
    a, b, c = prompt.answers
    assert text == f"_{a}__{b}_____{c}_"

    class Words:
        eos_id = 0
        words: list[str]

        def encode(self, text: str) -> list[int]:
            found = re.findall(r" ?\w+|[^\w\s]|\s", text)
            self.words = [
                *getattr(self, "words", []),
                *(word for word in found if word not in getattr(self, "words", [])),
            ]
            return [self.words.index(word) for word in found]

        def decode(self, ids: Any) -> str:
            return "".join(self.words[i] for i in ids)

    words = Words()
    asked = long_context._asked(prompt, words)
    assert [words.words[i] for i, kept in zip(asked.answer, asked.counts, strict=True) if kept] == [
        f" {a}",
        f" {b}",
        f" {c}",
    ]


def test_the_end_token_ends_the_continuation() -> None:
    suite = Suite({"needle-noise": TINY["needle-noise"]}, (600,), (0.5,))

    class Late(Answering):
        def generate(self, prompt: Tensor, n_tokens: int, real: Tensor | None = None) -> Tensor:
            return torch.cat(
                [torch.full((len(prompt), 1), BYTES.eos_id), super().generate(prompt, n_tokens - 1, real)], 1
            )

    assert evaluate_long(Late(lambda text: f" {solve(text)[0]}."), BYTES, suite, n=2)["rows"][0]["found"] == 0
    later = Answering(lambda text: f"       {solve(text)[0]}.")
    assert evaluate_long(later, BYTES, suite, n=2)["rows"][0]["found"] == 1
    assert evaluate_long(later, BYTES, suite, n=2, slack=2)["rows"][0]["found"] == 0


def test_longer_answers_of_others_give_no_more_time() -> None:
    """A row is read as far as its own answer and the slack, whoever shares its batch."""
    suite = Suite({"needle-words": TINY["needle-words"]}, (600,), (0.5,))
    late = Answering(lambda text: f"      {solve(text)[0]}.")
    for slack, found in ((2, 0.0), (5, 1.0)):
        (row,) = evaluate_long(late, BYTES, suite, n=8, slack=slack)["rows"]
        assert row["found"] == found


@pytest.mark.parametrize("kind", ["mamba2", "hax", "attention"])
def test_padding_and_segments_change_nothing(kind: str) -> None:
    """Rows of unlike length, padded on the left, are answered as each alone, whole or in segments."""
    model = language_model(kind)
    rows = [torch.randint(0, 256, (n,)) for n in (33, 50, 41)]
    answers = torch.randint(0, 256, (3, 6))
    prompt, real = torch.full((3, 50), 256), torch.zeros(3, 50, dtype=torch.bool)
    for i, row in enumerate(rows):
        prompt[i, 50 - len(row) :] = row
        real[i, 50 - len(row) :] = True
    for segment in (50, 16, 7):
        together = OwnModel(model, segment)
        logits, new = together.forced(prompt, answers, real), together.generate(prompt, 5, real)
        assert new.shape == (3, 5)
        for i, row in enumerate(rows):
            tokens = torch.cat([row, answers[i]])[None]
            with torch.no_grad():
                expected, _ = model(tokens)
            torch.testing.assert_close(logits[i], expected[0, len(row) - 1 : -1])
            torch.testing.assert_close(new[i], model.generate(row[None], 5)[0, len(row) :])


def test_the_prompt_is_read_once_and_another_one_again() -> None:
    model = language_model()
    reader, calls = OwnModel(model), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    one, two = torch.randint(0, 256, (1, 20)), torch.randint(0, 256, (1, 20))
    first = reader.forced(one, one[:, :1])
    reader.generate(one, 3)
    assert len(calls) == 1
    assert not torch.equal(first, reader.forced(two, one[:, :1]))
    torch.testing.assert_close(reader.forced(one, one[:, :1]), first)


def test_batches_change_nothing() -> None:
    model = language_model("hax")
    one, many = (
        evaluate_long(model, BYTES, SMALL, n=2, lengths=(512,), depths=(1.0,), batch_tokens=size)
        for size in (1, 10_000)
    )
    for a, b in zip(scores(one), scores(many), strict=True):
        assert {k: v for k, v in a.items() if k[:3] != "nll"} == {k: v for k, v in b.items() if k[:3] != "nll"}
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
    counted = Answering(lambda _: "")
    evaluate_long(counted, BYTES, SMALL, n=3, lengths=(512,), batch_tokens=1050)
    assert counted.batches == 2 * 2 * 5  # three prompts of at most 504 tokens: two, then one; five cases


def test_a_case_is_the_same_whatever_else_is_asked() -> None:
    model = language_model()
    alone = evaluate_long(model, BYTES, SMALL, n=2, lengths=(512,), depths=(1.0,))
    among = evaluate_long(model, BYTES, SMALL, n=2)
    assert [row for row in scores(among) if row["length"] == 512 and row["depth"] in (1.0, None)] == scores(alone)
    other = evaluate_long(model, BYTES, SMALL, n=1, lengths=(512,), depths=(1.0,), seed=1)
    assert scores(other) != scores(alone)


@contextmanager
def counted(shown: list[tuple[int, int]]) -> Generator[Callable[[int, int], None]]:
    yield lambda done, total: shown.append((done, total))


def test_a_stopped_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "tiny.json"
    cheat = Answering(lambda text: f" {listed(solve(text))}.")
    whole = evaluate_long(cheat, BYTES, SMALL, n=3, batch_tokens=1)
    rows, total = cheat.rows, 3 * (512 + 700) * 5
    shown: list[tuple[int, int]] = []
    asked = iter(range(100))
    with pytest.raises(StoppedError, match=r"stopped after 2 of 10 cases of .*tiny.json; the same command goes on"):
        evaluate_long(
            cheat,
            BYTES,
            SMALL,
            n=3,
            batch_tokens=1,
            out=out,
            counting=lambda _: counted(shown),
            stop=lambda: next(asked) == 7,
        )
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert shown[0] == (0, total)
    assert shown[-1] == (512 * 8, total)
    cheat.rows = 0
    shown.clear()
    again = evaluate_long(cheat, BYTES, SMALL, n=3, batch_tokens=1, out=out, counting=lambda _: counted(shown))
    assert scores(again) == scores(whole)
    assert cheat.rows == rows * 8 // 10
    assert shown[0] == (2 * 3 * 512, total)
    assert shown[-1] == (total, total)
    assert json.loads(out.read_text()) == again
    cheat.rows = 0
    assert evaluate_long(cheat, BYTES, SMALL, n=3, out=out) == again
    assert cheat.rows == 0


def test_a_record_is_joined_by_what_belongs_to_it_only(tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    model = language_model()
    evaluate_long(model, BYTES, SMALL, n=1, lengths=(512,), depths=(0.0,), out=out)
    more = Suite({"needle-noise": TINY["needle-noise"]}, (600,), (0.5,))
    joined = evaluate_long(model, BYTES, more, n=1, out=out)
    assert {(row["task"], row["length"]) for row in joined["rows"]} == {
        ("multi-key", 512),
        ("joint-recall-dense", 512),
        ("common-words", 512),
        ("needle-noise", 600),
    }
    before = out.read_bytes()
    with pytest.raises(RunError, match=r"holds results of something else .*seed: 0 -> 1"):
        evaluate_long(model, BYTES, SMALL, n=1, seed=1, out=out)
    changed = Suite({"multi-key": replace(TINY["multi-key"], n_keys=5)}, (512,))
    with pytest.raises(RunError, match=r"tasks.multi-key.n_keys: 4 -> 5"):
        evaluate_long(model, BYTES, changed, n=1, out=out)
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    with pytest.raises(RunError, match="weights: "):
        evaluate_long(model, BYTES, SMALL, n=1, out=out)
    assert out.read_bytes() == before
    fresh = evaluate_long(model, BYTES, more, n=1, out=out, fresh=True)
    assert len(fresh["rows"]) == 1
    out.write_text("{")
    with pytest.raises(RunError, match="no record of a long-context evaluation"):
        evaluate_long(model, BYTES, more, n=1, out=out)


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    result = evaluate_long(Answering(lambda _: ""), BYTES, SMALL, n=1, lengths=(220, 512), depths=(0.5,))
    (left,) = [row for row in result["rows"] if row["status"] == "left out"]
    assert (left["task"], left["length"]) == ("multi-key", 220)
    assert "takes" in left["why"]
    assert not [row for row in result["averages"] if (row["task"], row["length"]) == ("all", 220)]
    assert [row for row in result["averages"] if (row["task"], row["length"]) == ("all", 512)]
    lost = Suite({"lost": Needles.Config(haystack="files", files=("lost.txt",))}, (512,))
    with pytest.raises(ConfigError, match="cannot be read"):  # a file that is not there is no length
        evaluate_long(Answering(lambda _: ""), BYTES, lost, n=1)


def test_averages_weigh_tasks_alike() -> None:
    def row(task: str, depth: float, found: float) -> dict[str, Any]:
        measured = {"found": found, "nll": 0.0, "exact": 0.0}
        return {"task": task, "length": 1, "depth": depth, "status": "measured", **measured}

    found = averages([row("a", 0, 0.0), row("a", 1, 0.5), row("a", 0.5, 1.0), row("b", 0, 1.0)])
    assert {each["task"]: each["found"] for each in found} == {"a": 0.5, "b": 1.0, "all": 0.75}


def test_models_are_asked_at_rest_and_left_as_they_were() -> None:
    model = language_model().train()
    modes: list[bool] = []
    model.backbone.register_forward_hook(lambda module, *_: modes.append(module.training))
    evaluate_long(model, BYTES, SMALL, n=1, lengths=(512,), depths=(0.0,))
    perplexity_by_position(model, [(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool))])
    assert modes
    assert not any(modes)
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths must be positive"),
        ({"lengths": (0,)}, "lengths must be positive"),
        ({"depths": (1.2,)}, r"depths must lie in \[0, 1\]"),
        ({"n": 0}, "must be at least 1"),
        ({"slack": -1}, "slack -1 at least 0"),
        ({"suite": "tny"}, "did you mean 'tiny'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    everything: dict[str, Any] = {"suite": SMALL, **options}
    with pytest.raises(ConfigError, match=message):
        evaluate_long(Answering(lambda _: ""), BYTES, **everything)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(RecollectError, match="Linear is no language model"):
        as_long_model(torch.nn.Linear(2, 2))
    with pytest.raises(RecollectError, match="segment must be at least 1"):
        OwnModel(language_model(), 0)


def rows_of(*shapes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(0, 256, shape), torch.rand(shape) < 0.8) for shape in shapes]


@pytest.mark.parametrize(("segment", "chunk"), [(1000, 1000), (16, 5), (7, 64), (1, 1)])
def test_nll_in_chunks_is_that_of_one_pass(segment: int, chunk: int) -> None:
    model = language_model("hax")
    tokens = torch.randint(0, 256, (3, 41))
    with torch.no_grad():
        logits, _ = model(tokens)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    found = OwnModel(model, segment).nll(tokens, chunk)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_no_more_logits_than_a_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    sizes: list[int] = []
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: sizes.append(h.shape[:-1].numel()) or head(h))
    found = perplexity_by_position(model, rows_of((2, 300)), chunk=64)
    assert max(sizes) == 64
    assert sum(sizes) == 2 * 299
    sizes.clear()
    evaluate_long(model, BYTES, SMALL, n=2, lengths=(700,), depths=(0.0,))
    assert max(sizes) < 100
    assert found["n_tokens"] > 400


def test_perplexity_by_position_is_the_mean_over_each_bin() -> None:
    model, rows = language_model(), rows_of((2, 50), (1, 23), (3, 37))
    found = perplexity_by_position(model, iter(rows), 10, chunk=7)
    by_position: dict[int, list[tuple[int, float]]] = {}
    number = 0
    for tokens, mask in rows:
        with torch.no_grad():
            logits, _ = model(tokens)
        nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        for row, kept in zip(nats.tolist(), mask[:, 1:].tolist(), strict=True):
            for i, (value, counts) in enumerate(zip(row, kept, strict=True)):
                if counts:
                    by_position.setdefault(i + 1, []).append((number, value))
            number += 1
    assert found["n_rows"] == number == 6
    everything = [value for values in by_position.values() for _, value in values]
    assert found["nats"] == pytest.approx(np.mean(everything), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(np.mean(everything))), rel=1e-5)
    assert found["n_tokens"] == len(everything)
    assert [(b["from"], b["to"]) for b in found["linear"]] == [(1, 10), (10, 20), (20, 30), (30, 40), (40, 50)]
    assert [(b["from"], b["to"]) for b in found["geometric"]] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64)]
    for each in (*found["linear"], *found["geometric"]):
        there = [pair for i in range(each["from"], each["to"]) for pair in by_position.get(i, [])]
        values = np.array([value for _, value in there])
        assert each["n"] == len(values)
        assert each["nats"] == pytest.approx(values.mean(), rel=1e-5)
        residuals = np.zeros(6)
        for row, value in there:
            residuals[row] += value - values.mean()
        n_rows = len({row for row, _ in there})
        error = math.sqrt(float((residuals**2).sum()) * n_rows / (n_rows - 1)) / len(values)
        assert each["se"] == pytest.approx(error, rel=1e-4)
    assert json.loads(json.dumps(found)) == found


def test_perplexity_by_position_says_what_is_wrong() -> None:
    model = language_model()
    with pytest.raises(ConfigError, match="no token counts"):
        perplexity_by_position(model, [])
    with pytest.raises(ConfigError, match="must be of one shape"):
        perplexity_by_position(model, [(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="block 0"):
        perplexity_by_position(model, [], 0)
    shown: list[tuple[int, int]] = []
    with pytest.raises(StoppedError, match="after 2 batches"):
        perplexity_by_position(
            model, rows_of(*[(1, 9)] * 5), counting=lambda _: counted(shown), stop=lambda: len(shown) == 2
        )
    assert shown == [(1, 5), (2, 5)]


def transformers_model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    common = {"vocab_size": 257, "pad_token_id": 256, "bos_token_id": 256, "eos_token_id": None}
    if kind == "mamba2":
        config = transformers.Mamba2Config(
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=8,
            **common,
        )
    elif kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=1024, **common)
    else:
        config = transformers.Gemma2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
            final_logit_softcapping=0.05,
            sliding_window=16,
            **common,
        )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["mamba2", "gpt2", "gemma2"])
def test_models_of_transformers_are_asked_alike(kind: str) -> None:
    model = transformers_model(kind)
    reader = as_long_model(model)
    assert isinstance(reader, TransformersModel)
    rows = [torch.randint(0, 256, (n,)) for n in (33, 50)]
    answers = torch.randint(0, 256, (2, 4))
    prompt, real = torch.full((2, 50), 256), torch.zeros(2, 50, dtype=torch.bool)
    for i, row in enumerate(rows):
        prompt[i, 50 - len(row) :] = row
        real[i, 50 - len(row) :] = True
    logits, new = reader.forced(prompt, answers, real), reader.generate(prompt, 5, real)
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = model(torch.cat([row, answers[i]])[None]).logits
        torch.testing.assert_close(logits[i], expected[0, len(row) - 1 : -1], rtol=1e-3, atol=1e-4)
        greedy = row
        for _ in range(5):
            with torch.no_grad():
                greedy = torch.cat([greedy, model(greedy[None]).logits[:, -1].argmax(-1)])
        assert new[i].tolist() == greedy[len(row) :].tolist()
    tokens = torch.randint(0, 256, (2, 60))
    with torch.no_grad():
        full = model(tokens).logits
    expected = F.cross_entropy(full[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(reader.nll(tokens, 16), expected, rtol=1e-4, atol=1e-4)
    assert reader._split == (kind != "gemma2")  # which squashes its logits: states and head alone would be wrong


def test_a_model_of_transformers_is_evaluated() -> None:
    model = transformers_model("mamba2")
    result = evaluate_long(model, BYTES, SMALL, n=2, lengths=(512,), depths=(0.5,))
    assert [row["status"] for row in result["rows"]] == ["measured"] * 3
    assert all(5 < row["nll"] < 6.2 for row in result["rows"])
    assert len(result["weights"]) == 12
    found = perplexity_by_position(model, rows_of((2, 40)))
    assert 5 < found["nats"] < 6.5


def test_an_early_end_fills_the_row() -> None:
    model = transformers_model("gpt2")
    prompt = torch.randint(0, 256, (1, 10))
    first = TransformersModel(model).generate(prompt, 1).item()
    model.generation_config.eos_token_id = [first, 3]
    assert TransformersModel(model).generate(prompt, 6).tolist() == [[first] * 6]


def test_the_digest_tells_weights_apart() -> None:
    one, two = language_model(), language_model()
    assert weights_digest(one) == weights_digest(OwnModel(one)) != weights_digest(two)
    assert weights_digest(Answering(lambda _: "")) == ""


def test_pictures_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    from recollect.eval.long_pictures import draw_heat_maps, draw_positions

    result = evaluate_long(Answering(lambda text: f" {listed(solve(text))}."), BYTES, SMALL, n=1, lengths=(220, 600))
    both, alone = {"a": result, "b": result}, {"a": result}
    maps = [draw_heat_maps(both), draw_heat_maps(alone, score="nll", trained_at=220, title="T")]
    assert all(png.startswith(b"\x89PNG") for png in maps)
    assert maps[1] != draw_heat_maps(alone, score="exact", trained_at=220, title="T")
    with pytest.raises(RecollectError, match="no case was measured"):
        draw_heat_maps({"a": result}, tasks=["needle-noise"])
    positions = perplexity_by_position(language_model(), rows_of((3, 120)), 32)
    lines = [
        draw_positions({"a": positions, "b": positions}),
        draw_positions({"a": positions}, bins="linear", trained_at=64, title="T"),
        draw_positions({"a": positions}, per_byte={"a": 4.0}),
    ]
    assert all(png.startswith(b"\x89PNG") for png in lines)
    assert len(set(lines)) == 3
    with pytest.raises(RecollectError, match="nothing to draw from position 999 on"):
        draw_positions({"a": positions}, after=999)
