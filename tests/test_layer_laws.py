"""The seven laws of ``recollect.core.layer``, over every registered layer in every configuration its file declares."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect.core.layer import BranchedConfig, BranchedLayer, Dual, LayerConfig, LayerOut, SequenceLayer
from recollect.core.state import detach, index_batch, leaves, map_state, nbytes
from recollect.layers import LAYERS
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.models.backbone import Backbone
from recollect.ops import dispatch


def documented_layer() -> LayerConfig:
    """The example of docs/adding-things.md, read from the page: what the page calls complete must obey the laws."""
    page = (Path(__file__).parents[1] / "docs" / "adding-things.md").read_text()
    code = page[page.index("```python") + len("```python") : page.index("```\n", page.index("```python") + 1)]
    module = ModuleType("layer_of_the_docs")
    sys.modules[module.__name__] = module
    exec(compile(code, "docs/adding-things.md", "exec"), module.__dict__)
    return module.__dict__["Leaky"].Config.tiny()


CASES: dict[str, LayerConfig] = (
    {"documented": documented_layer()}
    | {
        f"{kind}-{name}": config
        for kind, cls in {**LAYERS, "backbone": Backbone}.items()
        for name, config in cls.Config.declared().items()
    }
    | {
        f"hax-over-{kind}": HAX.Config.recommended(cls.Config.tiny().d_model, cls.Config.tiny())
        for kind, cls in LAYERS.items()
        if kind not in ("hax", "mlp")
    }
)

BATCH, LENGTH = 3, 70
SPLITS = (1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 69)
TOLERANCE = 1e-9

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class Sample(NamedTuple):
    """A layer in eval mode with everything that drives it: inputs, a lived-in state, resets, output weights."""

    layer: SequenceLayer
    config: LayerConfig
    x: Tensor
    state: Any
    reset: Tensor
    weight: Tensor


def sample(config: LayerConfig, build: Callable[[Any], SequenceLayer] | None = None) -> Sample:
    """Float64, every parameter moved off its initial value (zeros and ones hide mistakes), a state 9 positions old."""
    torch.manual_seed(zlib.crc32(repr(config).encode()))
    layer = (config.build() if build is None else build(config)).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        state = detach(layer(random(BATCH, 9, config.d_model)).state)
    reset = torch.rand(BATCH, LENGTH) < 0.08
    reset[:, 30:32] = True
    reset[0, 0] = True
    reset[1] = False
    return Sample(
        layer, config, random(BATCH, LENGTH, config.d_model), state, reset, random(BATCH, LENGTH, config.d_model)
    )


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def assert_near(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if not actual.is_floating_point() and not actual.is_complex():
        tolerance = 0
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False, msg=lambda text: f"{what}: {text}"
    )


def assert_states_near(actual: Any, expected: Any, what: str) -> None:
    for (name, one), (other_name, other) in zip(leaves(actual), leaves(expected), strict=True):
        assert name == other_name
        assert_near(one, other, f"{what}: state.{name}")


def assert_same_memory(s: Sample, actual: Any, expected: Any, what: str) -> None:
    """Two states that mean the same: leaf by leaf, or by what the layer does next where states grow.

    A state that grows has room for the longest segment in its batch, so its size may depend on other rows; what it
    remembers of a row may not.
    """
    if s.config.state_bytes(seen=1) == s.config.state_bytes(seen=0):
        assert_states_near(actual, expected, what)
        return
    rows = next(leaf.shape[0] for _, leaf in leaves(actual))
    probe = random(rows, 20, s.x.shape[-1])
    assert_near(s.layer(probe, actual).y, s.layer(probe, expected).y, f"{what}: what the state leads to")


def fold(layer: SequenceLayer, x: Tensor, state: Any, reset: Tensor | None) -> LayerOut:
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        y_t, state = layer.step(x_t, state, reset=None if reset is None else reset[:, t])
        outputs.append(y_t)
    return LayerOut(torch.stack(outputs, 1), state, {})


def differentiable(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def gradients(
    run: Callable[[SequenceLayer, Tensor, Any, Tensor | None], LayerOut], s: Sample, reset: Tensor | None
) -> tuple[LayerOut, dict[str, Tensor]]:
    """Outputs; gradients of a random function of outputs and final state by inputs, incoming state and parameters."""
    x = s.x.clone().requires_grad_()
    state = map_state(lambda leaf: leaf.clone().requires_grad_(differentiable(leaf)), s.state)
    wanted = {"x": x, **{f"state.{name}": leaf for name, leaf in leaves(state) if leaf.requires_grad}}
    wanted |= {name: parameter for name, parameter in s.layer.named_parameters() if parameter.requires_grad}
    out = run(s.layer, x, state, reset)
    loss = (out.y * s.weight).sum()
    generator = torch.Generator().manual_seed(1)
    for _, leaf in leaves(out.state):
        if differentiable(leaf):
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
            loss = loss + (torch.where(real.isfinite(), real, 0) * weight).sum()
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return out, {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def law_fold(s: Sample) -> None:
    for reset in (None, s.reset, torch.zeros_like(s.reset)):
        parallel, parallel_grads = gradients(lambda layer, x, h, r: layer(x, h, reset=r), s, reset)
        stepped, stepped_grads = gradients(fold, s, reset)
        assert_near(parallel.y, stepped.y, "outputs")
        assert_states_near(parallel.state, stepped.state, "final")
        for name, grad in stepped_grads.items():
            assert_near(parallel_grads[name], grad, f"gradient of {name}")
    with torch.no_grad():
        assert_near(s.layer(s.x).y, fold(s.layer, s.x, s.layer.state_like(s.x), None).y, "outputs from no state")


def law_split(s: Sample) -> None:
    with torch.no_grad():
        whole = s.layer(s.x, s.state, reset=s.reset)
        for k in SPLITS:
            head = s.layer(s.x[:, :k], s.state, reset=s.reset[:, :k])
            tail = s.layer(s.x[:, k:], head.state, reset=s.reset[:, k:])
            assert_near(torch.cat([head.y, tail.y], 1), whole.y, f"outputs split at {k}")
            assert_states_near(tail.state, whole.state, f"split at {k}")


def law_reset(s: Sample) -> None:
    for t in (0, 1, 17, 64, LENGTH - 1):
        reset = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        reset[:, t] = True
        x = s.x.clone().requires_grad_()
        joined = s.layer(x, s.state, reset=reset)
        with torch.no_grad():
            after = s.layer(s.x[:, t:])
            assert_near(joined.y[:, t:], after.y, f"outputs after the reset at {t}")
            assert_same_memory(s, joined.state, after.state, f"after the reset at {t}")
            if t:
                before = s.layer(s.x[:, :t], s.state)
                assert_near(joined.y[:, :t], before.y, f"outputs before the reset at {t}")
        (grad,) = torch.autograd.grad((joined.y * s.weight)[:, t:].sum(), x)
        assert_near(grad[:, :t], torch.zeros_like(grad[:, :t]), f"gradient across the reset at {t}")
    with torch.no_grad():
        rows = torch.tensor([False, True, False])
        plain, _ = s.layer.step(s.x[:, 0], s.state)
        fresh, _ = s.layer.step(s.x[:, 0], s.layer.state_like(s.x))
        mixed, _ = s.layer.step(s.x[:, 0], s.state, reset=rows)
        assert_near(mixed, torch.where(rows[:, None], fresh, plain), "step with one row reset")


def law_causal(s: Sample) -> None:
    exact = s.layer.causality == "exact"
    tolerance = 0.0 if exact else 1e-12
    for reset in (None, s.reset):
        x = s.x.clone().requires_grad_()
        y = s.layer(x, s.state, reset=reset).y
        for t in (0, 15, 40, 63, LENGTH - 2):
            (grad,) = torch.autograd.grad((y * s.weight)[:, t].sum(), x, retain_graph=True)
            assert grad[:, t + 1 :].abs().max() <= tolerance, f"y[{t}] depends on later inputs"
            changed = s.x.clone()
            changed[:, t + 1 :] = 10 * random(BATCH, LENGTH - t - 1, s.x.shape[2])
            with torch.no_grad():
                prefix = s.layer(changed, s.state, reset=reset).y[:, : t + 1]
            error = (prefix - y[:, : t + 1]).abs().max()
            assert error <= tolerance, f"changing inputs after {t} moved outputs up to it by {error}"


def law_pure(s: Sample) -> None:
    x, reset = s.x.clone(), s.reset.clone()
    state = map_state(torch.clone, s.state)
    held = {name: tensor.clone() for name, tensor in s.layer.state_dict().items()}
    with torch.no_grad():
        outs = [s.layer(s.x, s.state, reset=s.reset) for _ in range(2)]
        steps = [s.layer.step(s.x[:, 0], s.state, reset=s.reset[:, 0]) for _ in range(2)]
    assert torch.equal(outs[0].y, outs[1].y)
    assert torch.equal(steps[0][0], steps[1][0])
    ends = [(out.state, stepped[1]) for out, stepped in zip(outs, steps, strict=True)]
    for (name, one), (_, other) in zip(leaves(ends[0]), leaves(ends[1]), strict=True):
        assert torch.equal(one, other), f"the same call twice gave two states: {name}"
    assert torch.equal(s.x, x), "the input was written to"
    assert torch.equal(s.reset, reset), "reset was written to"
    for (name, now), (_, was) in zip(leaves(s.state), leaves(state), strict=True):
        assert torch.equal(now, was), f"the incoming state was written to: {name}"
    for name, tensor in s.layer.state_dict().items():
        assert torch.equal(tensor, held[name]), f"eval changed {name}"


def law_batch(s: Sample) -> None:
    index = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        y, state = s.layer.step(s.x[:, 0], s.state, reset=s.reset[:, 0])
        picked_y, picked = s.layer.step(s.x[index, 0], index_batch(s.state, index), reset=s.reset[index, 0])
        assert_near(picked_y, y[index], "step of picked rows")
        assert_same_memory(s, picked, index_batch(state, index), "step of picked rows")
        whole = s.layer(s.x, s.state, reset=s.reset)
        for row in range(BATCH):
            only = torch.tensor([row])
            alone = s.layer(s.x[only], index_batch(s.state, only), reset=s.reset[only])
            assert_near(alone.y, whole.y[only], f"row {row} alone")
            assert_same_memory(s, alone.state, index_batch(whole.state, only), f"row {row} alone")


def law_bounded(s: Sample) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        state = s.layer.init_state(BATCH, dtype=dtype)
        assert nbytes(state) == s.config.state_bytes(BATCH, dtype=dtype, seen=0), f"initial state in {dtype}"
    with torch.no_grad():
        for length in (1, 7, LENGTH):
            state = s.layer(s.x[:, :length]).state
            declared = s.config.state_bytes(BATCH, dtype=torch.float64, seen=length)
            assert nbytes(state) == declared, f"state after {length} positions"
    assert all(leaf.shape[0] == BATCH for _, leaf in leaves(state)), "batch comes first on every leaf"


LAWS: dict[str, Callable[[Sample], None]] = {
    "fold": law_fold,
    "split": law_split,
    "reset": law_reset,
    "causal": law_causal,
    "pure": law_pure,
    "batch": law_batch,
    "bounded": law_bounded,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("case", CASES)
def test_law(case: str, law: str) -> None:
    LAWS[law](sample(CASES[case]))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("case", CASES)
def test_law_without_compiled_kernels(case: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: PyTorch's operations alone, and sparse attention in tiles, which takes a long sequence otherwise."""
    monkeypatch.setattr(dispatch, "KERNELS", "torch")
    monkeypatch.setattr(dispatch, "DENSE_SOURCES", 0)
    LAWS[law](sample(CASES[case]))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_scalars_and_shapes_are_kept(case: str) -> None:
    s = sample(CASES[case])
    out = s.layer.train()(s.x, s.state, reset=s.reset)
    assert out.y.shape == s.x.shape
    assert out.y.dtype == s.x.dtype
    for name, loss in out.aux.items():
        assert loss.shape == (), f"aux.{name} has shape {tuple(loss.shape)}"
        assert loss.isfinite(), f"aux.{name} is not finite"


@pytest.mark.parametrize("case", [name for name, config in CASES.items() if isinstance(config, BranchedConfig)])
def test_a_branch_joins_forward_and_step_alike(case: str) -> None:
    """It is called once, with activations, queries, keys and values of the declared widths, and moves the output."""
    s = sample(CASES[case])
    layer = s.layer
    assert isinstance(layer, BranchedLayer)
    assert isinstance(s.config, BranchedConfig)
    assert layer.d_inner == s.config.inner
    widths: list[tuple[int, ...]] = []

    def branch(u: Tensor, dual: Callable[[], Dual] | None = None) -> Tensor:
        own = () if dual is None else dual()
        widths.append((u.shape[-1], *(part.shape[-1] for part in own)))
        moved = torch.sin(3 * u)
        return moved + (own[0] * own[1]).sum(-1, keepdim=True) * own[2] if own else moved

    state, outputs = s.state, []
    with torch.no_grad():
        joined = layer(s.x, s.state, reset=s.reset, branch=branch)
        shown = s.config.dual
        assert widths == [(layer.d_inner, shown, shown, layer.d_inner) if shown else (layer.d_inner,)]
        for t, x_t in enumerate(s.x.unbind(1)):
            y_t, state = layer.step(x_t, state, reset=s.reset[:, t], branch=branch)
            outputs.append(y_t)
        plain = layer(s.x, s.state, reset=s.reset)
    assert_near(joined.y, torch.stack(outputs, 1), "outputs with a branch")
    assert_states_near(joined.state, plain.state, "state with a branch")
    assert (joined.y - plain.y).abs().max() > 1e-3


class FoldBreaker(GRU):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> LayerOut:
        return super().forward(x * 1.001, *args, **kwargs)


class SplitBreaker(GRU):
    def forward(self, x: Tensor, state: Any = None, **kwargs: Any) -> LayerOut:  # noqa: ARG002
        return super().forward(x, None, **kwargs)


class ResetBreaker(GRU):
    def forward(self, x: Tensor, state: Any = None, **kwargs: Any) -> LayerOut:
        return super().forward(x, state, **(kwargs | {"reset": None}))


class CausalBreaker(GRU):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> LayerOut:
        return super().forward(x - 1e-6 * x.mean(1, keepdim=True), *args, **kwargs)


class PureBreaker(GRU):
    def forward(self, x: Tensor, state: Any = None, **kwargs: Any) -> LayerOut:
        out = super().forward(x, state, **kwargs)
        if state is not None:
            state.h.copy_(out.state.h)
        return out


class BatchBreaker(GRU):
    def step(self, x: Tensor, state: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        y, state = super().step(x, state, **kwargs)
        return y - y.mean(0), state


@pytest.mark.parametrize(
    ("law", "breaker"),
    [
        ("fold", FoldBreaker),
        ("split", SplitBreaker),
        ("reset", ResetBreaker),
        ("causal", CausalBreaker),
        ("pure", PureBreaker),
        ("batch", BatchBreaker),
    ],
)
def test_a_layer_that_breaks_a_law_is_caught(law: str, breaker: type[GRU]) -> None:
    with pytest.raises(AssertionError):
        LAWS[law](sample(GRU.Config.tiny(), breaker))


def test_a_layer_that_holds_more_than_it_declares_is_caught() -> None:
    s = sample(GRU.Config.tiny())
    with pytest.raises(AssertionError):
        law_bounded(s._replace(config=GRU.Config(d_model=8, d_inner=7)))
