"""The layers on matrix memories, Gated DeltaNet and mLSTM: precision on either execution, autocast."""

from __future__ import annotations

import pytest
import torch

from recollect.core.state import map_state
from recollect.ops import dispatch
from test_layer_laws import CASES, fold, sample

PATHS = ("auto", "torch")

pytestmark = pytest.mark.usefixtures("poisoned_empty")

MATRIX_MEMORIES = [name for name in CASES if name.startswith(("mlstm-", "gated_deltanet-"))]


@pytest.mark.parametrize("case", ["mlstm-tiny", "gated_deltanet-tiny"])
def test_four_thousand_steps_in_single_precision(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sample(CASES[case]).layer.float()
    x = torch.randn(1, 4000, CASES[case].d_model)
    with torch.no_grad():
        stepped = fold(layer, x, layer.state_like(x), None)
        for path in PATHS:
            monkeypatch.setattr(dispatch, "KERNELS", path)
            out = layer(x)
            torch.testing.assert_close(out.y, stepped.y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", MATRIX_MEMORIES)
def test_layers_run_under_autocast(case: str) -> None:
    layer, x = CASES[case].build(), torch.randn(2, 20, CASES[case].d_model)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        stepped, state = layer.step(x[:, 0], out.state)
        out.y.float().sum().backward()
    assert out.y.isfinite().all()
    assert stepped.isfinite().all()
    torch.testing.assert_close(out.y.float(), layer(x).y, rtol=0, atol=0.1)
    map_state(lambda before, after: after.view_as(before), out.state, state)
