"""Which execution every operation takes on a device, and why: what ``ops.dispatch`` would answer, as a table."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from rich.table import Table

from recollect.core.errors import ConfigError
from recollect.ops import dispatch
from recollect.ops.patterns import Full, KeySelection, Lsh, Pattern, Window
from recollect.train.runtime import resolve_device

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

KERNELS: dict[str, str] = {
    "diagonal scan (S5)": "scan",
    "one scan per channel (S4D, DSS)": "siso_ssm",
    "scan of rank one (S4)": "dplr_ssm",
    "selective scan (Mamba)": "selective_scan",
    "state-space duality (Mamba-2, mLSTM)": "ssd",
    "gated delta rule": "delta_rule",
    "recurrent cells (GRU, LSTM)": "recurrent",
    "short convolution": "conv",
    "gates and gated norms": "gate",
}
"""What each operation is called in prose, and its module of kernels in ``ops/kernels`` (numba) and ``ops/gpu``."""

ATTENTION: dict[str, tuple[Pattern, ...]] = {
    "HAX attention (64 hashed, 64 selected)": (Lsh(64), KeySelection(64)),
    "window attention (128)": (Window(128),),
    "full attention by resets": (Full(),),
}

_ONE = dispatch.Asked(torch.device("cpu"), torch.float32, 1, 1, heads=1, width=1536, d_state=16, gradients=True)
LIBRARIES: dict[str, tuple[str, dispatch.Asked]] = {
    "Mamba's scan by a library": ("selective_scan", _ONE),
    "Mamba-2's dual by a library": ("ssd", _ONE._replace(heads=24, width=64, d_state=128)),
}
"""What installed libraries may carry out, at the sizes of the published 130m models, with gradients."""


class Explained(NamedTuple):
    """One row of the table."""

    what: str
    path: str
    why: str


def explain(device: str = "cpu", dtype: str = "float32", length: int = 8192) -> list[Explained]:
    """Every operation on new sequences of ``length`` positions, and the single step after them.

    Raises ConfigError for an unknown dtype or a length below 1, RecollectError for a device that is not there.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"bench: dtype '{dtype}' is unknown; give one of {', '.join(DTYPES)}")
    if length < 1:
        raise ConfigError(f"bench: length must be at least 1, got {length}")
    on = resolve_device(device)
    like = torch.empty(0, device=on, dtype=DTYPES[dtype])
    rows = [_kernel(what, name, dispatch.explain_kernels(like)) for what, name in KERNELS.items()]
    for what, (op, one) in LIBRARIES.items() if dispatch.on_gpu(on) else ():
        for reset in (False, True):
            asked = one._replace(device=on, dtype=DTYPES[dtype], length=length, reset=reset)
            name = f"{what}, with resets" if reset else what
            rows.append(Explained(name, *dispatch.explain_library(op, asked)))
    for what, patterns in ATTENTION.items():
        for n, memory in ((length, 0), (1, length)):
            choice = dispatch.explain_sparse_attention(n, memory, patterns, on, DTYPES[dtype])
            rows.append(Explained(what if n > 1 or length == 1 else f"{what}, one more token", *choice))
    causal = dispatch.explain_causal_attention(length, 0, None, resets=False, position_term=False)
    rows.append(Explained("full attention", *causal))
    return rows


def _kernel(what: str, name: str, choice: dispatch.Choice) -> Explained:
    room = {"numba": "kernels", "triton": "gpu"}.get(choice.path)
    if room is None or find_spec(f"recollect.ops.{room}.{name}"):
        return Explained(what, *choice)
    return Explained(what, "torch", f"no {choice.path} kernel for it")


def table(rows: list[Explained], title: str) -> Table:
    """The rows for ``rich.print``."""
    shown = Table("operation", "execution", "why", title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    return shown
