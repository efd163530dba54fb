"""Causal and relative attention: blocks against the equations, memory between calls, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.mlp import Mlp
from recollect.layers.transformer_xl import TransformerXL
from recollect.ops import causal_attention as blocks
from recollect.ops import dispatch
from recollect.ops.causal_attention import KeyMemory, causal_attention, init_memory, positions
from recollect.ops.relative_attention import Biases, relative_attention, relative_attention_reference, sinusoids
from recollect.ops.rotary import rotate
from recollect.train.run import TrainConfig

LENGTHS = (1, 63, 64, 65, 1000)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    reset: Tensor


def case(length: int, heads: int = 2, groups: int = 2, batch: int = 2, width: int = 4) -> Case:
    torch.manual_seed(length)
    reset = torch.rand(batch, length) < 0.02
    reset[0, :2] = True
    reset[0, length // 2 :][:2] = True
    reset[1] = False

    def draw(n: int, last: int) -> Tensor:
        return torch.randn(batch, length, n, last, dtype=torch.float64, requires_grad=True)

    return Case(draw(heads, width), draw(groups, width), draw(groups, 3), reset)


def reference(c: Case, window: int | None, reset: Tensor | None) -> Tensor:
    """The definition: every query against every key, with a mask."""
    length, shared = c.q.shape[1], c.q.shape[2] // c.k.shape[2]
    k, v = c.k.repeat_interleave(shared, 2), c.v.repeat_interleave(shared, 2)
    at = torch.arange(length)
    seen = (at[:, None] >= at).expand(len(k), -1, -1)
    if window is not None:
        seen = seen & (at[:, None] - at < window)
    if reset is not None:
        segment = reset.cumsum(1)
        seen = seen & (segment[:, :, None] == segment[:, None])
    logits = torch.einsum("blhn,bshn->bhls", c.q, k) / c.q.shape[-1] ** 0.5
    weights = torch.softmax(logits.masked_fill(~seen[:, None], -torch.inf), -1)
    return torch.einsum("bhls,bshp->blhp", weights, v)


def assert_same(got: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    """Values, and gradients of a random function of them."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(wanted)
    grads = torch.autograd.grad((got * weight).sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad((wanted * weight).sum(), leaves, retain_graph=True)
    for i, (one, other) in enumerate(zip(grads, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"gradient {i}: {m}")


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("length", LENGTHS)
def test_both_executions_equal_the_definition(length: int, window: int | None) -> None:
    c = case(length, heads=4, groups=2) if length < 1000 else case(length, heads=2, groups=1, batch=2)
    for reset in (c.reset, None):
        wanted = reference(c, window, reset)
        for path in ("auto", "blocks"):
            got, _ = causal_attention(c.q, c.k, c.v, window=window, reset=reset, path=path)
            assert_same(got, wanted, (c.q, c.k, c.v))


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes larger blocks; here its sizes, and odd ones, run on a CPU."""
    c = case(150)
    wanted = {window: reference(c, window, c.reset) for window in (None, 20)}
    for size in (1, 13, 512):
        monkeypatch.setattr(dispatch, "causal_attention_block", lambda *_, size=size: size)
        for window, want in wanted.items():
            got, _ = causal_attention(c.q, c.k, c.v, window=window, reset=c.reset, path="blocks")
            assert_same(got, want, (c.q, c.k, c.v))


@pytest.mark.parametrize("window", [None, 1, 20])
def test_memory_carries_over_cuts_and_resets(window: int | None) -> None:
    c = case(150)
    c.reset[0, 145] = True
    whole, after = causal_attention(c.q, c.k, c.v, window=window, reset=c.reset)
    assert not after.k[0, :, :-5].any()
    assert not after.v[0, :, :-5].any()
    memory: KeyMemory | None = init_memory(window, 2, 2, 4, 3, dtype=torch.float64)
    parts = []
    for begin, end in pairwise((0, 1, 2, 60, 75, 76, 149, 150)):
        cut = slice(begin, end)
        y, memory = causal_attention(
            c.q[:, cut], c.k[:, cut], c.v[:, cut], window=window, memory=memory, reset=c.reset[:, cut]
        )
        parts.append(y)
    assert memory is not None
    assert_same(torch.cat(parts, 1), whole, (c.q, c.k, c.v))
    for got, want in zip(memory, after, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(after.next_position, positions(150, torch.zeros(2, dtype=torch.int64), c.reset)[:, -1] + 1)


def test_a_window_keeps_its_slots_and_not_the_sequence() -> None:
    c = case(1000)
    _, memory = causal_attention(c.q.detach(), c.k.detach(), c.v.detach(), window=5)
    assert memory.k.shape[2] == 4
    assert memory.k.untyped_storage().nbytes() == memory.k.numel() * 8


def relative(length: int, window: int, heads: int = 2) -> tuple[Case, Tensor, Tensor, Biases]:
    c = case(length, heads, heads)
    project = torch.randn(heads, 4, 6, dtype=torch.float64, requires_grad=True)
    u, w = (torch.randn(heads, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return c, sinusoids(window, 6, dtype=torch.float64), project, Biases(u, w)


@pytest.mark.parametrize("window", [1, 7, 64, 100])
@pytest.mark.parametrize("length", LENGTHS)
def test_relative_attention_equals_the_paper(length: int, window: int) -> None:
    c, encoding, project, biases = relative(length, window)
    for reset in (c.reset, None):
        wanted = relative_attention_reference(c.q, c.k, c.v, encoding, project, biases, reset=reset)
        got, _ = relative_attention(c.q, c.k, c.v, encoding, project, biases, reset=reset)
        assert_same(got, wanted, (c.q, c.k, c.v, project, *biases))


@pytest.mark.parametrize("window", [1, 20])
def test_relative_attention_goes_on_from_its_memory(window: int) -> None:
    """Cuts of one position read the encodings directly, longer ones through their projection."""
    c, encoding, project, biases = relative(150, window)
    wanted = relative_attention_reference(c.q, c.k, c.v, encoding, project, biases, reset=c.reset)
    memory: KeyMemory | None = None
    parts = []
    for begin, end in pairwise((0, 1, 2, 60, 75, 76, 77, 149, 150)):
        cut = slice(begin, end)
        rest: dict[str, Any] = {"memory": memory, "reset": c.reset[:, cut]}
        y, memory = relative_attention(c.q[:, cut], c.k[:, cut], c.v[:, cut], encoding, project, biases, **rest)
        parts.append(y)
    assert_same(torch.cat(parts, 1), wanted, (c.q, c.k, c.v, project, *biases))


def test_encodings_of_distances() -> None:
    r = sinusoids(5, 6, dtype=torch.float64)
    for d in range(5):
        for m in range(3):
            angle = torch.tensor(d * 10_000.0 ** (-2 * m / 6), dtype=torch.float64)
            torch.testing.assert_close(r[d, m], angle.sin())
            torch.testing.assert_close(r[d, 3 + m], angle.cos())


def test_rotation_keeps_distances_and_turns_its_gradient_back() -> None:
    x, y = (torch.randn(1, 1, 2, 6, dtype=torch.float64) for _ in range(2))

    def dot(i: int, j: int) -> Tensor:
        return (rotate(x, torch.tensor([[i]])) * rotate(y, torch.tensor([[j]]))).sum(-1)

    torch.testing.assert_close(dot(3, 1), dot(1003, 1001))
    assert (dot(3, 1) - dot(3, 2)).abs().max() > 1e-3
    torch.testing.assert_close(rotate(x, torch.zeros(1, 1)), x)
    place = torch.tensor([[0, 5, 70]])
    assert torch.autograd.gradcheck(lambda z: rotate(z, place), torch.randn(1, 3, 2, 4).double().requires_grad_())


@pytest.mark.parametrize("window", [None, 20])
def test_single_precision_and_bfloat16(window: int | None) -> None:
    c = Case(*(t.detach() for t in case(200)))
    wanted, _ = causal_attention(c.q, c.k, c.v, window=window, reset=c.reset)
    got, _ = causal_attention(c.q.float(), c.k.float(), c.v.float(), window=window, reset=c.reset)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    rounded = [t.bfloat16() for t in c[:3]]
    wanted, _ = causal_attention(*(t.double() for t in rounded), window=window, reset=c.reset)
    with torch.autocast("cpu", torch.bfloat16):
        got, memory = causal_attention(*rounded, window=window, reset=c.reset)
    assert got.dtype == memory.k.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=0.01, atol=0.01)


def test_why_an_execution_is_picked() -> None:
    explain = dispatch.explain_causal_attention
    assert explain(100, 0, None, False, False).path == "sdpa"
    assert explain(100, 0, 100, False, False).path == "sdpa"
    assert "window of 99" in explain(100, 0, 99, False, False).why
    assert "resets" in explain(100, 0, None, True, False).why
    assert "remembered" in explain(100, 5, None, False, False).why
    assert explain(1, 5, 6, True, False).path == "query"
    assert "position term" in explain(1, 0, None, False, True).why


def test_resets_that_change_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention stays PyTorch's own if the only reset is at the first position of an empty memory."""
    c = Case(*(t.detach() for t in case(30)))
    monkeypatch.setattr(blocks, "_in_blocks", None)
    first = torch.zeros(2, 30, dtype=torch.bool)
    first[0, 0] = True
    empty = init_memory(None, 2, 2, 4, 3, dtype=torch.float64)
    y, memory = causal_attention(c.q, c.k, c.v, memory=empty, reset=first)
    torch.testing.assert_close(y, reference(c, None, None))
    assert memory.next_position.tolist() == [30, 30]
    with pytest.raises(TypeError):
        causal_attention(c.q, c.k, c.v, reset=first.roll(1, 1))


@pytest.mark.parametrize(
    "config",
    [
        Attention.Config(16, n_heads=4, window=64, n_kv_heads=2),
        TransformerXL.Config(16, n_heads=2, window=64),
    ],
)
def test_four_thousand_steps_in_single_precision(config: Any) -> None:
    torch.manual_seed(0)
    layer = config.build().eval()
    x = torch.randn(1, 4000, 16)
    with torch.no_grad():
        whole = layer(x)
        state, outputs = layer.init_state(1), []
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
            outputs.append(y_t)
    torch.testing.assert_close(torch.stack(outputs, 1), whole.y, rtol=0, atol=1e-4)
    assert nbytes(state) == config.state_bytes()


def test_fewer_key_heads_shrink_the_state_and_the_projection() -> None:
    whole, shared = Attention.Config(32, n_heads=8), Attention.Config(32, n_heads=8, n_kv_heads=2)
    assert shared.state_bytes() - 8 == (whole.state_bytes() - 8) / 4
    assert shared.build().get_parameter("to_qkv.weight").shape == (32 + 16, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention.Config(8, n_heads=4, n_kv_heads=3), "n_heads 4 is not divisible by n_kv_heads 3"),
        (lambda: Attention.Config(8, n_heads=4, n_kv_heads=0), "n_heads 4 is not divisible by n_kv_heads 0"),
        (lambda: TransformerXL.Config(8, n_heads=3), "d_model 8 is not divisible by n_heads 3"),
        (lambda: TransformerXL.Config(9, n_heads=3), "even d_model, got 9"),
        (lambda: TransformerXL.Config(8, window=0), "window must be at least 1, got 0"),
        (lambda: Mlp.Config(8, expand=0), "expand must be positive, got 0; leave the layer out"),
        (lambda: TrainConfig(1, autocast="fp16"), "'off' .float32. or 'bf16', got 'fp16'"),  # pyright: ignore
    ],
)
def test_configs_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_float16_on_a_cpu_is_refused_in_one_line() -> None:
    """When a layer is built for it, given it, converted to it, or autocast to it."""
    message = "^GRU.*: float16 does not work on a CPU; use float32, or autocast to bfloat16$"
    layer, x = GRU(GRU.Config.tiny()), torch.randn(1, 3, 8)
    with pytest.raises(ConfigError, match=message):
        layer(x.half())
    with pytest.raises(ConfigError, match=message):
        layer.half()(x.half())
    layer = layer.float()
    with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match=message):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with pytest.raises(ConfigError, match=message):
            GRU(GRU.Config.tiny())
        with torch.device("meta"):  # parameters that wait for a device are nobody's float16 on a CPU yet
            GRU(GRU.Config.tiny())
    finally:
        torch.set_default_dtype(default)
