"""Multi-query associative recall as Zoology has it, and the other tasks' examples as their files print them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recollect.core.errors import ConfigError
from recollect.tasks import (
    AssociativeRecall,
    MultiLevelRecall,
    Zoology,
    accuracy,
    associative_recall,
    multi_level,
    zoology,
)
from recollect.tasks.batch import TokenBatch


def plain(module: Any) -> str:
    return " ".join((module.__doc__ or "").replace("``", "").split())


def test_keys_and_values_come_from_their_halves_and_none_twice() -> None:
    task = Zoology()
    batch = task.batch(np.random.default_rng(0), 200, size=(64,))
    assert batch.tokens.shape == (200, 256)
    keys, values = batch.tokens[:, 0:128:2], batch.tokens[:, 1:128:2]
    assert (keys >= 1).all()
    assert (keys < 4096).all()
    assert (values >= 4096).all()
    for drawn in (keys, values):
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
        assert np.abs(drawn % 4096 - 2048).mean() == pytest.approx(1024, abs=25)
    assert (batch.mask.sum(axis=1) == 64).all()
    assert not batch.mask[:, :128].any()
    assert not batch.mask[:, 1::2].any()
    for tokens, labels, mask in zip(batch.tokens, batch.labels, batch.mask, strict=True):
        answers = dict(zip(tokens[0:128:2].tolist(), tokens[1:128:2].tolist(), strict=True))
        assert [answers.pop(int(key)) for key in tokens[mask]] == labels[mask].tolist()
        assert not answers
    followers = batch.tokens[:, 1:][batch.mask[:, :-1]]
    assert (followers == batch.labels[:, :-1][batch.mask[:, :-1]]).mean() < 0.01, "an answer follows its query"


def test_distances_follow_the_power_law() -> None:
    """The first key's distance is one draw by the weights; all together are draws without repetition."""
    task = Zoology(Zoology.Config(sizes=((24, 4),), power=0.3))
    batch = task.batch(np.random.default_rng(1), 20000)
    place = np.argmax((batch.tokens == batch.tokens[:, :1]) & batch.mask, axis=1)
    gaps = (place - 8) // 2
    weights = np.arange(1, 9) ** (0.3 - 1.0)
    expected = 20000 * weights / weights.sum()
    assert np.abs(np.bincount(gaps, minlength=8) - expected).max() < 5 * np.sqrt(expected.max())
    assert np.all(batch.mask.sum(axis=1) == 4)


def test_other_places_are_random_and_never_look_like_what_counts() -> None:
    task = Zoology(Zoology.Config(sizes=((32, 4),), vocab_size=64))
    batch = task.batch(np.random.default_rng(2), 4000)
    others = ~batch.mask
    others[:, :8] = False
    keys = batch.tokens[:, 0:8:2]
    again = (batch.tokens[:, :, None] == keys[:, None]).any(-1)
    assert not (again & others).any()
    first = batch.tokens[:, 8]
    assert (again[:, 8] | (first >= 32)).all()
    counts = np.bincount(batch.tokens[:, 9], minlength=64)
    assert counts[0] == 0
    assert (counts[1:] > 0).all()
    assert counts[32:].sum() / counts.sum() == pytest.approx(32 / 59, abs=0.05)


def test_a_size_between_has_the_length_of_the_next_larger() -> None:
    task = Zoology()
    assert [task.length((n,)) for n in (1, 4, 5, 8, 9, 17, 64)] == [64, 64, 128, 128, 256, 256, 256]
    assert task.batch(np.random.default_rng(0), 2, size=(5,)).mask.sum() == 10
    assert task.blind is None


def test_scores_of_its_oracles() -> None:
    task = Zoology()
    batch = task.batch(np.random.default_rng(3), 500, size=(8,))
    scores = {name: accuracy(solve(batch), batch).mean() for name, solve in task.oracles.items()}
    assert scores["frequent"] == pytest.approx(1 / 8, abs=1e-9)
    assert scores["uniform"] < 0.003
    assert scores["perfect"] == 1


def test_small_vocabularies_are_filled() -> None:
    task = Zoology(Zoology.Config(sizes=((40, 10),), vocab_size=24))
    batch = task.batch(np.random.default_rng(4), 50, split="test")
    assert (accuracy(task.oracles["perfect"](batch), batch) == 1).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes is empty"),
        ({"sizes": ((64, 0),)}, "at least 1 pair"),
        ({"sizes": ((63, 4),)}, r"even and at least 4 times its pairs, got \(63, 4\)"),
        ({"sizes": ((64, 17),)}, r"even and at least 4 times its pairs, got \(64, 17\)"),
        ({"sizes": ((64, 4), (128, 4))}, "4 pairs are given twice"),
        ({"vocab_size": 131}, "vocab_size must be at least 132 for 64 pairs, got 131"),
        ({"power": 0.0}, "power must be positive"),
    ],
)
def test_impossible_configs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Zoology.Config(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": ((0, 2),)}, "levels.0 must be at least 1"),
        ({"levels": ((1, 2), (3, 2))}, r"levels.1 is a range \(low, high\), got \(3, 2\)"),
        ({"max_size": (4, 4)}, "max_size has a number for each of 2 levels and one for keys, got 2"),
        ({"max_size": (4, 3, 4)}, "max_size.1 must be at least 4"),
        ({"n_queries": 9}, "n_queries must be at most 8"),
        ({"vocab_size": 37}, "vocab_size must be at least 38"),
    ],
)
def test_impossible_levels(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiLevelRecall.Config(**values)
    with pytest.raises(ConfigError, match="n_queries must be at most 1"):
        AssociativeRecall.Config(n_keys=(1, 4), n_queries=2)


def test_zoology_example_of_the_docs() -> None:
    task = Zoology(Zoology.Config(sizes=((16, 3),), vocab_size=60))
    d, b, h = 4, 2, 8
    told = [d, 34, b, 31, h, 38]
    tokens = np.array([*told, h, 33, 50, 7, d, 9, b, 41, 17, 33])
    labels = np.array([*tokens[1:], 44])
    labels[[6, 10, 12]] = 38, 34, 31
    assert task.render(tokens, labels) in plain(zoology)
    batch = TokenBatch(tokens[None], labels[None], np.zeros((1, 16), dtype=np.bool_), np.array([[3]]))
    assert task.oracles["perfect"](batch)[0, [6, 10, 12]].tolist() == [38, 34, 31]


def test_associative_examples_of_the_docs() -> None:
    task = AssociativeRecall(AssociativeRecall.Config(n_keys=(5, 5)))
    told = [1, 26, 14, 27, 11, 28, 12, 29, 10, 30, 13, 4]
    one = np.array([*told, 28])
    assert task.render(one, np.array([*one[1:], 12])) in plain(associative_recall)
    every = np.array([*told, 28, 12, 30, 13, 26, 14, 29, 10, 27])
    assert task.render(every, np.array([*every[1:], 11])) in plain(associative_recall)
    assert task.length((5,)) == len(one)


def test_multi_level_examples_of_the_docs() -> None:
    task = MultiLevelRecall(MultiLevelRecall.Config(levels=((2, 2), (2, 2)), n_keys=(2, 2), n_queries=1))
    a, b, inner, outer = 26, 27, (28, 29), (30, 31)
    assert task.vocab_size == 32
    cells = [[[(a, 1), (b, 2)], [(b, 3), (a, 4)]], [[(a, 7), (b, 8)], [(a, 5), (b, 6)]]]
    told = [1]
    for i, blocks in enumerate(cells):
        told.append(outer[i])
        for j in (0, 1) if i == 0 else (1, 0):
            told.append(inner[j])
            told += [token for key, value in blocks[j] for token in (key, value + 9)]
    one = np.array([*told, 4, outer[1], inner[1], b])
    assert task.length((2, 2, 2)) == len(one)
    assert task.render(one, np.array([*one[1:], 6 + 9])) in plain(multi_level)
    asked = [outer[1], inner[0], b, 17, a, 16, inner[1], a, 14, b, 15]
    asked += [outer[0], inner[1], b, 12, a, 13, inner[0], b, 11, a]
    every = np.array([*told, 4, *asked])
    assert MultiLevelRecall(replace(task.config, n_queries=None)).length((2, 2, 2)) == len(every)
    assert task.render(every, np.array([*every[1:], 10])) in plain(multi_level)


def test_solvers_blind_to_a_level() -> None:
    """Four outer contexts, two inner, one key: blind to a level is a guess between its values."""
    task = MultiLevelRecall(MultiLevelRecall.Config(levels=((4, 4), (2, 2)), n_keys=(1, 1), n_values=1000))
    batch = task.batch(np.random.default_rng(0), 2000)
    scores = {name: accuracy(solve(batch), batch).mean() for name, solve in task.oracles.items()}
    assert scores["blind-to-level-1"] == pytest.approx(0.25, abs=0.01)
    assert scores["blind-to-level-2"] == pytest.approx(0.5, abs=0.01)
    assert scores["key-majority"] == pytest.approx(0.125, abs=0.01)
    assert scores["context-majority"] == scores["perfect"] == 1
    assert task.blind == "key-majority"
    assert set(MultiLevelRecall(MultiLevelRecall.Config(levels=((2, 3),))).oracles) == {
        "uniform", "frequent", "last", "key-majority", "context-majority", "perfect",
    }  # fmt: skip
    assert MultiLevelRecall(MultiLevelRecall.Config(levels=())).blind is None
