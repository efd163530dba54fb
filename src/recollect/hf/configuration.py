"""The config of a language model on our layers, in the form of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from recollect.core.config import from_dict, to_dict
from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.layers import LAYERS
from recollect.layers.mamba2 import Mamba2

CACHE_KIND = "recollect"
"""What transformers' caches call the state of one of our layers."""


@strict
class RecollectConfig(PreTrainedConfig):
    """Embedding, a residual stack of ``layers`` after norms, a last norm and an output head.

    ``layers``
        The config of every sequence layer in order, as JSON (``recollect.core.config.to_dict``); None stands for 24
        layers of Mamba-2 at width 768, the shape of mamba2-130m. ``of`` takes them as they are.
    ``layer_norm_epsilon``
        Of the norms before the layers and of the last one; the layers have norms of their own.
    ``residual_in_fp32``
        The residual stream is kept in float32 whatever the weights are in, as the public Mamba models do.
    ``initializer_range``
        Standard deviation of the embedding at first; layers start as they do everywhere in this library.
    ``aux_loss_weight``
        Of the layers' own losses, such as the ranking loss of key selection, in ``loss``.
    """

    model_type = CACHE_KIND
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux"]

    vocab_size: int = 50288
    layers: list[Any] | None = None
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    initializer_range: float = 0.02
    aux_loss_weight: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layers is None:
            self.layers = [to_dict(Mamba2.Config(768, d_state=128))] * 24
        # Both follow from the layers; transformers writes and reads them with everything else.
        for derived in ("hidden_size", "num_hidden_layers"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)
        self.layer_configs()

    @classmethod
    def of(cls, layers: Sequence[LayerConfig], vocab_size: int, **more: Any) -> RecollectConfig:
        """The config of a model with these layers."""
        return cls(vocab_size=vocab_size, layers=[to_dict(layer) for layer in layers], **more)

    def layer_configs(self) -> tuple[LayerConfig, ...]:
        """The layers' configs. ConfigError where there is none, one cannot be read, or widths differ."""
        if not self.layers:
            raise ConfigError("config.layers is empty; give at least one layer config")
        assert LAYERS, "what a config names has been imported"
        found = tuple(from_dict(LayerConfig, layer, f"config.layers.{i}") for i, layer in enumerate(self.layers))
        widths = {layer.d_model for layer in found}
        if len(widths) > 1:
            raise ConfigError(f"config.layers have different d_model: {sorted(widths)}; all must be equal")
        return found

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, ``d_model``."""
        assert self.layers
        return self.layers[0]["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the stack."""
        return len(self.layers or ())

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a cache: a state of ours."""
        return [CACHE_KIND] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Nothing: the list of types that transformers knows does not have ours."""
