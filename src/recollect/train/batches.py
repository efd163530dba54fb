"""Batches as the loop sees them: any tree of dataclasses, mappings, tuples and arrays. To name, save and move one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor


def tensors_of(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and numpy array of a batch with its dotted name, in a fixed order; the rest is passed over."""
    if isinstance(batch, Tensor):
        yield name or "batch", batch.detach().cpu().contiguous()
    elif isinstance(batch, np.ndarray):
        yield name or "batch", torch.from_numpy(np.ascontiguousarray(batch))
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_of(getattr(batch, field.name), _join(name, field.name))
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_of(value, _join(name, str(key)))
    elif isinstance(batch, (tuple, list)):
        keys = getattr(batch, "_fields", range(len(batch)))
        for key, value in zip(keys, batch, strict=True):
            yield from tensors_of(value, _join(name, str(key)))


def map_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree with ``change`` applied to everything that is no dataclass, mapping, tuple or list."""
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: map_leaves(getattr(batch, f.name), change) for f in fields(batch) if f.init})
    if isinstance(batch, Mapping):
        return {key: map_leaves(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        items = [map_leaves(value, change) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return change(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch made on the CPU, its tensors contiguous and on ``device``. Copies to a GPU do not make the host wait."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.contiguous()
        return leaf if device.type == "cpu" else leaf.pin_memory().to(device, non_blocking=True)

    return map_leaves(batch, move)


def digest(batch: Any) -> str:
    """Twelve hex digits of the SHA-256 of a batch: names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for name, tensor in tensors_of(batch):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def to_safetensors(batch: Any) -> bytes:
    """A batch as the bytes of a safetensors file."""
    return save({name: tensor.clone() for name, tensor in tensors_of(batch)})


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
