"""What a user could take instead of a layer of ours: public implementations, at the same widths.

A peer is a module from (B, L, D) to (B, L, D), built for a width, and the row of ours that it stands beside. To add
one, write its builder and its line in ``PEERS``. Libraries beyond torch are imported by the builder alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.layer import LayerConfig
from recollect.eval.bench.rows import config_of
from recollect.layers import LAYERS

Decoder = tuple[Callable[[], object], int]
"""A function that runs one more position, and the bytes of the state it starts from."""


@dataclass(frozen=True)
class Peer:
    """One alternative."""

    row: str
    """The row of ours that it is compared with."""
    note: str
    """What the comparison must say for itself."""
    build: Callable[[int], nn.Module]
    package: str = ""
    """What must be importable, besides torch."""
    modules: tuple[str, ...] = ()
    """What building imports: imported once for all cases."""
    family: str = ""
    """Peers of one family differ in a setting only; the best at each size speaks for them."""

    @property
    def refusal(self) -> str:
        """Why it cannot be measured here; empty when it can."""
        there = not self.package or find_spec(self.package) is not None
        return "" if there else f"{self.package} is not installed: pip install 'recollect[peers]'"


class Recurrent(nn.Module):
    """A recurrent network of torch, bare."""

    def __init__(self, core: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[0]

    def decoder(self, x: Tensor) -> Decoder:
        """One position after ``x``."""
        _, state = self.core(x)
        parts = state if isinstance(state, tuple) else (state,)
        return lambda: self.core(x[:, -1:], state), sum(part.nbytes for part in parts)


class FullAttention(nn.Module):
    """Projections around ``F.scaled_dot_product_attention``, causal, without positions."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.to_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.to_qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))

    def decoder(self, x: Tensor) -> Decoder:
        """One query against the keys of ``x`` and its own."""
        _, keys, values = self._heads(x)

        def step() -> Tensor:
            q, k, v = self._heads(x[:, -1:])
            y = F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))
            return self.out(y.transpose(1, 2).flatten(-2))

        return step, keys.nbytes + values.nbytes


class HuggingFace(nn.Module):
    """A mixer of transformers, in evaluation and training on its plain PyTorch path."""

    def __init__(self, mixer: nn.Module, config: Any) -> None:
        super().__init__()
        self.mixer, self.config = mixer, config

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)

    def decoder(self, x: Tensor) -> Decoder:
        """One position after ``x``, whose state is in transformers' own cache."""
        from transformers.cache_utils import DynamicCache

        cache: Any = DynamicCache(config=self.config)
        self.mixer(x, cache_params=cache)
        parts = [getattr(cache.layers[0], name) for name in ("conv_states", "recurrent_states")]
        held = [leaf for part in parts for leaf in (part.values() if isinstance(part, dict) else (part,))]
        return lambda: self.mixer(x[:, -1:], cache_params=cache), sum(leaf.nbytes for leaf in held)


class FourierS4D(nn.Module):
    """S4D (arXiv 2206.11893) as one convolution by FFT: K_l = 2 Re sum_n C_n (e^{dt A_n} - 1) / A_n e^{l dt A_n}.

    Then y = K * x + D x, GELU and a gated linear unit. A is S4D-Lin; the kernel is a D x N x L array.
    """

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.rand(d_model) * math.log(100.0) + math.log(1e-3))
        self.log_A_real = nn.Parameter(torch.full((d_model, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        A_DN = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        step_DN = A_DN * torch.exp(self.log_dt).unsqueeze(-1)
        C_DN = torch.view_as_complex(self.C) * (torch.exp(step_DN) - 1) / A_DN
        powers_DNL = torch.exp(step_DN.unsqueeze(-1) * torch.arange(length, device=x.device))
        K_DL = 2 * torch.einsum("dn,dnl->dl", C_DN, powers_DNL).real
        u_BDL = x.transpose(1, 2)
        spectrum = torch.fft.rfft(u_BDL, n=2 * length) * torch.fft.rfft(K_DL, n=2 * length)
        y_BDL = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + self.D.unsqueeze(-1) * u_BDL
        return F.glu(self.out(F.gelu(y_BDL.transpose(1, 2))), -1)


class GatedS5(nn.Module):
    """The layer of s5-pytorch, then GELU and a gated linear unit as ours has them."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        from s5 import S5

        self.core = S5(d_model, d_state)
        self.out = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(self.core(x))), -1)


def _sized(row: str, name: str, otherwise: int, d_model: int) -> int:
    """A size from our own config of the row, so that both are as wide; ``otherwise`` where it has no such field."""
    config: LayerConfig | None = config_of(row, d_model) if row in LAYERS or row == "attention-full" else None
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise


def _gru(d_model: int) -> nn.Module:
    return Recurrent(nn.GRU(d_model, d_model, batch_first=True))


def _lstm(d_model: int) -> nn.Module:
    return Recurrent(nn.LSTM(d_model, d_model, batch_first=True))


def _full_attention(d_model: int) -> nn.Module:
    return FullAttention(d_model, _sized("attention-full", "n_heads", 4, d_model))


def _mamba(d_model: int) -> nn.Module:
    from transformers.models.mamba import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=d_model,
        state_size=_sized("mamba", "d_state", 16, d_model),
        conv_kernel=_sized("mamba", "d_conv", 4, d_model),
        expand=_sized("mamba", "expand", 2, d_model),
        num_hidden_layers=1,
    )
    return HuggingFace(MambaMixer(config, layer_idx=0), config)


def _mamba2(chunk: int | None) -> Callable[[int], nn.Module]:
    def build(d_model: int) -> nn.Module:
        from transformers.models.mamba2 import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        d_head, expand = _sized("mamba2", "d_head", 64, d_model), _sized("mamba2", "expand", 2, d_model)
        chosen: dict[str, Any] = {} if chunk is None else {"chunk_size": chunk}
        config = Mamba2Config(
            hidden_size=d_model,
            state_size=_sized("mamba2", "d_state", 64, d_model),
            conv_kernel=_sized("mamba2", "d_conv", 4, d_model),
            n_groups=_sized("mamba2", "n_groups", 1, d_model),
            expand=expand,
            head_dim=d_head,
            num_heads=expand * d_model // d_head,
            num_hidden_layers=1,
            **chosen,
        )
        return HuggingFace(Mamba2Mixer(config, layer_idx=0), config)

    return build


def _s5(d_model: int) -> nn.Module:
    return GatedS5(d_model, _sized("s5", "d_state", 64, d_model))


def _s4d(d_model: int) -> nn.Module:
    return FourierS4D(d_model, _sized("s4d", "d_state", 64, d_model))


HF = "transformers"
HF_MAMBA, HF_MAMBA2 = "transformers.models.mamba.modeling_mamba", "transformers.models.mamba2.modeling_mamba2"
CHUNK_NOTE = "same widths; the fastest of chunks 32, 64 and 128 at each length"
BEST = "transformers Mamba2, best chunk"

PEERS: dict[str, Peer] = {
    "torch GRU": Peer("gru", "bare: ours has an output projection besides", _gru),
    "torch LSTM": Peer("lstm", "bare: ours has an output projection besides", _lstm),
    "torch SDPA": Peer("attention-full", "same projections; ours has rotary positions", _full_attention),
    "transformers Mamba": Peer("mamba", "same widths, its CPU path", _mamba, HF, (HF_MAMBA,)),
    "transformers Mamba2": Peer("mamba2", "same widths, its default chunk of 256", _mamba2(None), HF, (HF_MAMBA2,)),
    "transformers Mamba2, chunk 32": Peer("mamba2", CHUNK_NOTE, _mamba2(32), HF, (HF_MAMBA2,), BEST),
    "transformers Mamba2, chunk 64": Peer("mamba2", CHUNK_NOTE, _mamba2(64), HF, (HF_MAMBA2,), BEST),
    "transformers Mamba2, chunk 128": Peer("mamba2", CHUNK_NOTE, _mamba2(128), HF, (HF_MAMBA2,), BEST),
    "s5-pytorch S5": Peer("s5", "its layer, then GELU and a gated linear unit as ours", _s5, "s5", ("s5",)),
    "FFT S4D": Peer("s4d", "a convolution by FFT written in plain PyTorch, kernel and all", _s4d),
}
"""Every peer by the name of its row."""


def peers_of(rows: Mapping[str, object] | list[str]) -> dict[str, Peer]:
    """The peers of the chosen rows, in the order of those."""
    return {label: peer for row in rows for label, peer in PEERS.items() if peer.row == row}
