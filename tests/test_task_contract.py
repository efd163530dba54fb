"""What ``recollect.tasks.base`` promises, over every registered task: adding a task adds no test code.

A sample is read back from its text by a reader that knows the words (capitals are contexts, small letters keys, numbers
values, ``?`` asks) and no task.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from recollect.core.config import dumps, from_dict, to_dict
from recollect.core.errors import ConfigError
from recollect.tasks import TASKS, AssociativeRecall, JointRecall, MultiLevelRecall, TaskConfig, Zoology, splits
from recollect.tasks.base import Task
from recollect.tasks.batch import TokenBatch, accuracy
from recollect.tasks.splits import PARTS, Facts, belongs, content_hash

CASES: dict[str, TaskConfig] = {
    **TASKS,
    "masked": JointRecall.Config.masked(),
    "mini": JointRecall.Config.mini(),
    "every-key": AssociativeRecall.Config(n_keys=(2, 5), n_queries=None),
    "small-masked": JointRecall.Config(
        n_contexts=(1, 3), n_keys=(2, 4), n_values=4, hide_answers=True, random_ids=True, n_queries=2, max_keys=6
    ),
    "no-level": MultiLevelRecall.Config(levels=(), n_keys=(2, 3)),
    "three-levels": MultiLevelRecall.Config(
        levels=((1, 2), (2, 2), (1, 3)), n_keys=(2, 3), n_values=4, random_ids=True, max_size=(2, 4, 3, 3)
    ),
    "small-zoology": Zoology.Config(sizes=((16, 3), (12, 2)), vocab_size=24, power=0.5),
}


@pytest.fixture(params=sorted(CASES))
def task(request: pytest.FixtureRequest) -> Task:
    return CASES[request.param].build()


class Text(NamedTuple):
    """A sample as its text tells it."""

    told: dict[tuple[str, ...], int]
    asked: list[tuple[str, ...]]
    answers: list[int]


def read(text: str) -> Text:
    """Values by path (contexts, key), the paths asked for, and the answers behind ``->``."""
    body, _, answers = text.partition(" -> ")
    words = [*body.split(), ""]
    told: dict[tuple[str, ...], int] = {}
    asked: list[tuple[str, ...]] = []
    contexts: dict[int, str] = {}
    for word, after in pairwise(words):
        if context := re.fullmatch(r"(\d*)([A-Z]\d*)", word):
            contexts[int(context[1] or 1)] = context[2]
        elif re.fullmatch(r"[a-z]\d*", word):
            path = (*(contexts[level] for level in sorted(contexts)), word)
            if after == "?":
                asked.append(path)
            else:
                assert path not in told, f"{path} is told twice in: {text}"
                told[path] = int(after)
    return Text(told, asked, [int(answer) for answer in answers.split()])


def row_of(batch: TokenBatch, row: int, length: int) -> TokenBatch:
    return TokenBatch(*(array[row : row + 1, :length] for array in batch[:3]), batch.sizes[row : row + 1])


def check(task: Task, batch: TokenBatch) -> None:
    """Every row of a batch is a sample of its size: arrays, text and the perfect solver agree."""
    for array, dtype in zip(batch, (np.int64, np.int64, np.bool_, np.int64), strict=True):
        assert array.dtype == dtype
        assert array.flags.owndata
    assert batch.tokens.shape == batch.labels.shape == batch.mask.shape
    assert batch.sizes.shape == (len(batch.tokens), len(task.axes))
    assert min(batch.tokens.min(), batch.labels.min()) >= 0
    assert max(batch.tokens.max(), batch.labels.max()) < task.vocab_size
    follows = batch.labels[:, :-1] == batch.tokens[:, 1:]
    perfect = task.oracles["perfect"](batch)
    for row, size in enumerate(batch.sizes.tolist()):
        length = task.length(tuple(size))
        one = row_of(batch, row, length)
        asked = one.mask[0]
        assert asked.any()
        assert not batch.mask[row, length:].any()
        assert (follows[row, : length - 1] | asked[: length - 1]).all(), "a label that neither follows nor answers"
        assert (task.oracles["perfect"](one) == perfect[row, :length])[0, asked].all(), "padding is read"
        text = read(task.render(one.tokens[0], one.labels[0]))
        assert len(text.asked) == len(text.answers) == asked.sum()
        assert len(set(text.asked)) == len(text.asked)
        assert [text.told[path] for path in text.asked] == text.answers
        assert task.render(one.tokens[0], one.labels[0]).startswith(task.render(one.tokens[0]))
        assert task.render(batch.tokens[row], batch.labels[row]).split()[0] == task.render(one.tokens[0]).split()[0]
    assert (accuracy(perfect, batch) == 1).all()


def some_cells(task: Task) -> list[tuple[int, ...]]:
    """The smallest, a middle and the largest size."""
    cells = task.cells()
    return list(dict.fromkeys((cells[0], cells[len(cells) // 2], cells[-1])))


def smallest(task: Task) -> tuple[int, ...]:
    """A size that is below most ranges and still has two keys."""
    return (*[1] * (len(task.axes) - 1), 2)


def test_sizes_and_lengths(task: Task) -> None:
    cells = task.cells()
    assert len(set(cells)) == len(cells) > 0
    assert all(len(cell) == len(task.axes) and min(cell) >= 1 for cell in cells)
    assert task.max_length == max(task.length(cell) for cell in cells)


@pytest.mark.parametrize("split", [None, "train", "valid", "test"])
def test_batches_of_one_size(task: Task, split: splits.Split | None) -> None:
    rng = np.random.default_rng(0)
    for size in [*some_cells(task), smallest(task)]:
        batch = task.batch(rng, 3, size=size, split=split)
        assert batch.tokens.shape == (3, task.length(size))
        assert (batch.sizes == size).all()
        check(task, batch)


def test_a_batch_draws_its_size_from_the_cells(task: Task) -> None:
    rng = np.random.default_rng(0)
    cells = set(task.cells())
    drawn = [task.batch(rng, 2) for _ in range(60)]
    assert all((batch.sizes == batch.sizes[0]).all() for batch in drawn)
    seen = {tuple(batch.sizes[0].tolist()) for batch in drawn}
    assert seen <= cells
    assert len(seen) > len(cells) / 4 if len(cells) < 60 else len(seen) > 30


def test_batches_of_mixed_sizes(task: Task) -> None:
    batch = task.mixed_batch(np.random.default_rng(1), 40, split="train")
    sizes = {tuple(size) for size in batch.sizes.tolist()}
    assert sizes <= set(task.cells())
    assert len(sizes) > 1
    assert batch.tokens.shape == (40, max(task.length(size) for size in sizes))
    check(task, batch)


def test_everything_comes_from_the_generator(task: Task) -> None:
    for draw in (task.batch, task.mixed_batch):
        a, b, c = (draw(np.random.default_rng(seed), 4, split="train") for seed in (3, 3, 4))
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
        assert a.tokens.shape != c.tokens.shape or (a.tokens != c.tokens).any()


def test_oracles_read_nothing_but_the_question(task: Task) -> None:
    """Neither labels, mask or sizes, nor the answers in the input: those are overwritten by others here."""
    assert {"uniform", "frequent", "perfect"} <= set(task.oracles)
    assert task.blind is None or task.blind in task.oracles
    batch = task.mixed_batch(np.random.default_rng(2), 30)
    tokens = batch.tokens.copy()
    answered = np.zeros_like(batch.mask)
    answered[:, 1:] = batch.mask[:, :-1] & (batch.tokens[:, 1:] == batch.labels[:, :-1])
    tokens[answered] = np.random.default_rng(3).permutation(tokens[answered])
    blank = TokenBatch(tokens, np.zeros_like(tokens), np.zeros_like(batch.mask), np.zeros_like(batch.sizes))
    for name, solve in task.oracles.items():
        answers = solve(batch)
        assert answers.shape == tokens.shape
        assert answers.dtype == np.int64
        assert (solve(blank) == answers)[batch.mask].all(), name
        score = accuracy(answers, batch).mean()
        assert score == 1 if name == "perfect" else score < 0.9, name


def test_parts_share_nothing_however_small(task: Task) -> None:
    rng = np.random.default_rng(4)
    parts: dict[str, set[frozenset[tuple[tuple[str, ...], int]]]] = {}
    for split in PARTS:
        batch = task.batch(rng, 200, size=smallest(task), split=split)
        parts[split] = {frozenset(read(task.render(tokens)).told.items()) for tokens in batch.tokens}
    assert all(parts.values())
    assert not parts["train"] & parts["valid"]
    assert not parts["train"] & parts["test"]
    assert not parts["valid"] & parts["test"]


def test_parts_are_eight_to_one_to_one(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[Facts] = []

    def recorded(told: Facts, split: splits.Split) -> np.ndarray:
        first.append(Facts(told.facts.copy(), told.used.copy()))
        return belongs(told, split)

    monkeypatch.setattr(splits, "belongs", recorded)
    task.batch(np.random.default_rng(5), 3000, size=task.cells()[-1], split="train")
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        assert belongs(first[0], split).mean() == pytest.approx(share, abs=0.05), split


def test_bad_requests_end_in_one_line(task: Task) -> None:
    rng = np.random.default_rng(0)
    largest = task.cells()[-1]
    bad = [(), (*largest, 1), tuple(0 for _ in largest), tuple(n + 100 for n in largest)]
    for size in bad:
        with pytest.raises(ConfigError, match=r"size .* outside 1\.\.") as error:
            task.batch(rng, 2, size=size)
        assert "\n" not in str(error.value)
    for draw in (task.batch, task.mixed_batch):
        with pytest.raises(ConfigError, match="batch_size must be at least 1"):
            draw(rng, 0)


@pytest.mark.parametrize("name", sorted(CASES))
def test_configs_are_plain_data(name: str) -> None:
    config = CASES[name]
    assert from_dict(TaskConfig, to_dict(config)) == config
    assert dumps(config) == dumps(type(config.build())(config).config)  # type: ignore[call-arg]


def test_a_size_too_small_to_be_split_says_so() -> None:
    task = JointRecall(JointRecall.Config(n_contexts=(1, 1), n_keys=(1, 1), n_values=1))
    lucky = belongs(Facts(np.zeros((1, 1, 3), dtype=np.int64), np.ones((1, 1), dtype=np.bool_)), "train")
    for split in ("valid", "test") if lucky else ("train",):
        with pytest.raises(ConfigError, match=f"no sample of the {split} part") as error:
            task.batch(np.random.default_rng(0), 2, split=split)
        assert "\n" not in str(error.value)


def test_a_part_depends_on_what_is_told_and_not_on_the_order() -> None:
    rng = np.random.default_rng(6)
    facts = rng.integers(16, size=(2000, 6, 3))
    used = rng.random((2000, 6)) < 0.8
    order = rng.permuted(np.tile(np.arange(6), (2000, 1)), axis=1)
    again = Facts(np.take_along_axis(facts, order[..., None], axis=1), np.take_along_axis(used, order, axis=1))
    assert (content_hash(Facts(facts, used)) == content_hash(again)).all()
    member = np.stack([belongs(again, split) for split in PARTS])
    assert (member.sum(axis=0) == 1).all()
    other = facts.copy()
    other[~used] += 1
    assert (content_hash(Facts(other, used)) == content_hash(Facts(facts, used))).all(), "what is not used counts"
    other[:, 0, 2] += 1
    changed = content_hash(Facts(other, used)) != content_hash(Facts(facts, used))
    assert (changed == used[:, 0]).all()
