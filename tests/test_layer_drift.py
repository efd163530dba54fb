"""In float32, too, running in parallel and running step by step stay together over thousands of positions."""

from __future__ import annotations

import zlib

import pytest
import torch

from recollect.core.layer import LayerConfig
from recollect.layers import LAYERS
from recollect.models.backbone import Backbone

STEPS, TOLERANCE = 4000, 1e-4

CASES: dict[str, LayerConfig] = {
    f"{kind}-{name}": config
    for kind, cls in {**LAYERS, "backbone": Backbone}.items()
    for name, config in cls.Config.declared().items()
    if name == "tiny"
}


@pytest.mark.parametrize("case", CASES)
def test_parallel_and_step_stay_together(case: str) -> None:
    """With resets on the way, since after one both must have forgotten alike. Tolerance relative to the outputs."""
    torch.manual_seed(zlib.crc32(case.encode()))
    config = CASES[case]
    layer = config.build().eval()
    x = torch.randn(1, STEPS, config.d_model)
    reset = torch.zeros(1, STEPS, dtype=torch.bool)
    reset[:, 1500] = config.state_bytes(seen=1) == config.state_bytes(seen=0)
    with torch.no_grad():
        parallel = layer(x, reset=reset)
        state, outputs = layer.state_like(x), []
        for x_t, reset_t in zip(x.unbind(1), reset.unbind(1), strict=True):
            y_t, state = layer.step(x_t, state, reset=reset_t)
            outputs.append(y_t)
    stepped = torch.stack(outputs, 1)
    scale = max(1.0, stepped.square().mean().sqrt().item())
    assert (parallel.y - stepped).abs().max() <= TOLERANCE * scale
