"""Small world models of every kind of memory, for tests."""

from __future__ import annotations

from typing import Any

from recollect.core.layer import LayerConfig
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.s4 import S4
from recollect.layers.s5 import S5
from recollect.layers.transformer_xl import TransformerXL
from recollect.models.backbone import Backbone
from recollect.models.dynamics import DynamicsConfig
from recollect.models.latent import LatentConfig
from recollect.models.rssm import RSSM
from recollect.models.s4wm import S4WM

LATENT = LatentConfig(groups=4, classes=8)


def s4wm(layer: LayerConfig, **changes: Any) -> S4WM.Config:
    backbone = Backbone.Config.alternating(layer.d_model, (layer, layer), mlp_expand=1.0)
    return S4WM.Config(backbone, latent=LATENT, hidden=32, **changes)


DYNAMICS: dict[str, DynamicsConfig] = {
    "gru": s4wm(GRU.Config.tiny()),
    "attention": s4wm(Attention.Config.tiny()),
    "s4": s4wm(S4.Config.tiny()),
    "s5": s4wm(S5.Config.tiny()),
    "hax": s4wm(HAX.Config.tiny()),
    "transformer_xl": s4wm(TransformerXL.Config.tiny()),
    "chunked": s4wm(GRU.Config.tiny(), chunk=7),
    "rssm": RSSM.Config(d_deter=24, latent=LATENT, hidden=32),
    "full": s4wm(Attention.Config.declared()["full"]),
    "rssm-chunked": RSSM.Config(d_deter=24, latent=LATENT, hidden=32, chunk=7),
}
