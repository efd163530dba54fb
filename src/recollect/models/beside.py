"""Sparse attention put beside the layers of a model that was trained without it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recollect.core.config import Config
from recollect.core.errors import ConfigError
from recollect.core.layer import BranchedConfig
from recollect.layers.hax import HAX
from recollect.layers.sparse_options import Planes
from recollect.ops.patterns import KeySelection, Lsh, find, published_pattern

PATTERNS = ("D", "SW", "SW+D", "A", "LSH", "KS", "HAX")
"""The rows of the paper's tables."""


@dataclass(frozen=True)
class Beside(Config, kind="beside"):
    """Which attention: ``pattern`` as the paper names its rows (or "full"), ``n_keys`` per query.

    ``gate`` 0 leaves the model's outputs as they are until training moves it. ``planes`` are the paper's, drawn anew at
    every training step, unless activations are to be recomputed: then "fixed". "recommended" as the pattern is
    ``HAX.Config.recommended`` with that gate, and reads nothing else.
    """

    n_keys: int = 128
    pattern: str = "HAX"
    gate: float = 0.0
    planes: Planes = "redrawn"
    dual: bool = False
    """Attention is made from the mixer's own parts: queries and keys from C and B after their convolution, as unit
    vectors, ten times their product at first; values are what the mixer writes, dt u. So it begins as the mixer itself
    without decay and interference, and one layer of three ranks the right key first before any training. False is the
    paper's: values u, queries and keys from u, begun from the projections of C and B. In Mamba-2 that is an
    approximation. In pilots it was not learned in some hundred steps where True was; in ``language-micro`` it finds as
    much in the middle of a text and less at its beginning (``docs/log.md``).
    """

    follow: int = 0
    """Attention reads what followed moments like the present one: keys of the position before, both made from the last
    ``follow`` inner activations by one map, as unit vectors, thirty times their product at first; values are dt u. An
    induction head from the start. 0: no. Beside a trained Mamba-2 this recalls by content, where ``dual`` and the
    paper's form did not within as many steps (``docs/log.md``).
    """

    def __post_init__(self) -> None:
        if self.follow < 0 or (self.follow and self.dual):
            raise ConfigError(
                f"beside: follow must not be negative nor go with dual, which makes queries and keys, got {self.follow}"
            )

    def around(self, mixer: BranchedConfig) -> HAX.Config:
        """The layer: the paper's language setting (arXiv 2507.00449, section 5.2 and appendix D.2), this pattern."""
        if self.pattern == "recommended":
            return self._made(HAX.Config.recommended(mixer.d_model, mixer, gate_init=self.gate), mixer)
        base = self._made(HAX.Config.published_language(mixer.d_model, mixer, self.n_keys), mixer)
        hashed = find(base.patterns, Lsh)
        assert hashed is not None
        if self.follow:
            # Of 5,000 tokens the two nearest of 256 buckets hold the key that is asked for more often than one of 128.
            hashed = replace(hashed, n_bits=8, n_rounds=2, rounds="probed")
        patterns = tuple(
            replace(hashed, n_keys=pattern.n_keys) if isinstance(pattern, Lsh) else pattern
            for pattern in published_pattern(self.pattern, self.n_keys)
        )
        return replace(
            base,
            patterns=patterns,
            gate_init=self.gate,
            planes=self.planes if find(patterns, Lsh) else "fixed",
            selection_target=base.selection_target if find(patterns, KeySelection) else "mean",
        )

    def _made(self, layer: HAX.Config, mixer: BranchedConfig) -> HAX.Config:
        """With queries, keys and values made as this says."""
        if self.follow:
            shared = replace(layer, qk="shared", span=self.follow, follow=True, written=True)
            return replace(shared, normalise="l2", learn_scale=True, scale=30.0)
        if not self.dual:
            return layer
        groups = getattr(mixer, "n_groups", 1)
        return replace(
            layer, qk="dual", n_heads=groups, d_key=mixer.dual // groups, normalise="l2", learn_scale=True, scale=None
        )
