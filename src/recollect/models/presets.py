"""World models by name: one size, many memories, equal numbers of parameters.

A size sets the width and how many parameters a block may have: those of the paper's, two S4 layers and an MLP. Other
memories take the same number: the MLP's width is what their mixers leave, and the RSSM's is what brings it there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from recollect.core.config import Config
from recollect.core.errors import ConfigError, nearest
from recollect.core.layer import LayerConfig
from recollect.layers.attention import Attention
from recollect.layers.dss import DSS
from recollect.layers.gated_deltanet import GatedDeltaNet
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.mlp import Mlp
from recollect.layers.mlstm import MLSTM
from recollect.layers.s4 import S4
from recollect.layers.s4d import S4D
from recollect.layers.s5 import S5
from recollect.layers.transformer_xl import TransformerXL
from recollect.models.backbone import Backbone
from recollect.models.dynamics import DynamicsConfig
from recollect.models.latent import LatentConfig
from recollect.models.rssm import RSSM
from recollect.models.s4wm import S4WM
from recollect.ops.patterns import KeySelection, Lsh

LEAST_EXPAND = 0.25
"""Of an MLP where the mixers leave it next to nothing."""


@dataclass(frozen=True)
class Size(Config, kind="world-size"):
    """What world models of one face-off have in common."""

    d_model: int = 64
    n_blocks: int = 2
    d_state: int = 64
    """Of S4, S4D and DSS per channel, and of Mamba-2; Mamba's is 16, S5's ``d_model``."""
    hidden: int = 128
    latent: LatentConfig = field(default_factory=lambda: LatentConfig(groups=16, classes=16))
    window: int = 64
    """Positions that the Transformer-XL's queries see."""
    n_keys: int = 64
    """Keys per query of sparse attention, a quarter of them by selection and the others by hash: frames move slowly,
    and those just seen fill a bucket before what looked like them long ago."""
    n_bits: int = 5
    """Of the hash: its state grows with 2^n_bits buckets."""
    chunk: int = 64
    """Steps that the RSSM's gradients reach back."""

    @property
    def d_head(self) -> int:
        """Width of a head of attention and of matrix memories: four heads, none wider than 64."""
        return min(64, self.d_model // 4)

    @property
    def block_parameters(self) -> int:
        """Of two S4 layers and an MLP twice as wide as the model."""
        return 2 * _parameters(S4.Config(self.d_model, d_state=self.d_state)) + _parameters(Mlp.Config(self.d_model))


def preset(name: str, size: Size) -> DynamicsConfig:
    """The dynamics of that name and size. Raises ConfigError naming the nearest known one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown world model '{name}'{nearest(name, PRESETS)}")
    return PRESETS[name](size)


def _blocks(size: Size, *mixers: LayerConfig) -> S4WM.Config:
    """Blocks of these mixers and an MLP of the parameters that they leave."""
    return _each_block(size, [mixers] * size.n_blocks)


def _each_block(size: Size, blocks: Sequence[Sequence[LayerConfig]]) -> S4WM.Config:
    """Likewise, of mixers that may differ from block to block."""
    layers: list[LayerConfig] = []
    for mixers in blocks:
        left = size.block_parameters - sum(map(_parameters, mixers))
        # Two matrices of d_model x expand d_model; biases are few.
        expand = max(LEAST_EXPAND, round(8 * left / (2 * size.d_model**2)) / 8)
        layers += [*mixers, Mlp.Config(size.d_model, expand=expand)]
    return S4WM.Config(Backbone.Config(size.d_model, tuple(layers), "layer"), latent=size.latent, hidden=size.hidden)


def _s5(size: Size) -> S5.Config:
    return S5.Config(size.d_model, d_state=size.d_model)


SPANS = (1, 8)
"""Inputs that HAX's queries and keys are made of, block by block in turn: one finds its like at once, where
imagination begins; eight tell a moment from all that looks like it."""


def _haxwm(size: Size) -> DynamicsConfig:
    """S5 with attention joined to the second layer of every block, which reads what followed the moments like this one.

    Queries and keys are one random map of it, so that what is alike meets without any training, and still does after.
    """
    n_hashed = 2 * (3 * size.n_keys // 8)
    hashed = Lsh(n_hashed, n_bits=size.n_bits, n_rounds=2, rule="argmax", rounds="probed")
    hax = HAX.Config(
        size.d_model,
        mixer=_s5(size),
        patterns=(hashed, KeySelection(size.n_keys - n_hashed)),
        d_key=16,
        n_heads=4,
        qk="sketch",
        follow=True,
        normalise="l2",
        scale=30.0,
        learn_scale=True,
        explore=128,
    )
    return _each_block(size, [(_s5(size), replace(hax, span=SPANS[i % len(SPANS)])) for i in range(size.n_blocks)])


def _rssm(size: Size) -> DynamicsConfig:
    """Just as wide as it takes to have S4WM's number of parameters, in steps of 8."""
    made = RSSM.Config(d_deter=8, latent=size.latent, hidden=size.hidden)

    def total(dynamics: DynamicsConfig) -> int:
        # A wider history also has wider readers: two heads and a decoder.
        return _parameters(dynamics) + 4 * size.hidden * dynamics.d_history

    widths, target = range(8, 16 * size.d_model, 8), total(PRESETS["s4wm"](size))
    at = bisect_left(widths, target, key=lambda width: total(replace(made, d_deter=width)))
    return replace(made, d_deter=widths[min(at, len(widths) - 1)], chunk=size.chunk)


PRESETS: dict[str, Callable[[Size], DynamicsConfig]] = {
    "rssm": _rssm,
    "tssm": lambda size: _blocks(size, TransformerXL.Config(size.d_model, n_heads=4, window=size.window)),
    "s4wm": lambda size: _blocks(size, *2 * (S4.Config(size.d_model, d_state=size.d_state),)),
    "s4dwm": lambda size: _blocks(size, *2 * (S4D.Config(size.d_model, d_state=size.d_state),)),
    "dsswm": lambda size: _blocks(size, *2 * (DSS.Config(size.d_model, d_state=size.d_state),)),
    "s5wm": lambda size: _blocks(size, *2 * (_s5(size),)),
    "mambawm": lambda size: _blocks(size, *2 * (Mamba.Config(size.d_model, d_state=16, expand=1),)),
    "mamba2wm": lambda size: _blocks(
        size, *2 * (Mamba2.Config(size.d_model, d_state=size.d_state, d_head=size.d_head, expand=1),)
    ),
    "deltanetwm": lambda size: _blocks(
        size, GatedDeltaNet.Config(size.d_model, n_heads=4, d_head=size.d_head, d_value=size.d_head)
    ),
    "mlstmwm": lambda size: _blocks(size, *2 * (MLSTM.Config(size.d_model, n_heads=4, expand=1),)),
    "gruwm": lambda size: _blocks(size, GRU.Config(size.d_model)),
    "attentionwm": lambda size: _blocks(size, Attention.Config(size.d_model, n_heads=4, window=None)),
    "haxwm": _haxwm,
}
"""Name -> dynamics of a size. ``tssm`` remembers ``window`` steps, ``attentionwm`` all of them."""


@cache
def _parameters(config: LayerConfig | DynamicsConfig) -> int:
    """Of a layer; of dynamics, with as many features as they have hidden units and six actions."""
    # The search for the RSSM's width builds wide ones: without memory. Layers compute with what they are built of.
    where = torch.device("meta") if isinstance(config, RSSM.Config) else nullcontext()
    with torch.random.fork_rng(devices=[]), where:
        module = config.build(config.hidden, 6) if isinstance(config, DynamicsConfig) else config.build()
    return sum(parameter.numel() for parameter in module.parameters())
