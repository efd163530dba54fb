"""World models by the names their papers give them: the dynamics of each, for one size of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from recollect.core.layer import LayerConfig
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s4 import S4
from recollect.layers.s5 import S5
from recollect.layers.transformer_xl import TransformerXL
from recollect.models.backbone import Backbone
from recollect.models.dynamics import DynamicsConfig
from recollect.models.latent import LatentConfig
from recollect.models.rssm import RSSM
from recollect.models.s4wm import S4WM


@dataclass(frozen=True)
class Size:
    """What all presets share. ``window`` and ``chunk`` are of the baselines: what ``tssm`` sees, and where their
    gradients are cut.
    """

    d_model: int = 256
    n_blocks: int = 2
    d_state: int = 64
    hidden: int = 256
    latent: LatentConfig = field(default_factory=LatentConfig)
    window: int = 128
    chunk: int | None = 64


def _rssm(size: Size) -> DynamicsConfig:
    return RSSM.Config(latent=size.latent, hidden=size.hidden, chunk=size.chunk, d_deter=2 * size.d_model)


def _tssm(size: Size) -> DynamicsConfig:
    layer = TransformerXL.Config(size.d_model, window=size.window)
    backbone = Backbone.Config.alternating(size.d_model, (layer,) * 2 * size.n_blocks, norm="layer")
    return S4WM.Config(backbone, latent=size.latent, hidden=size.hidden, chunk=size.chunk)


def _blocks(size: Size, mixer: LayerConfig) -> DynamicsConfig:
    return S4WM.Config(Backbone.Config.s4_blocks(mixer, size.n_blocks), latent=size.latent, hidden=size.hidden)


PRESETS: dict[str, Callable[[Size], DynamicsConfig]] = {
    "rssm": _rssm,
    "tssm": _tssm,
    "s4wm": lambda size: _blocks(size, S4.Config(size.d_model, d_state=size.d_state)),
    "s5wm": lambda size: _blocks(size, S5.Config(size.d_model, d_state=size.d_state)),
    "mamba2wm": lambda size: _blocks(size, Mamba2.Config(size.d_model, d_state=size.d_state)),
}
