"""Block orders: what the papers draw, written out by hand, and as plain data on the command line."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from recollect.core.config import from_dict, override, to_dict
from recollect.core.errors import ConfigError
from recollect.core.state import leaves, nbytes
from recollect.layers import LAYERS
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.mamba2 import Mamba2
from recollect.layers.mlp import Mlp
from recollect.layers.s5 import S5
from recollect.layers.transformer_xl import TransformerXL
from recollect.models.backbone import Backbone
from recollect.recipes import load_recipe

MAMBA, WINDOW = Mamba2.Config.tiny(), Attention.Config.tiny()


def kinds(config: Backbone.Config) -> list[str]:
    return [layer.kind for layer in config.layers]


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_an_mlp_is_its_equation(activation: Any) -> None:
    config = Mlp.Config(6, expand=1.5, activation=activation)
    torch.manual_seed(0)
    layer = config.build().double()
    w = dict(layer.named_parameters())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    u = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    if activation == "swiglu":
        u = u[..., :9] * torch.sigmoid(u[..., :9]) * u[..., 9:]
    elif activation == "relu":
        u = u.clamp(min=0)
    else:
        u = u * 0.5 * (1 + torch.erf(u / 2**0.5))
    out = layer(x)
    torch.testing.assert_close(out.y, u @ w["out_proj.weight"].T + w["out_proj.bias"])
    assert list(leaves(out.state)) == []
    assert config.state_bytes(3) == nbytes(layer.init_state(3)) == 0


def test_the_s4_block_of_the_figure() -> None:
    """Twice u + mixer(LayerNorm u), then u + MLP(LayerNorm u) with GELU, for every block; then the last norm."""
    config = Backbone.Config.s4_blocks(S5.Config.tiny(), 2, mlp_expand=3.0)
    assert kinds(config) == ["s5", "s5", "mlp"] * 2
    torch.manual_seed(0)
    backbone = Backbone(config).double().eval()
    u = x = torch.randn(2, 9, 8, dtype=torch.float64)
    for block in range(2):
        for i in range(3 * block, 3 * block + 2):
            u = u + backbone.layers[i](F.layer_norm(u, (8,))).y
        mlp = backbone.layers[3 * block + 2]
        hidden = F.gelu(mlp.in_proj(F.layer_norm(u, (8,))))
        assert hidden.shape[-1] == 24
        u = u + mlp.out_proj(hidden)
    torch.testing.assert_close(backbone(x).y, F.layer_norm(u, (8,)))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_mixer_makes_s4_blocks(kind: str) -> None:
    mixer = LAYERS[kind].Config.tiny()
    config = Backbone.Config.s4_blocks(mixer, 1)
    assert config.layers == (mixer, mixer, Mlp.Config(mixer.d_model, expand=2.0, activation="gelu"))
    assert config.norm == "layer"
    x = torch.randn(1, 3, mixer.d_model)
    assert config.build()(x).y.shape == x.shape


def test_samba_with_and_without_its_mlps() -> None:
    config = Backbone.Config.samba(MAMBA, WINDOW, 2)
    mlp = Mlp.Config(8, expand=4.0, activation="swiglu")
    assert config.layers == (MAMBA, mlp, WINDOW, mlp) * 2
    assert Backbone.Config.samba(MAMBA, WINDOW, 2, mlp_expand=0).layers == (MAMBA, WINDOW) * 2


def test_alternating_with_and_without_mlps() -> None:
    config = Backbone.Config.alternating(8, (MAMBA, WINDOW), mlp_expand=1.5, norm="layer")
    mlp = Mlp.Config(8, expand=1.5, activation="gelu")
    assert config == Backbone.Config(8, (MAMBA, mlp, WINDOW, mlp), "layer")
    assert Backbone.Config.alternating(8, (MAMBA, WINDOW), 0) == Backbone.Config(8, (MAMBA, WINDOW))


def test_all_layers_are_read_side_by_side() -> None:
    """y = norm(W [x_1; x_2]) with x_1 = x + mixer(norm x) and x_2 = x_1 + MLP(norm x_1)."""
    config = Backbone.Config(8, (GRU.Config(8), Mlp.Config(8)), "layer", reads="all")
    torch.manual_seed(0)
    backbone = Backbone(config).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    one = x + backbone.layers[0](F.layer_norm(x, (8,))).y
    two = one + backbone.layers[1](F.layer_norm(one, (8,))).y
    assert backbone.read_all is not None
    wanted = F.layer_norm(torch.cat([one, two], -1) @ backbone.read_all.weight.T + backbone.read_all.bias, (8,))
    torch.testing.assert_close(backbone(x).y, wanted)
    assert backbone.read_all.weight.shape == (8, 16)


def test_the_demo_keeps_its_world_models() -> None:
    """Two mixers, each followed by a GELU MLP of twice the width, RMS norms before each and at the end."""
    faceoff = load_recipe("demo")
    backbone = faceoff.pick("s5", "world").problem.dynamics.backbone  # pyright: ignore[reportAttributeAccessIssue]
    mixer = S5.Config(64, d_state=64)
    mlp = Mlp.Config(64, expand=2.0, activation="gelu")
    assert backbone == Backbone.Config(64, (mixer, mlp, mixer, mlp), "rms")
    per_mlp = 64 * 128 + 128 + 128 * 64 + 64
    mixers = sum(p.numel() for p in mixer.build().parameters())
    assert sum(p.numel() for p in backbone.build().parameters()) == 2 * (mixers + per_mlp) + 5 * 64


def test_nested_layers_are_set_by_their_place() -> None:
    config = Backbone.Config.alternating(8, (GRU.Config(8), TransformerXL.Config(8)))
    changed = override(config, ["layers.1.expand=3", "layers.3.activation=swiglu", "layers.2.window=9", "norm=layer"])
    assert changed.layers[1] == Mlp.Config(8, expand=3.0)
    assert changed.layers[2] == TransformerXL.Config(8, window=9)
    assert changed.layers[3] == Mlp.Config(8, activation="swiglu")
    assert from_dict(Backbone.Config, to_dict(changed)) == changed
    whole = override(config, ['layers=[{"kind": "gru", "d_model": 8}, {"kind": "mlp", "d_model": 8}]'])
    assert kinds(whole) == ["gru", "mlp"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Backbone.Config.s4_blocks(MAMBA, 0), "n_blocks must be at least 1, got 0"),
        (lambda: Backbone.Config.samba(MAMBA, WINDOW, -1), "n_blocks must be at least 1, got -1"),
        (lambda: Backbone.Config.samba(MAMBA, GRU.Config(12), 1), "layers.2.d_model 12 must equal d_model 8"),
        (lambda: Backbone.Config.alternating(8, ()), "layers is empty"),
        (lambda: Backbone.Config.alternating(8, (MAMBA,), -1.0), "expand must be positive, got -1.0"),
        (lambda: override(Backbone.Config.tiny(), ["mlp_expand=2"]), "unknown key 'mlp_expand'"),
        (lambda: override(Backbone.Config.s4_blocks(MAMBA, 1), ["layers.2.expnd=2"]), "did you mean 'expand'"),
        (lambda: Backbone.Config(8, (MAMBA,), reads=cast(Any, "some")), "reads must be 'last' or 'all', got 'some'"),
        (lambda: Mlp.Config(8, activation=cast(Any, "tanh")), "activation must be gelu, swiglu or relu"),
    ],
)
def test_orders_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "config",
    [
        Backbone.Config.s4_blocks(S5.Config(8, d_state=8), 1),
        Backbone.Config.samba(MAMBA, Attention.Config(8, n_heads=2, window=32), 1, mlp_expand=2.0),
    ],
)
def test_four_thousand_steps_in_single_precision(config: Backbone.Config) -> None:
    torch.manual_seed(0)
    backbone = config.build().eval()
    x = torch.randn(1, 4000, 8)
    with torch.no_grad():
        whole = backbone(x).y
        state, outputs = backbone.init_state(1), []
        for x_t in x.unbind(1):
            y_t, state = backbone.step(x_t, state)
            outputs.append(y_t)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=0, atol=1e-4)
