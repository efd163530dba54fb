"""Sequence layers: one file per mixer, all under the contract and the laws of ``recollect.core.layer``."""

from __future__ import annotations

from recollect.core.layer import SequenceLayer
from recollect.layers.attention import Attention
from recollect.layers.dss import DSS
from recollect.layers.gated_deltanet import GatedDeltaNet
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.lstm import LSTM
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.mlp import Mlp
from recollect.layers.mlstm import MLSTM
from recollect.layers.s4 import S4
from recollect.layers.s4d import S4D
from recollect.layers.s5 import S5
from recollect.layers.short_conv import ShortConv
from recollect.layers.sparse import SparseAttention
from recollect.layers.transformer_xl import TransformerXL

LAYERS: dict[str, type[SequenceLayer]] = {
    "gru": GRU,
    "lstm": LSTM,
    "attention": Attention,
    "transformer_xl": TransformerXL,
    "s4": S4,
    "s4d": S4D,
    "dss": DSS,
    "s5": S5,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "mlstm": MLSTM,
    "short_conv": ShortConv,
    "sparse": SparseAttention,
    "hax": HAX,
    "mlp": Mlp,
}
"""Every layer by the ``kind`` of its config. A line here gives a layer the laws, the bench row and the command line."""
