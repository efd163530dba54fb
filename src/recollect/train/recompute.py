"""Activation checkpointing: what a layer computes is computed again for its gradients instead of being kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerOut
from recollect.layers.sparse_options import SparseOptions


def recompute_layers(layers: Sequence[nn.Module]) -> None:
    """Make every one of ``layers`` keep only its input in training: about a third more work.

    Layers draw the same random numbers again. Names and parameters stay, and evaluation does not change. Raises
    ConfigError for layers whose forward cannot be repeated, and where there are none.
    """
    if not layers:
        raise ConfigError("--recompute works on the layers of a backbone, and this model has none; leave it out")
    for module in (module for layer in layers for module in layer.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, SparseOptions) and config.planes == "redrawn":
            raise ConfigError(
                "--recompute runs a layer twice in each step, and planes=redrawn would draw other hash planes the "
                "second time; use planes=fixed, learned or projected, or leave --recompute out"
            )
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> LayerOut:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)  # pyright: ignore[reportReturnType]
