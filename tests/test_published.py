"""The replay of the published stream, beside the same draws made one by one on numpy's global generator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from recollect.core.errors import ConfigError
from recollect.tasks import published
from recollect.tasks.joint_recall import JointRecall, published_stream


@pytest.fixture
def _global_stream() -> Iterator[None]:
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def one_by_one(n_contexts: int, n_keys: int) -> tuple[list[int], list[int]]:
    table = np.random.randint(16, size=(n_contexts, n_keys))
    tokens, mask = [1], [0]
    for asking in (0, 1):
        for context in np.random.permutation(n_contexts):
            tokens.append(42 + context)
            mask.append(0)
            for key in np.random.permutation(n_keys):
                tokens += [26 + key, 10 + table[context, key]]
                mask += [asking, 0]
        tokens += [] if asking else [4]
        mask += [] if asking else [0]
    rest = 1058 - len(tokens)
    return tokens + [3] * rest, mask + [0] * rest


def all_one_by_one(n_samples: int) -> Iterator[tuple[list[int], list[int]]]:
    for _ in range(n_samples):
        for n_contexts in range(5, 17):
            for n_keys in range(5, 17):
                yield one_by_one(n_contexts, n_keys)


@pytest.mark.usefixtures("_global_stream")
def test_the_stream_is_the_one_drawn_one_by_one() -> None:
    np.random.seed(1)
    for (tokens, mask), (inputs, marks) in zip(all_one_by_one(3), published_stream(), strict=False):
        assert inputs.shape == marks.shape == (1058,)
        assert (inputs.dtype, marks.dtype) == (np.int32, np.int8)
        assert inputs.tolist() == tokens
        assert marks.tolist() == mask


def test_the_first_ten_thousand_are_pinned() -> None:
    digest = hashlib.sha256()
    for inputs, mask in islice(published_stream(), 10_000):
        digest.update(inputs.tobytes())
        digest.update(mask.tobytes())
    assert digest.hexdigest() == PINNED


PINNED = "109c97c127698acd6fead8bbd6aac48a1a36c195f92bb96946c45f7334cf73a1"


@pytest.mark.usefixtures("_global_stream")
def test_parts_follow_one_another_in_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer samples a part: what comes before is drawn though it is not handed out, what comes after is not."""
    monkeypatch.setattr(published, "SAMPLES", {"train": 2, "valid": 1, "test": 1})
    np.random.seed(5)
    expected = [tokens for tokens, _ in all_one_by_one(4)]
    assert [inputs.tolist() for inputs, _ in published_stream(5)] == expected
    valid = [inputs.tolist() for inputs, _ in published_stream(5, splits=["valid"])]
    assert valid == expected[288:432]
    ends = [inputs.tolist() for inputs, _ in published_stream(5, splits=("test", "train"))]
    assert ends == expected[:288] + expected[432:]
    with pytest.raises(ConfigError, match="unknown split 'vaild'; did you mean 'valid'"):
        published_stream(splits=["vaild"])  # type: ignore[list-item]


def test_samples_are_those_of_the_task() -> None:
    """Same ids and layout as ``JointRecall.Config.published()``; every question is answered before it is asked."""
    task = JointRecall(JointRecall.Config.published())
    for (inputs, mask), size in islice(zip(published_stream(), task.cells(), strict=False), 0, 144, 13):
        length = task.length(size)
        assert (inputs[length + 1 :] == 3).all()
        assert set(np.unique(inputs)) <= {1, 3, 4, *range(10, 58)}
        text = task.render(inputs[:length].astype(np.int64), inputs[1 : length + 1].astype(np.int64))
        ours = task.batch(np.random.default_rng(0), 1, size=size)
        assert (ours.mask[0] == mask[:length].astype(bool)).all()
        assert text.count("?") == mask.sum() == size[0] * size[1]
        with pytest.raises(ValueError, match="read-only"):
            mask[0] = 1
