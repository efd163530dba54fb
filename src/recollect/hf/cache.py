"""The state of one of our layers as a layer of transformers' caches."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from recollect.core.errors import ConfigError
from recollect.core.state import index_batch, leaves, map_state, nbytes
from recollect.core.types import State
from recollect.hf.configuration import CACHE_KIND


class StateLayer(CacheLayerMixin):
    """A layer's state after the positions seen so far; nothing before the first.

    ``DynamicCache(config=config)`` makes one for every layer of a ``RecollectConfig``. Its size is what the layer
    declares (``LayerConfig.state_bytes``), bounded for recurrent layers and sparse attention.
    """

    _layer_type = CACHE_KIND
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def put(self, state: State, n: int) -> None:
        """The state after ``n`` more positions."""
        self.state, self.seen, self.is_initialized = state, self.seen + n, True

    def lazy_initialization(self, *_: Any, **__: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Never: there are no keys and values here."""
        raise ConfigError("a recollect cache layer keeps a state, not keys and values; its model alone writes to it")

    update = lazy_initialization  # pyright: ignore[reportAssignmentType]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions with these queries, none of them dropped from the mask."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Positions seen."""
        return self.seen

    def get_max_length(self) -> int:
        """None: a state of bounded size takes any number of positions."""
        return -1

    get_max_cache_shape = get_max_length  # what releases before called it

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first position."""
        return -1 if self.state is None else next(leaf for _, leaf in leaves(self.state)).shape[0]

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row ``beam_idx[i]``."""
        if self.state is not None:
            where = next(leaf for _, leaf in leaves(self.state)).device
            self.state = index_batch(self.state, beam_idx.to(where))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, numbers or a mask."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.state is not None:
            self.state = map_state(lambda leaf: leaf.repeat_interleave(repeats, 0), self.state)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ConfigError: what a recurrent state has taken in cannot be taken back."""
        if tokens_to_remove:
            raise ConfigError("a recurrent state cannot be cropped; assisted and contrastive decoding need that")

    def offload(self) -> None:
        """Move to the CPU."""
        if self.state is not None:
            self.device = next(leaf for _, leaf in leaves(self.state)).device
            self.state = map_state(lambda leaf: leaf.to("cpu", non_blocking=True), self.state)

    def prefetch(self) -> None:
        """Move back to where ``offload`` took it from."""
        if self.state is not None:
            self.state = map_state(lambda leaf: leaf.to(self.device, non_blocking=True), self.state)

    device: torch.device = torch.device("cpu")


def state_bytes(cache: Cache) -> int:
    """Bytes that the states in a cache hold."""
    return sum(
        nbytes(layer.state) for layer in cache.layers if isinstance(layer, StateLayer) and layer.state is not None
    )
