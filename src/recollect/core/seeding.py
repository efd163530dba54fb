"""One seed, many named streams that never touch each other.

A stream is addressed by its name and any indices: ``Streams(7).torch("data", "train", 120)`` is the generator of the
121st training batch. Nothing is consumed in order, so a resumed run needs no saved generator, and changing how one
stream is used cannot move another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recollect.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch

STREAMS = ("init", "data", "env", "sample", "eval")


@dataclass(frozen=True)
class Streams:
    """Named random streams under one seed. ``Streams(seed).torch(name, *indices)`` and ``.numpy(...)``."""

    seed: int

    def number(self, name: str, *indices: int | str) -> int:
        """The 63-bit seed of one stream: a BLAKE2b digest of (seed, name, indices)."""
        if name not in STREAMS:
            raise ConfigError(f"unknown random stream '{name}'{nearest(name, STREAMS)}")
        text = "/".join([str(self.seed), name, *(f"{type(i).__name__}:{i}" for i in indices)])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def numpy(self, name: str, *indices: int | str) -> np.random.Generator:
        """A fresh numpy generator for one stream."""
        import numpy as np

        return np.random.Generator(np.random.PCG64(self.number(name, *indices)))

    def torch(self, name: str, *indices: int | str, device: str = "cpu") -> torch.Generator:
        """A fresh torch generator for one stream."""
        import torch

        return torch.Generator(device=device).manual_seed(self.number(name, *indices))
