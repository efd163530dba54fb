"""Theory as programs: the hand-built model answers exactly and grows as claimed; what bounded states cannot know."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from recollect.core.errors import ConfigError
from recollect.core.state import index_batch, nbytes
from recollect.eval.counting import accuracy_bound, rate, table_bits, whole_table_bound
from recollect.eval.recall import recall_scores
from recollect.models.codes import OVERLAP, code_width, crowd, digit_planes, draw_codes, draw_planes, overlap
from recollect.models.constructed import BOS, FIRST_SYMBOL, SEP, ConstructedRecall, Overwrite, build
from recollect.ops import dispatch
from recollect.tasks import JointRecall
from recollect.tasks import joint_recall as published
from recollect.tasks.batch import TokenBatch, accuracy

ROOT = Path(__file__).parents[1]
Config = ConstructedRecall.Config


def tables(size: tuple[int, int], n: int, seed: int = 0) -> TokenBatch:
    (n_contexts, n_keys), rng = size, np.random.default_rng(seed)
    return JointRecall(JointRecall.Config((n_contexts, n_contexts), (n_keys, n_keys))).batch(rng, n)


def hidden_answers(batch: TokenBatch) -> torch.Tensor:
    """The tokens, with every answer in the second part replaced by ``PAD``."""
    asking = np.cumsum(batch.tokens == published.SEP, axis=1) > 0
    value = (batch.tokens >= FIRST_SYMBOL) & (batch.tokens < FIRST_SYMBOL + 16)
    assert (asking & value).any() == (batch.mask.sum(1).max() > 1)
    return torch.from_numpy(np.where(asking & value, published.PAD, batch.tokens))


def scored(model: ConstructedRecall, batch: TokenBatch, tokens: torch.Tensor | None = None) -> float:
    logits, _ = model(torch.from_numpy(batch.tokens) if tokens is None else tokens)
    return float(accuracy(logits.argmax(-1).numpy(), batch).mean())


def test_token_ids_are_those_of_the_task() -> None:
    assert (BOS, SEP, FIRST_SYMBOL) == (published.BOS, published.SEP, published.FIRST_VALUE)
    assert Config((7, 9), 5).vocab_size == JointRecall(JointRecall.Config((7, 7), (9, 9), n_values=5)).vocab_size


@pytest.mark.parametrize("planes", ["random", "digits"])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (5, 5), (27, 2), (16, 16), (1, 64), (64, 1), (7, 64)])
def test_every_answer_is_right(size: tuple[int, int], planes: str) -> None:
    model = ConstructedRecall(Config(size, planes=planes))  # pyright: ignore[reportArgumentType]
    for seed in range(3):
        batch = tables(size, 8 if math.prod(size) <= 64 else 2, seed)
        assert scored(model, batch) == 1.0
        assert scored(model, batch, hidden_answers(batch)) == 1.0


@pytest.mark.parametrize("planes", ["random", "digits"])
def test_every_answer_is_right_at_64_by_64(planes: str) -> None:
    batch = tables((64, 64), 1)
    assert batch.tokens.shape == (1, 16513)
    assert batch.mask.sum() == 4096
    assert scored(ConstructedRecall(Config((64, 64), planes=planes)), batch) == 1.0  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("n_contexts", range(1, 65))
def test_every_answer_is_right_at_every_size(n_contexts: int) -> None:
    for n_keys in range(1, 65):
        assert scored(build(n_contexts, n_keys), tables((n_contexts, n_keys), 1)) == 1.0, (n_contexts, n_keys)


def test_other_draws_and_other_numbers_of_values_are_exact_too() -> None:
    for seed in range(1, 6):
        assert scored(ConstructedRecall(Config((6, 11), seed=seed)), tables((6, 11), 8, seed)) == 1.0
    task = JointRecall(JointRecall.Config((4, 4), (4, 4), n_values=300))
    assert scored(build(4, 4, 300), task.batch(np.random.default_rng(0), 8)) == 1.0


def test_a_large_id_space_serves_smaller_tables() -> None:
    task = JointRecall(JointRecall.Config((1, 12), (1, 12)))
    scores = recall_scores(build(12, 12), task, np.random.default_rng, 1, split=None)  # pyright: ignore[reportArgumentType]
    assert len(scores.sizes) == 144
    assert scores.accuracy.min() == 1.0


@pytest.mark.parametrize(("levels", "planes"), [((3, 4, 5), "random"), ((8, 4, 2, 3), "random"), ((8, 8, 8), "digits")])
def test_contexts_within_contexts(levels: tuple[int, ...], planes: str) -> None:
    """Proposition C.1: a token opens a block of its level, blocks nest, the last level are the keys."""
    model = ConstructedRecall(Config(levels, planes=planes))  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)
    table = rng.integers(16, size=levels)
    first_id = FIRST_SYMBOL + 16 + np.cumsum([0, *levels[:0:-1]])[::-1]  # of every level, outermost first

    def blocks(chosen: tuple[int, ...], tokens: list[int]) -> None:
        level = len(chosen)
        for symbol in rng.permutation(levels[level]):
            tokens.append(int(first_id[level] + symbol))
            if level + 1 == len(levels):
                tokens.append(int(FIRST_SYMBOL + table[*chosen, symbol]))
            else:
                blocks((*chosen, int(symbol)), tokens)

    told: list[int] = []
    asked: list[int] = []
    blocks((), told)
    blocks((), asked)
    tokens = torch.tensor([[BOS, *told, SEP, *asked]])
    labels = tokens.roll(-1, 1)
    at = (tokens >= first_id[-1]) & (tokens < first_id[-1] + levels[-1]) & ((tokens == SEP).cumsum(1) > 0)
    assert int(at.sum()) == table.size
    for shown in (tokens, torch.where(at.roll(1, 1), published.PAD, tokens)):
        assert torch.equal(model(shown)[0].argmax(-1)[at], labels[at])


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_steps_are_the_parallel_form(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    model, tokens = build(3, 4), torch.from_numpy(tables((3, 4), 3).tokens)
    logits, after = model(tokens)
    state = model.init_state(3)
    for t in range(tokens.shape[1]):
        step, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(step, logits[:, t], rtol=0, atol=1e-5)
    torch.testing.assert_close(state, after)
    for cut in (1, 13, 27):  # and two calls are one
        first, middle = model(tokens[:, :cut])
        second, end = model(tokens[:, cut:], middle)
        torch.testing.assert_close(torch.cat([first, second], 1), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(end, after)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(index_batch(after, rows), model(tokens[rows])[1])


def test_a_reset_begins_another_table() -> None:
    model, batch = build(3, 4), tables((3, 4), 2)
    tokens = torch.from_numpy(batch.tokens)
    packed, reset = tokens.reshape(1, -1), torch.zeros(1, tokens.numel(), dtype=torch.bool)
    reset[0, tokens.shape[1]] = True
    logits, _ = model(packed, reset=reset)
    torch.testing.assert_close(logits.view(2, tokens.shape[1], -1), model(tokens)[0], rtol=0, atol=1e-5)
    state = model.init_state(1)
    for t in range(packed.shape[1]):
        step, state = model.step(packed[:, t], state, reset=reset[:, t])
        torch.testing.assert_close(step, logits[:, t], rtol=0, atol=1e-5)


def test_the_recurrent_layer_keeps_and_overwrites() -> None:
    layer = Overwrite(3)
    x = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.0, -1.0], [0.0, 5.0, 0.0]]])
    y, state, _ = layer(x)
    assert y.tolist() == [[[1, 0, 2], [1, 0, -1], [1, 5, -1]]]
    assert state.h.tolist() == [[1, 5, -1]]
    leaky = Overwrite(1, leak=0.1)
    assert leaky(torch.tensor([[[1.0], [0.0]]])).y.flatten().tolist() == pytest.approx([0.9, 0.81])


def test_state_keys_and_buckets_grow_as_the_proposition_says() -> None:
    for n_contexts, n_keys in itertools.product((1, 2, 3, 5, 8, 16, 33, 64), repeat=2):
        config, digits = Config((n_contexts, n_keys)), Config((n_contexts, n_keys), planes="digits")
        log_n = math.ceil(math.log2(n_contexts * n_keys))
        assert config.keys == 6 * log_n + 8
        assert config.d_model <= 4 * (log_n + 2) + 8 + 3 + code_width(16)
        assert 1 << config.bits <= max(2, 2 * n_contexts * n_keys)
        assert config.slots == config.keys * (1 << config.bits)
        assert digits.keys == 9
        assert 1 << digits.bits <= max(2, 4 * n_contexts * n_keys)
    model = build(5, 7)
    state = model.init_state(1)
    assert nbytes(state.written) == 4 * model.config.d_model
    assert state.memory.memory.k.shape == (1, 1, model.config.slots, model.config.d_key)


def test_codes_keep_apart_and_planes_clear() -> None:
    rng = np.random.default_rng(0)
    for n, numbered in itertools.product((1, 2, 3, 16, 64, 200), (False, True)):
        codes = draw_codes(rng, n, numbered=numbered)
        assert codes.shape == (n, code_width(n))
        assert (codes != 0).all()
        assert np.allclose(np.linalg.norm(codes, axis=1), 1)
        assert overlap(codes) <= OVERLAP + 1e-6
    levels = [draw_codes(rng, 8, numbered=True) for _ in range(3)]
    told = np.concatenate([np.stack([codes[i] for i in range(8)]) for codes in levels], axis=1)
    signs = (np.pad(told, ((0, 0), (0, 2))) @ digit_planes(levels) > 0) * (1 << np.tile(np.arange(3), 3))
    assert signs.reshape(8, 3, 3).sum(-1).tolist() == [[i] * 3 for i in range(8)]  # the numbers themselves


def test_the_counted_crowd_is_one_that_happens() -> None:
    """No order of telling fills a bucket beyond the count, and the count is not idle: most of it is reached."""
    model, batch = build(6, 6), tables((6, 6), 64)
    tokens = torch.from_numpy(batch.tokens)
    x = model.overwrite(model.embedding(tokens)).y
    q, k, _ = model.attention._queries_and_keys(x)
    digits = 1 << torch.arange(model.config.bits)
    asked, held = (((z[:, :, 0] @ model.attention.planes[0, :, 0] > 0) * digits).sum(-1) for z in (q, k))
    most = max(
        int((held[row, : t + 1] == asked[row, t]).sum())
        for row, t in zip(*(i.tolist() for i in np.nonzero(batch.mask)), strict=True)
    )
    assert 0.6 * model.crowd.worst <= most <= model.crowd.worst <= model.config.keys


@pytest.mark.parametrize(
    "broken",
    [{"n_keys": 8}, {"n_keys": 1}, {"n_bits": 2}, {"leak": 0.01}, {"planes": "digits", "n_keys": 2}],
    ids=str,
)
def test_less_than_the_formulas_ask_for_gives_wrong_answers(broken: dict[str, object]) -> None:
    batch = tables((16, 16), 2)
    assert scored(ConstructedRecall(Config((16, 16), verify=False, **broken)), batch) < 0.97  # pyright: ignore[reportArgumentType]


def test_without_its_flags_or_its_gates_the_model_is_wrong() -> None:
    batch = tables((5, 5), 8)
    kind, part = build(5, 5).config.d_key - 2, build(5, 5).config.d_key - 1
    blind = build(5, 5)
    blind.embedding.weight[:, kind] = blind.embedding.weight[:, kind].abs()  # asked keys now look like told values
    assert scored(blind, batch) < 0.9
    # An answer comes after its question, so the second flag counts only where a cell is asked again.
    tokens = torch.from_numpy(batch.tokens)
    start = int((tokens[0] == SEP).nonzero()[0, 0]) + 1
    told, asked = tokens[:, :start], tokens[:, start:]
    lies = torch.where((asked >= FIRST_SYMBOL) & (asked < FIRST_SYMBOL + 16), FIRST_SYMBOL, asked)
    lies = torch.cat([lies, torch.full_like(lies[:, :1], FIRST_SYMBOL)], 1)
    thrice = torch.cat([told, lies, lies, asked], 1)
    last = thrice.shape[1] - asked.shape[1]
    fooled, honest = (ConstructedRecall(Config((5, 5), n_keys=100)) for _ in range(2))
    fooled.embedding.weight[:, part] = fooled.embedding.weight[:, part].abs()
    for model, low, high in ((honest, 1.0, 1.0), (fooled, 0.0, 0.2)):
        right = model(thrice)[0].argmax(-1)[:, last:] == torch.from_numpy(batch.labels)[:, start:]
        assert low <= float(right[torch.from_numpy(batch.mask)[:, start:]].float().mean()) <= high


def test_sizes_that_cannot_be_promised_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise n_keys or n_bits"):
        ConstructedRecall(Config((16, 16), n_keys=12))
    with pytest.raises(ConfigError, match="a bucket may hold 9 keys"):
        ConstructedRecall(Config((16, 16), n_keys=8, planes="digits"))
    for wrong in ({"levels": ()}, {"levels": (0, 3)}, {"n_values": 0}, {"leak": 0.5}, {"planes": "none"}):
        with pytest.raises(ConfigError, match="constructed-recall"):
            Config(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="n_bits is for random planes"):
        Config(planes="digits", n_bits=3)


def test_buckets_of_random_planes_crowd_beyond_log_n_and_more_bits_mend_it() -> None:
    """With ceil(log2 n) planes the mean crowd settles but the worst grows like a power of n; with half as many again
    it grows like log n. ``docs/theory.md`` says so.
    """
    found = {}
    for m in (8, 128):
        rng = np.random.default_rng(0)
        levels = [draw_codes(rng, m) for _ in range(2)]
        log_n = 2 * (m - 1).bit_length()
        for bits in (log_n, 3 * log_n // 2):
            draws = [draw_planes(rng, levels, bits, None)[1] for _ in range(9)]
            found[m, bits / log_n] = float(np.median([d.worst for d in draws])), np.mean([d.mean for d in draws])
    assert found[128, 1][0] > 1.2 * 14 / 6 * found[8, 1][0]
    assert found[128, 1][1] < 2 * found[8, 1][1]
    assert found[128, 1.5][0] < 14 / 6 * 1.3 * found[8, 1.5][0]
    levels = [draw_codes(np.random.default_rng(0), 128, numbered=True) for _ in range(2)]
    assert crowd(levels, digit_planes(levels)).worst == 9


def best_by_brute_force(bits: int, n_cells: int, n_values: int) -> tuple[float, float]:
    """Over every set of 2^bits answer sheets: the best probability of a whole table and share of right cells."""
    sheets = np.array(list(itertools.product(range(n_values), repeat=n_cells)))
    right = (sheets[:, None] == sheets).sum(-1)  # (table, sheet)
    whole = share = 0.0
    for chosen in itertools.combinations(range(len(sheets)), 2**bits):
        best = right[:, chosen].max(1)
        whole, share = max(whole, float((best == n_cells).mean())), max(share, float(best.mean()) / n_cells)
    return whole, share


@pytest.mark.parametrize(
    ("bits", "n_cells", "n_values"), [(0, 3, 2), (1, 3, 2), (2, 3, 2), (1, 4, 2), (1, 2, 3), (2, 2, 3)]
)
def test_no_encoder_beats_the_bounds(bits: int, n_cells: int, n_values: int) -> None:
    whole, share = best_by_brute_force(bits, n_cells, n_values)
    assert whole == pytest.approx(float(whole_table_bound(bits, n_cells, n_values)))  # reached
    bound = float(accuracy_bound(bits, n_cells, n_values))
    assert share <= bound + 1e-12
    assert bound - share < 0.2  # not idle, even for a handful of cells


def test_limits_of_the_bounds() -> None:
    assert table_bits(256, 16) == 1024
    assert accuracy_bound(0, 25, 16) == pytest.approx(1 / 16)
    assert accuracy_bound([99.9, 100, 1e6], 25, 16)[1:].tolist() == [1, 1]
    assert accuracy_bound(99.9, 25, 16) < 1
    assert whole_table_bound([0, 90, 100, 200], 25, 16) == pytest.approx([16.0**-25, 2.0**-10, 1, 1])
    bits = np.linspace(0, 100, 201)
    bound = accuracy_bound(bits, 25, 16)
    assert (np.diff(bound) > 0).all()
    assert rate(1 - bound, 16) * 25 == pytest.approx(bits, abs=1e-6)
    assert rate([0, 1 - 1 / 16, 1], 16) == pytest.approx([4, 0, 0])
    assert rate(0.11, 2) == pytest.approx(0.5, abs=1e-3)  # the textbook's binary example
    # Storing b / log2 V cells exactly and guessing the rest is allowed, so the bound lies above it.
    assert (bound >= bits / 100 + (1 - bits / 100) / 16 - 1e-12).all()
    for wrong in (lambda: accuracy_bound(-1, 4, 4), lambda: whole_table_bound(1, 0, 4), lambda: rate(1.5, 4)):
        with pytest.raises(ConfigError):
            wrong()


def test_the_page_shows_what_the_formulas_give() -> None:
    """The table of ``docs/theory.md``: its sizes, state, keys and buckets are the code's own."""
    page = (ROOT / "docs" / "theory.md").read_text()
    block = re.search(r"<!-- results theory -->\n(.*?)<!-- end results -->", page, re.S)
    assert block is not None
    rows = re.findall(r"^\| (\d+) x (\d+) \| ([\d,]+) \| ([\d,]+) \| (\d+) \| (\d+) \| ([\d,]+) \|", block[1], re.M)
    assert len(rows) >= 6
    for n_contexts, n_keys, *shown in rows:
        config = Config((int(n_contexts), int(n_keys)))
        length = JointRecall().length((int(n_contexts), int(n_keys)))
        numbers = [int(text.replace(",", "")) for text in shown]
        assert numbers == [config.n_cells, length, config.d_model, config.keys, 1 << config.bits]
