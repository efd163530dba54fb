"""Text that models train on: prose, corpora of prose and solved documents, and the words of both."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from recollect.core.errors import ConfigError
from recollect.text.suite import (
    SUITE,
    TINY,
    JointRecallInWords,
    Needles,
    corpus,
    prompt_of,
    vocabulary,
    write_prose,
)
from recollect.text.suite.corpus import with_restated
from recollect.text.suite.prose import sentences
from solving import WordTokenizer, solve


def digests(texts: Sequence[str]) -> set[str]:
    return {hashlib.sha256(text.encode()).hexdigest() for text in texts}


def test_training_and_evaluation_share_nothing() -> None:
    """By name, not by luck: the streams are other streams under the very same seed and numbers."""
    train = [each.text for each in corpus(0, 60, TINY, length=(512, 1024))]
    valid = [each.text for each in corpus(0, 60, TINY, length=(512, 1024), part="valid")]
    asked = [prompt_of(task, config, 0, 1024, 0.5, i) for task, config in TINY.items() for i in range(4)]
    parts = [digests(train), digests(valid), digests([each.text + each.completion for each in asked])]
    assert sum(map(len, parts)) == 120 + 4 * len(TINY)
    assert len(set.union(*parts)) == sum(map(len, parts))
    facts = [set(re.findall(r"(?:secret \w+|code) for [\w ]+ is [\w-]+\.", " ".join(part))) for part in (train, valid)]
    assert facts[0]
    assert not facts[0] & facts[1]


def test_a_corpus_mixes_prose_and_solved_documents() -> None:
    documents = list(corpus(4, 120, TINY, length=(512, 2048), prose=0.3))
    assert documents == list(corpus(4, 120, TINY, length=(512, 2048), prose=0.3))
    assert documents[:5] == list(corpus(4, 5, TINY, length=(512, 2048), prose=0.3))
    names = Counter(each.name for each in documents)
    assert 20 < names["prose"] < 55
    assert set(names) == {"prose", *TINY}
    assert all(350 < len(each.text) <= 2048 for each in documents)
    for each in documents:
        answers = [each.text[a:b] for a, b in each.answers]
        if each.name != "prose":
            assert answers == solve(each.text[: each.answers[0][0] - 1])
    restated = [each.text.rpartition("\n")[2].count(". In ") for each in documents if each.name == "joint-recall"]
    assert max(restated) > 3


def test_a_task_named_twice_is_drawn_twice_as_often() -> None:
    a, b, *_ = TINY
    names = [each.name for each in corpus(4, 300, TINY, length=(512, 600), prose=0.0, drawn=(a, a, b))]
    assert set(names) == {a, b}
    assert 170 <= names.count(a) <= 230, "two thirds of 300, within four standard deviations"


def test_a_corpus_counts_the_tokens_of_its_tokenizer() -> None:
    tokenizer = WordTokenizer()
    sizes = [len(tokenizer.encode(each.text)) for each in corpus(4, 30, TINY, length=(500, 600), tokenizer=tokenizer)]
    assert all(450 < size <= 600 for size in sizes)


def test_restated_questions_are_told_true_and_leave_the_asked_one() -> None:
    for config in (
        JointRecallInWords.Config(n_contexts=3, n_keys=3, n_restated=8),
        Needles.Config(haystack="words", n_keys=6, n_restated=5),
    ):
        prompt = config.build().sample(np.random.default_rng(0), 2048)
        context, _, question = prompt.text.rpartition("\n")
        *restated, asked = re.split(r"(?<=\.) ", question)
        assert len(restated) == config.n_restated == len(set(restated))
        assert all(context.count(sentence) == 1 for sentence in restated)
        assert asked not in " ".join(restated)
        assert solve(prompt.text) == list(prompt.answers)
    dense = JointRecallInWords.Config(layout="dense", n_restated=24).build().sample(np.random.default_rng(0), 1000)
    context, _, question = dense.text.rpartition("\n")
    *restated, asked = re.split(r"(?<=\.) ", question)
    told = re.split(r"(?<=\.) ", context)
    often = Counter(restated)
    assert len(often) == len(told) - 1
    assert set(often) < set(told)
    assert set(often.values()) <= {2, 3}
    assert asked not in " ".join(restated)
    assert with_restated(SUITE["multi-key"], 8) == replace(SUITE["multi-key"], n_restated=3)
    assert with_restated(SUITE["common-words"], 8) == SUITE["common-words"]


def test_prose_keeps_its_facts_and_tells_them_again() -> None:
    text = " ".join(islice(sentences(np.random.default_rng(2)), 900))
    homes: dict[str, list[str]] = defaultdict(list)
    pairs = re.findall(r"([A-Z]\w+(?: [A-Z]\w+)+) (?:lives|has a house) in (\w+)\.", text)
    pairs += [(who, where) for where, who in re.findall(r"([A-Z]\w+) is where ([\w ]+) lives\.", text)]
    for who, where in pairs:
        homes[who].append(where)
    assert len(homes) > 15
    assert all(len(set(places)) == 1 for places in homes.values())
    assert sum(len(places) > 1 for places in homes.values()) > 5
    assert len({places[0] for places in homes.values()}) > 10


def test_prose_is_ever_less_news() -> None:
    """The part of facts that were told before grows with the document: perplexity can fall with what was read."""

    def share_told_before(part: slice) -> float:
        old = new = 0
        for seed in range(12):
            told: set[str] = set()
            for i, sentence in enumerate(islice(sentences(np.random.default_rng(seed)), 400)):
                fact = re.search(r"(\d+|\b[a-z]+ed [a-z]+|\b[a-z]+)(?= \w+$|\.$)", sentence)
                key = sentence if fact is None else f"{sentence[:12]}{fact[1]}"
                if i in range(*part.indices(400)):
                    old, new = old + (key in told), new + (key not in told)
                told.add(key)
        return old / (old + new)

    early, late = share_told_before(slice(20, 80)), share_told_before(slice(300, 400))
    assert late > early + 0.08


def test_prose_has_the_length_asked_for() -> None:
    for n_chars in (100, 1000, 5000):
        text = write_prose(np.random.default_rng(1), n_chars)
        assert n_chars - 120 < len(text) <= n_chars
        assert text.endswith(".")
        assert text == write_prose(np.random.default_rng(1), n_chars)
    assert write_prose(np.random.default_rng(1), 5000).count("\n") > 5
    with pytest.raises(ConfigError, match="10 characters would not hold"):
        write_prose(np.random.default_rng(1), 10)


def test_word_lists_hold_single_words_once() -> None:
    for name in ("THINGS", "PLACES", "ADJECTIVES", "PEOPLE", "SURNAMES", "JOBS", "ANIMALS", "FOODS", "TRADES"):
        words = getattr(vocabulary, name)
        assert len(set(words)) == len(words) >= 40, name
        assert all(re.fullmatch(r"[A-Za-z]+", word) for word in words)
    assert not set(vocabulary.THINGS) & set(vocabulary.ADJECTIVES)
