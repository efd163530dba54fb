"""The short gated convolution is its equation, and stands in front of attention in a backbone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.layers.attention import Attention
from recollect.layers.short_conv import ShortConv
from recollect.models.backbone import Backbone
from recollect.ops import dispatch


@pytest.mark.parametrize("form", ["auto", "torch"])
@pytest.mark.parametrize(("taps", "bias"), [(4, True), (3, False), (1, True)])
def test_it_is_its_equation(monkeypatch: pytest.MonkeyPatch, form: str, taps: int, bias: bool) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", form)
    torch.manual_seed(0)
    layer = ShortConv.Config(6, d_conv=taps, conv_bias=bias).build().double()
    w = dict(layer.named_parameters())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    u, gate = (x @ w["in_proj.weight"].T).chunk(2, -1)
    convolved = F.conv1d(F.pad(u.mT, (taps - 1, 0)), w["conv1d.weight"], w.get("conv1d.bias"), groups=6).mT
    torch.testing.assert_close(layer(x).y, (convolved * gate * gate.sigmoid()) @ w["out_proj.weight"].T)


def test_a_convolution_before_each_attention() -> None:
    """A prefix in parallel and the rest step by step is the whole, and a token reaches the position after it."""
    conv, attention = ShortConv.Config(8), Attention.Config(8, n_heads=2, window=16)
    torch.manual_seed(0)
    backbone = Backbone.Config(8, layers=(conv, attention, conv, attention)).build().double().eval()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    whole = backbone(x)
    first = backbone(x[:, :7])
    state, outputs = first.state, [first.y]
    for x_t in x[:, 7:].unbind(1):
        y_t, state = backbone.step(x_t, state)
        outputs.append(y_t.unsqueeze(1))
    torch.testing.assert_close(torch.cat(outputs, 1), whole.y)
    assert nbytes(state) == backbone.config.state_bytes(2, dtype=torch.float64, seen=12)
    changed = torch.cat([x[:, :3], x[:, 3:4] + 1, x[:, 4:]], 1)
    assert (backbone.layers[0](changed).y - backbone.layers[0](x).y).abs().sum(-1)[0].bool().tolist() == (
        [False] * 3 + [True] * 4 + [False] * 5
    )


def test_widths_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^short_conv: d_conv must be at least 1, got 0$"):
        ShortConv.Config(8, d_conv=0)
