"""Episodes on disk: collection, storage, windows. How time is aligned is written in ``recollect.data.windows``."""

from __future__ import annotations

from recollect.data.collection import collect
from recollect.data.store import EpisodeStore
from recollect.data.windows import Windows, observations

__all__ = ["EpisodeStore", "Windows", "collect", "observations"]
