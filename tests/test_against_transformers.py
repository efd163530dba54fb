"""`mamba` and `mamba2` against transformers' layers of the same names with the same weights.

transformers takes parts of a layer in float32 even when everything else is float64: A and B u dt in Mamba, A, the scan
and the norm in Mamba-2. In the comparison in float64, ``Tensor.float`` and ``torch.float32`` mean float64 to its two
modules; without that both sides agree to about 1e-6 only.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from recollect.core.layer import SequenceLayer
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.ops import dispatch

MAMBA = {
    "plain": Mamba.Config(16, d_state=16),
    "odd": Mamba.Config(12, d_state=5, d_conv=3, expand=3, dt_rank=2, dt_init="constant", conv_bias=False),
}
MAMBA2 = {
    "one_group": Mamba2.Config(32, d_state=16, d_head=16, chunk_size=16),
    "two_groups": Mamba2.Config(32, d_state=8, d_head=8, n_groups=2, chunk_size=8, d_conv=3),
    "a_group_per_head": Mamba2.Config(12, d_state=5, d_head=6, n_groups=4, chunk_size=64),
}
CASES = [*(("mamba", name) for name in MAMBA), *(("mamba2", name) for name in MAMBA2)]
LENGTHS = (1, 5, 65)


def pair(kind: str, name: str) -> tuple[SequenceLayer, torch.nn.Module, Any]:
    """Our layer, theirs with its weights, and their config."""
    torch.manual_seed(1)
    if kind == "mamba":
        c = MAMBA[name]
        config = MambaConfig(
            hidden_size=c.d_model,
            state_size=c.d_state,
            expand=c.expand,
            conv_kernel=c.d_conv,
            use_conv_bias=c.conv_bias,
            time_step_rank=c.rank,
            num_hidden_layers=1,
        )
        ours, theirs = Mamba(c), modeling_mamba.MambaMixer(config, 0)
    else:
        c = MAMBA2[name]
        config = Mamba2Config(
            hidden_size=c.d_model,
            state_size=c.d_state,
            expand=c.expand,
            conv_kernel=c.d_conv,
            num_heads=c.n_heads,
            head_dim=c.d_head,
            n_groups=c.n_groups,
            chunk_size=c.chunk_size,
            num_hidden_layers=1,
        )
        ours, theirs = Mamba2(c), modeling_mamba2.Mamba2Mixer(config, 0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval(), config


@pytest.fixture
def float_is_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' casts to float32 keep float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for module in (modeling_mamba, modeling_mamba2):
        seen = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch)})
        seen.float32 = torch.float64
        monkeypatch.setattr(module, "torch", seen)


def compare(kind: str, name: str, length: int, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs, _ = pair(kind, name)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = torch.randn(2, length, ours.config.d_model, dtype=dtype)
    weight = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    found = []
    for run in (lambda x: ours(x).y, theirs):
        x = x.detach().requires_grad_()
        y = run(x)
        module = theirs if run is theirs else ours
        grads = torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])
        names = ["x", *(name for name, _ in module.named_parameters())]
        found.append({"output": y, **{f"gradient of {n}": g for n, g in zip(names, grads, strict=True)}})
    assert found[0].keys() == found[1].keys()
    for what, value in found[1].items():
        error = (found[0][what] - value).abs().max() / value.abs().max().clamp_min(1)
        assert error <= tolerance, f"{what}: relative error {error}"


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward_and_gradients(
    kind: str, name: str, length: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", kernels)
    compare(kind, name, length, torch.float32, 1e-4)


@pytest.mark.usefixtures("float_is_double")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward_and_gradients_in_double_precision(kind: str, name: str, length: int) -> None:
    compare(kind, name, length, torch.float64, 1e-9)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_prefill_and_decoding(kind: str, name: str) -> None:
    """A prefix at once and 12 positions one by one, each side with its own state."""
    ours, theirs, config = pair(kind, name)
    x = torch.randn(2, 31, ours.config.d_model)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        state = ours(x[:, :19]).state
        theirs(x[:, :19], cache_params=cache)
        for t in range(19, 31):
            y, state = ours.step(x[:, t], state)
            wanted = theirs(x[:, t : t + 1], cache_params=cache)[:, 0]
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_a_norm_over_all_groups_would_be_noticed() -> None:
    """The two ways to normalise differ by far more than the tolerance."""
    ours, theirs, _ = pair("mamba2", "two_groups")
    x = torch.randn(2, 9, 32)
    theirs.norm.group_size = ours.config.d_inner
    with torch.no_grad():
        assert (ours(x).y - theirs(x)).abs().max() > 1e-2
