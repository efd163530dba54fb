"""The long-context suite: an oracle that reads the text alone, exact lengths, depths, seeds, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.core.config import KINDS, from_dict, override, to_dict
from recollect.core.errors import ConfigError
from recollect.text.suite import (
    SUITE,
    SUITES,
    TINY,
    CommonWords,
    FrequentWords,
    JointRecallInWords,
    Needles,
    Prompt,
    SuiteConfig,
    Values,
    VariableTracking,
    corpus,
    load_suite,
    prompt_of,
    write_prose,
)
from recollect.text.suite.base import TooShortError, Units, laid
from recollect.text.suite.haystack import HAYSTACKS
from recollect.text.suite.names import distinct_names, listed
from recollect.text.tokenizer import ByteTokenizer
from solving import VALUE, WordTokenizer, solve

CASES = [
    pytest.param(name, task, config, id=f"{name}-{task}")
    for name in SUITES
    for task, config in SUITES[name].tasks.items()
]


@pytest.mark.parametrize(("suite", "task", "config"), CASES)
def test_an_oracle_finds_every_answer_in_the_text_alone(suite: str, task: str, config: SuiteConfig) -> None:
    for length in (SUITES[suite].lengths[0], 5001):
        for depth in (0.0, 0.3, 1.0):
            for i in range(4):
                prompt = prompt_of(task, config, 7, length, depth, i)
                assert solve(prompt.text) == list(prompt.answers)
                assert prompt.completion == f" {listed(prompt.answers)}."
                assert prompt.found(prompt.completion) == 1
                assert [prompt.completion[a:b] for a, b in prompt.answer_spans] == list(prompt.answers)


def unit_bound(config: Any) -> int:
    """Bytes that one unit more can take."""
    if isinstance(config, CommonWords.Config | FrequentWords.Config):
        return 30
    if "dense" in (getattr(config, "layout", ""), "dense" if config.haystack == "needles" else ""):
        return 100
    return {"noise": 66, "words": 12, "ids": 38, "prose": 120}[config.haystack]


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(sorted(TINY)),
    st.integers(532, 6000),
    st.floats(0, 1),
    st.integers(0, 2**40),
    st.integers(0, 20),
    st.booleans(),
)
def test_the_budget_holds_to_the_token(
    task: str, length: int, depth: float, seed: int, reserve: int, in_words: bool
) -> None:
    tokenizer = WordTokenizer() if in_words else ByteTokenizer()
    rng = np.random.default_rng(seed)
    prompt = TINY[task].build().sample(rng, length, depth, tokenizer, reserve=reserve)
    used = len(tokenizer.encode(prompt.text)) + len(tokenizer.encode(prompt.completion))
    assert (prompt.n_tokens, prompt.n_tokens + prompt.n_answer_tokens) == (len(tokenizer.encode(prompt.text)), used)
    assert length - reserve - unit_bound(TINY[task]) < used <= length - reserve
    assert solve(prompt.text) == list(prompt.answers)


def test_the_budget_holds_for_word_pieces() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    pieces.train_from_iterator([write_prose(np.random.default_rng(0), 20_000)], trainer)

    class Pieces:
        def encode(self, text: str) -> list[int]:
            return pieces.encode(text).ids

    for task, config in TINY.items():
        prompt = prompt_of(task, config, 0, 1500, 0.6, 0, Pieces())
        assert 1500 - unit_bound(config) / 2 < prompt.n_tokens + prompt.n_answer_tokens <= 1500
        assert len(prompt.text) > 1550
        assert len(pieces.encode(prompt.text + prompt.completion).ids) == prompt.n_tokens + prompt.n_answer_tokens


@pytest.mark.parametrize("task", sorted(SUITE))
def test_one_unit_more_would_not_have_fitted(task: str) -> None:
    """The same sample for a budget of a few tokens more is the same text, until it grows beyond that budget."""
    build = SUITE[task].build()
    texts = [build.sample(np.random.default_rng(5), length, 0.4).text for length in range(3000, 3120, 3)]
    sizes = [len(text) for text in texts]
    assert sizes == sorted(sizes)
    assert len(set(texts)) > 1
    for before, after in pairwise(texts):
        assert after == before or len(after) > len(before)


def test_long_prompts_take_few_encodings() -> None:
    for task in SUITE:
        tokenizer = WordTokenizer()
        prompt = prompt_of(task, SUITE[task], 0, 16_384, 0.5, 0, tokenizer)
        assert prompt.n_tokens > 16_300
        assert tokenizer.calls <= 2 * 20 + 1, task


def body_of(prompt: Prompt) -> tuple[int, int]:
    """Where the context begins and ends, without its header and the question."""
    end = prompt.text.rindex("\n")
    first = prompt.text.find("\n")
    return (first + 1 if first < end else 0), end


@pytest.mark.parametrize("task", ["needle-noise", "needle-words", "needle-ids", "needle-prose", "multi-key-dense"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_a_needle_stands_at_its_depth(task: str, depth: float) -> None:
    config = TINY[task]
    for i in range(5):
        prompt = prompt_of(task, config, 3, 4096, depth, i)
        (span,) = prompt.spans
        assert prompt.text[span[0] : span[1]].endswith(f" is {prompt.answers[0]}.")
        start, end = body_of(prompt)
        room = end - start - (span[1] - span[0])
        assert abs((span[0] - start) / room - depth) <= (unit_bound(config) / 2 + 1) / room
        assert (span[0] == start) == (depth == 0)
        assert (span[1] == end) == (depth == 1)


@pytest.mark.parametrize("task", ["multi-value", "multi-query", "variable-tracking"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_several_asked_things_stand_in_a_band(task: str, depth: float) -> None:
    config: Any = TINY[task]
    prompt = prompt_of(task, config, 3, 8192, depth, 0)
    start, end = body_of(prompt)
    places = [(a - start) / (end - start) for a, _ in prompt.spans]
    assert places == sorted(places)
    assert places[0] == pytest.approx(depth * (1 - config.width), abs=0.03)
    assert places[-1] == pytest.approx(depth * (1 - config.width) + config.width, abs=0.03)


@pytest.mark.parametrize("task", ["joint-recall", "joint-recall-spread", "joint-recall-dense"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_code_is_asked_for_at_its_depth(task: str, depth: float) -> None:
    prompt = prompt_of(task, TINY[task], 3, 4096, depth, 1)
    ((a, b),) = prompt.spans
    start, end = body_of(prompt)
    question = prompt.text[end + 1 :]
    assert prompt.text[a:b] == f"{question}{prompt.completion}"
    assert prompt.text.count(question) == 2
    cells = [m.start() - start for m in re.finditer(r"In \w+, the code for", prompt.text[:end])]
    if task == "joint-recall":  # the whole table stands there
        table = cells[-1] - cells[0] + 45
        assert len(cells) == 9
        assert cells[0] / (end - start - table) == pytest.approx(depth, abs=0.02)
    else:
        shares = (np.array(cells) + (a - b) * 0) / (end - start)
        assert abs(int(np.abs(shares - depth).argmin()) - cells.index(a - start)) <= 1


def test_common_and_frequent_words_have_no_depth() -> None:
    for task in ("common-words", "frequent-words"):
        assert not TINY[task].build().has_depth
        assert prompt_of(task, TINY[task], 0, 1024, 0.5, 0).depth is None
        assert prompt_of(task, TINY[task], 0, 1024, 0.5, 0).spans == ()


def test_the_dense_table_is_square_and_every_key_has_other_codes() -> None:
    prompt = prompt_of("joint-recall-dense", TINY["joint-recall-dense"], 1, 8192, 0.5, 0)
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for place, thing, code in re.findall(rf"In (\w+), the code for (\w+) is {VALUE}", prompt.text.rpartition("\n")[0]):
        assert thing not in table[place]
        table[place][thing] = code
    sizes = [len(row) for row in table.values()]
    assert len(set(sizes[:-1])) == 1
    assert abs(len(table) - sizes[0]) <= 2
    assert len({tuple(row) for row in table.values()}) == len(table)  # orders are drawn anew
    codes = [row.get(next(iter(table[next(iter(table))]))) for row in table.values()]
    assert len(set(codes)) >= len(codes) - 2


@pytest.mark.parametrize("task", sorted(TINY))
def test_seeds_reproduce_and_differ(task: str) -> None:
    def text(seed: int, i: int, length: int = 1024, depth: float = 0.5) -> str:
        return prompt_of(task, TINY[task], seed, length, depth, i).text

    assert text(0, 0) == text(0, 0)
    assert len({text(0, 0), text(0, 1), text(1, 0), text(0, 0, 1025), text(0, 0, 1024, 0.25)}) == 5


def test_how_long_a_prompt_is_moves_nothing_else() -> None:
    """What follows in the same stream does not depend on the length or the tokenizer."""
    for task, config in TINY.items():
        states = []
        for length, tokenizer in ((600, None), (3000, None), (900, WordTokenizer())):
            rng = np.random.default_rng(3)
            config.build().sample(rng, length, 0.5, tokenizer)
            states.append(rng.integers(1 << 60))
        assert len(set(states)) == 1, task


@pytest.mark.parametrize(
    ("continuation", "share"),
    [
        (" 12, 34 and 56.", 1.0),
        ("56 34 12", 1.0),
        (" 12 and 34.", 2 / 3),
        (" 123, 34x and 56-7.", 0.0),
        ("The first is 12.\nAnother is 56", 2 / 3),
        ("", 0.0),
    ],
)
def test_answers_are_found_as_whole_words_in_any_order(continuation: str, share: float) -> None:
    prompt = Prompt("?", ("12", "34", "56"), " 12, 34 and 56.")
    assert prompt.found(continuation) == pytest.approx(share)


@pytest.mark.parametrize(
    ("continuation", "share"),
    [
        (" 12, 34 and 56.", 1.0),
        (" 12, 34, and 56.", 1.0),
        ("12\n34\n56\n78", 1.0),
        (" 34, 12 and 56.", 1 / 3),
        (" 12, 99 and 56.", 2 / 3),
        (" 34 and 56.", 0.0),
    ],
)
def test_answers_of_several_questions_count_in_their_place(continuation: str, share: float) -> None:
    prompt = Prompt("?", ("12", "34", "56"), " 12, 34 and 56.", ordered=True)
    assert prompt.found(continuation) == pytest.approx(share)


GUESSES: dict[str, tuple[Callable[[str], list[str]], int]] = {
    "multi-key": (lambda text: re.findall(rf"secret \w+ for [\w ]+ is {VALUE}", text), 1),
    "multi-key-dense": (lambda text: re.findall(rf"secret \w+ for [\w ]+ is {VALUE}", text), 1),
    "multi-query": (lambda text: re.findall(rf"secret \w+ for [\w ]+ is {VALUE}", text), 2),
    "joint-recall": (
        lambda text: re.findall(rf"the code for {text.rpartition('code for ')[2][:-3]} is {VALUE}", text),
        1,
    ),
    "variable-tracking": (lambda text: re.findall(r"Let (\w+) be", text), 3),
    "frequent-words": (lambda text: sorted(set(text.split("\n")[1].split())), 2),
}


@pytest.mark.parametrize("task", sorted(GUESSES))
def test_a_guesser_that_binds_nothing_scores_what_is_said_of_it(task: str) -> None:
    """Played out: it draws its answers from what the text offers."""
    offered, n_answers = GUESSES[task]
    rng = np.random.default_rng(0)
    scores, said = [], []
    for i in range(150):
        prompt = prompt_of(task, TINY[task], 11, 600, 0.5, i)
        options = offered(prompt.text)
        for _ in range(8):
            drawn = rng.choice(options, n_answers, replace=False).tolist()
            scores.append(prompt.found(f" {listed(drawn)}."))
        said.append(prompt.guesser)
    error = float(np.std(scores)) / len(said) ** 0.5
    assert np.mean(scores) == pytest.approx(np.mean(said), abs=3 * error)


def test_there_is_no_guesser_where_all_that_is_told_is_asked() -> None:
    assert prompt_of("needle-noise", TINY["needle-noise"], 0, 512, 0.5, 0).guesser is None
    assert prompt_of("multi-value", TINY["multi-value"], 0, 512, 0.5, 0).guesser is None
    assert prompt_of("needle-noise", TINY["needle-noise"], 0, 512, 0.5, 0).chance == pytest.approx(1 / 9000)


def test_values_are_of_their_form_and_count() -> None:
    rng = np.random.default_rng(0)
    patterns = {"number": r"[1-9]\d{2}", "id": r"[0-9a-f]{3}", "word": r"[a-z]+-[a-z]+-[a-z]+"}
    for form, pattern in patterns.items():
        for _ in range(50):
            assert re.fullmatch(pattern, Values(form, 3).draw(rng))  # pyright: ignore[reportArgumentType]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", Values("id", 32).draw(rng))
    assert sorted(Values("number", 1).distinct(rng)) == list("123456789")
    assert len(set(Values("id", 1).distinct(rng))) == Values("id", 1).count == 16


def test_names_never_repeat_and_never_end() -> None:
    found = list(islice(distinct_names(np.random.default_rng(0), ("a", "b", "c")), 3 + 3 * 100))
    assert sorted(found[:3]) == ["a", "b", "c"]
    assert len(set(found)) == len(found)
    assert {len(name.split()) for name in found} <= {1, 2, 3}


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.text("xy", min_size=1, max_size=5), max_size=12),
    st.lists(st.tuples(st.floats(0, 1), st.text("AB", min_size=1, max_size=9)), max_size=4),
)
def test_laying_keeps_every_unit_in_order(units: list[str], inserts: list[tuple[float, str]]) -> None:
    text, spans = laid(units, inserts)
    assert [text[a:b] for a, b in spans] == [each for _, each in inserts]
    words = text.split(" ") if text else []
    assert [word for word in words if word[0] in "xy"] == units
    assert sorted(word for word in words if word[0] in "AB") == sorted(each for _, each in inserts)
    total = sum(len(unit) + 1 for unit in units)
    for (share, _), (a, _) in zip(inserts, spans, strict=True):
        before = sum(len(word) + 1 for word in text[:a].split() if word[0] in "xy")
        assert abs(before - share * total) <= 3.0001  # half of the longest unit


def test_a_haystack_of_the_reader_s_own_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("First things\nfirst.  Then rest! " + "word " * 100)
    two.write_text("Änother book.\n\nNo end")
    config = Needles.Config(haystack="files", files=(str(one), str(two)))
    prompt = config.build().sample(np.random.default_rng(0), 2000, 0.5)
    for piece in ("First things first. Then rest!", "word word", "Änother book. No end"):
        assert piece in prompt.text
    assert solve(prompt.text) == list(prompt.answers)
    assert 1690 < prompt.n_tokens < 2000
    one.write_text("Changed.")
    assert "Changed. Änother" in config.build().sample(np.random.default_rng(0), 2000, 0.5).text
    with pytest.raises(ConfigError, match=r"nowhere.txt' cannot be read: No such file"):
        Needles.Config(haystack="files", files=("nowhere.txt",)).build().sample(np.random.default_rng(0), 2000)
    two.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.build().sample(np.random.default_rng(0), 2000)
    one.write_text(" \n")
    with pytest.raises(ConfigError, match="hold no text"):
        replace(config, files=(str(one),)).build().sample(np.random.default_rng(0), 2000)


@pytest.mark.parametrize("haystack", [each for each in HAYSTACKS if each != "files"])
def test_every_task_takes_every_haystack(haystack: Any) -> None:
    for make in (Needles.Config, VariableTracking.Config, JointRecallInWords.Config):
        prompt = make(haystack=haystack).build().sample(np.random.default_rng(0), 2000, 0.5)
        assert solve(prompt.text) == list(prompt.answers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needles.Config(n_keys=0), "n_keys must be at least 1"),
        (lambda: Needles.Config(n_queries=2), "n_queries 2 is more than n_keys 1"),
        (lambda: Needles.Config(n_keys=2, n_queries=2, n_values=2), "set one to 1"),
        (lambda: Needles.Config(n_restated=1), "n_restated must lie between 0 and the 0 keys"),
        (lambda: Needles.Config(width=1.5), "width must lie in"),
        (lambda: Needles.Config(haystack="hay"), "haystack must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Needles.Config(haystack="files"), "needs at least one text file"),
        (lambda: Needles.Config(files=("a",)), "set haystack=files"),
        (lambda: Values("digits"), "form must be 'number'"),  # pyright: ignore[reportArgumentType]
        (lambda: Values("number", 0), "size must be at least 1"),
        (lambda: VariableTracking.Config(n_links=0), "n_links must be at least 1"),
        (lambda: VariableTracking.Config(width=-1), "width must lie in"),
        (lambda: CommonWords.Config(n_answers=0), "n_answers must lie between 1 and"),
        (lambda: CommonWords.Config(share=1.0), "share must lie between 0 and 1"),
        (lambda: CommonWords.Config(ratio=1), "ratio must be at least 2"),
        (lambda: CommonWords.Config(n_answers=40, share=0.05), "no list makes these common"),
        (lambda: FrequentWords.Config(n_answers=50), "n_answers must lie between 1 and 49"),
        (lambda: FrequentWords.Config(exponent=0.0), "exponent must lie"),
        (lambda: JointRecallInWords.Config(n_keys=0), "n_keys must be at least 1"),
        (lambda: JointRecallInWords.Config(layout="flat"), "layout must be"),  # pyright: ignore[reportArgumentType]
        (lambda: JointRecallInWords.Config(n_restated=16), "the 15 cells that are not asked"),
        (lambda: load_suite("tny"), "unknown suite 'tny'; did you mean 'tiny'"),
        (lambda: load_suite("tiny", ("needle-nose",)), "did you mean 'needle-noise'"),
        (lambda: next(corpus(0, 1, {})), "tasks be given"),
        (lambda: next(corpus(0, 1, TINY, length=(5, 4))), "length is a range"),
        (lambda: prompt_of("multi-key", TINY["multi-key"], 0, 512, 1.5, 0), "depth must lie in"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_too_short_a_length_says_how_long_it_must_be() -> None:
    for task, config in TINY.items():
        with pytest.raises(TooShortError, match=r"the shortest prompt of this kind takes \d+ tokens and 50 are free"):
            prompt_of(task, config, 0, 50, 0.5, 0)


@pytest.mark.parametrize(
    "config", [CommonWords.Config(), CommonWords.Config(2), FrequentWords.Config(), FrequentWords.Config(2, 12, 0.8)]
)
def test_the_shortest_lists_can_be_told_apart_too(config: SuiteConfig) -> None:
    with pytest.raises(TooShortError) as error:
        config.build().sample(np.random.default_rng(0), 50)
    shortest = int(re.findall(r"\d+", str(error.value))[0])
    for length in range(shortest, shortest + 200, 3):
        prompt = config.build().sample(np.random.default_rng(0), length)
        assert set(solve(prompt.text)) == set(prompt.answers)


def test_a_tokenizer_that_swallows_everything_is_refused() -> None:
    class Swallowing:
        def encode(self, text: str) -> list[int]:
            return [0] * min(len(text), 3)

    with pytest.raises(ConfigError, match="gives 6 tokens for"):
        Needles.Config().build().sample(np.random.default_rng(0), 500, 0.5, Swallowing())


def test_a_stream_that_ends_is_told() -> None:
    with pytest.raises(ConfigError, match="the filler ends after 2 units"):
        Units(iter("ab")).first(3)
    keys = Needles.Config(haystack="needles", values=Values("number", 1))
    with pytest.raises(ConfigError, match="use longer keys or values"):
        keys.build().sample(np.random.default_rng(0), 5000)


def test_configs_are_data() -> None:
    for suite in SUITES.values():
        for config in suite.tasks.values():
            assert from_dict(KINDS[config.kind], to_dict(config)) == config
    assert override(TINY["multi-key"], ["n_keys=7", "values.form=id"]) == replace(
        TINY["multi-key"], n_keys=7, values=Values("id", 4)
    )


def test_named_suites() -> None:
    assert set(TINY) <= set(SUITE)
    assert load_suite("tiny", ("multi-key",)).tasks == {"multi-key": TINY["multi-key"]}
    assert SUITES["long"].lengths[-1] == 131_072


def test_the_suite_needs_no_torch() -> None:
    code = "import sys, recollect.text.suite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
