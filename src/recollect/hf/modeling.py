"""A causal language model on our layers in the form that transformers gives its own."""

# transformers declares what subclasses are to set as variables of instances, and its signatures are wider than ours.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig, LayerOut, SequenceLayer
from recollect.core.types import Aux, State
from recollect.hf.cache import StateLayer
from recollect.hf.configuration import RecollectConfig
from recollect.models.chunked_loss import masked_cross_entropy

SHIM = '''"""What trust_remote_code loads this checkpoint through; recollect must be installed."""

from recollect.hf import RecollectConfig, RecollectForCausalLM, RecollectModel

__all__ = ["RecollectConfig", "RecollectForCausalLM", "RecollectModel"]
'''

AUTO_MAP = {
    "AutoConfig": "modeling_recollect.RecollectConfig",
    "AutoModel": "modeling_recollect.RecollectModel",
    "AutoModelForCausalLM": "modeling_recollect.RecollectForCausalLM",
}


KEPT_IN_FP32 = ("A_log", "dt_bias", "dt_proj.bias")
"""Parameters of decays and step sizes, which span decades: float32 whatever the model is loaded in."""


@dataclass
class RecollectOutput(BaseModelOutputWithPast):
    """``aux``: the layers' own losses by name, summed over layers; empty in evaluation."""

    aux: dict[str, Tensor] | None = None


@dataclass
class RecollectCausalLMOutput(CausalLMOutputWithPast):
    """``aux``: as in ``RecollectOutput``; weighted, they are part of ``loss``."""

    aux: dict[str, Tensor] | None = None


class RecollectBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), for a mixer that is any sequence layer."""

    def __init__(self, config: RecollectConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(layer.d_model, eps=config.layer_norm_epsilon)
        self.mixer: SequenceLayer = layer.build()
        self.in_fp32 = config.residual_in_fp32
        part: Any
        for path, part in self.mixer.named_modules():
            own: list[Tensor] = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            if any(tensor.is_meta for tensor in own):
                # Loading a checkpoint: transformers asks module by module for first values of what the file lacks.
                part.first_values = partial(_first_values, layer, path)
            else:
                part._is_hf_initialized = True

    def forward(self, x: Tensor, state: State | None, reset: Tensor | None, single: bool) -> tuple[Any, ...]:
        """x (B, L, D), ``reset`` (B, L); ``single``: L is 1 and ``state`` given, so it is one step.

        Gives x, the state, the names of the layer's own losses and after them each loss on its own: reentrant
        recomputation passes gradients to the tensors of this tuple alone, not to what a mapping in it holds.
        """
        h = self.norm(x.to(self.norm.weight.dtype))
        if single:
            y, after = self.mixer.step(h[:, 0], state, reset=None if reset is None else reset[:, 0])
            out = LayerOut(y[:, None], after, {})
        else:
            out = self.mixer(h, state, reset=reset)
        return (x.float() if self.in_fp32 else x) + out.y, out.state, tuple(out.aux), *out.aux.values()


def _first_values(layer: LayerConfig, path: str) -> dict[str, Tensor]:
    """What the part called ``path`` of such a layer holds itself when the layer is new."""
    with torch.device("cpu"):
        part = layer.build().get_submodule(path)
    return {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers(recurse=False))}


class RecollectPreTrainedModel(PreTrainedModel):
    """How these models are loaded, saved and begun."""

    config: RecollectConfig
    config_class = RecollectConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["RecollectBlock"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """First values of what no checkpoint gave. A layer draws its own, so a new one is made and read."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        if (first_values := getattr(module, "first_values", None)) is not None:
            for name, tensor in first_values().items():
                init.copy_(getattr(module, name), tensor)

    def _set_gradient_checkpointing(self, enable: bool = True, *more: Any, **options: Any) -> None:
        if enable:
            refuse_redrawn(self.config.layer_configs(), "gradient checkpointing")
        super()._set_gradient_checkpointing(enable, *more, **options)

    def save_pretrained(self, save_directory: str | Path, **more: Any) -> None:
        """As every transformers model, with a module beside that ``trust_remote_code`` loads the classes through."""
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, **more)
        (Path(save_directory) / "modeling_recollect.py").write_text(SHIM)


class RecollectModel(RecollectPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: RecollectConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RecollectBlock(config, layer) for layer in config.layer_configs())
        self.norm_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        # Those that these layers have; a model with this one inside takes them over.
        self._keep_in_fp32_modules_strict = {
            kept for kept in KEPT_IN_FP32 if any(f".{name}".endswith(f".{kept}") for name, _ in self.named_parameters())
        }
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        reset: Tensor | None = None,
        **_: Any,
    ) -> RecollectOutput | tuple[Any, ...]:
        """Last hidden states of ``input_ids`` (B, L).

        Rows padded on the left are told by ``attention_mask`` (B, L, or past and L): the state begins anew at the first
        true position. Packed documents by ``reset`` (B, L), true where one begins, or by ``position_ids`` that fall
        back to 0. On the right, padding is read like any token, and ignored by whoever ignores its outputs.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        defaults = self.config
        use_cache = use_cache if use_cache is not None else (defaults.use_cache and not self.training)
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        wanted = output_hidden_states if output_hidden_states is not None else defaults.output_hidden_states
        reset = beginnings(x.shape[1], attention_mask, position_ids, reset)
        single = x.shape[1] == 1 and not self.training
        seen: list[Tensor] = []
        aux: Aux = {}
        slots = [None] * len(self.layers) if past_key_values is None else self._slots(past_key_values)
        for block, slot in zip(self.layers, slots, strict=True):
            if wanted:
                seen.append(x)
            state = None if slot is None else slot.state
            x, state, names, *losses = block(x, state, reset, single and state is not None)
            if use_cache and slot is not None:
                slot.put(state, x.shape[1])
            for name, value in zip(names, losses, strict=True):
                aux[name] = aux[name] + value if name in aux else value
        x = self.norm_f(x.to(self.norm_f.weight.dtype))
        out = RecollectOutput(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*seen, x) if wanted else None,
            aux=aux or None,
        )
        as_tuple = return_dict is False or (return_dict is None and defaults.return_dict is False)
        return out.to_tuple() if as_tuple else out

    def _slots(self, cache: Cache) -> list[StateLayer]:
        """A state for every layer. A cache that was made without the config, or by a release of transformers that asks
        no registry which layers it wants, is given them while it is empty.
        """
        if isinstance(cache, DynamicCache) and not cache.get_seq_length():
            layers: list[Any] = [slot if isinstance(slot, StateLayer) else StateLayer() for slot in cache.layers]
            cache.layers = layers + [StateLayer() for _ in range(len(layers), len(self.layers))]
        slots = [slot for slot in cache.layers if isinstance(slot, StateLayer)]
        if len(slots) != len(self.layers) or len(slots) != len(cache.layers):
            raise ConfigError("past_key_values must be a DynamicCache of this model, or an empty one")
        return slots


class RecollectForCausalLM(RecollectPreTrainedModel, GenerationMixin):
    """``RecollectModel`` and an output head, tied to the embedding unless the config says otherwise."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: RecollectConfig) -> None:
        super().__init__(config)
        self.backbone = RecollectModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embeddings = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            init.normal_(self.lm_head.weight, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        reset: Tensor | None = None,
        **more: Any,
    ) -> RecollectCausalLMOutput | tuple[Any, ...]:
        """Logits (B, L, V); with ``labels`` (B, L; -100 is ignored, shifted here) also the loss, the layers' own
        losses included. ``loss`` is the way for long sequences: it makes no logits.
        """
        found = self.backbone(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            reset=reset,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = found.last_hidden_state[:, kept]
        logits = self.lm_head(h.to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            of_tokens: Any = self.loss_function
            loss = self._with_aux(of_tokens(logits, labels, vocab_size=self.config.vocab_size, **more), found.aux or {})
        out = RecollectCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            aux=found.aux,
        )
        as_tuple = return_dict is False or (return_dict is None and self.config.return_dict is False)
        return out.to_tuple() if as_tuple else out

    def loss(
        self, tokens: Tensor, labels: Tensor, mask: Tensor, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``LanguageModel.loss``: mean cross-entropy of ``labels`` (B, L; not shifted) over masked positions plus
        the layers' own losses, and its parts, detached. The logits of long rows never exist all at once.
        """
        found = self.backbone(tokens, use_cache=False, return_dict=True, reset=reset)
        h = found.last_hidden_state.to(self.lm_head.weight.dtype)
        cross_entropy, accuracy = masked_cross_entropy(h, self.lm_head.weight, labels, mask)
        aux = found.aux or {}
        metrics = {"cross_entropy": cross_entropy, "accuracy": accuracy, **aux}
        return self._with_aux(cross_entropy, aux), {name: value.detach() for name, value in metrics.items()}

    def _with_aux(self, loss: Tensor, aux: Mapping[str, Tensor]) -> Tensor:
        for value in aux.values():
            loss = loss + self.config.aux_loss_weight * value
        return loss

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; layers derive their systems once, as no parameter changes meanwhile."""
        generate: Any = super().generate  # pyright: ignore[reportAttributeAccessIssue] its protocol for self is too narrow
        with unchanging():
            return generate(*args, **kwargs)


def beginnings(
    length: int, attention_mask: Tensor | None, position_ids: Tensor | None, reset: Tensor | None
) -> Tensor | None:
    """Where among the last ``length`` positions a sequence begins, (B, L) bool; None where none does after the first.

    From whichever is given: ``reset`` itself, else ``position_ids`` at 0, and where ``attention_mask`` becomes true.
    """
    if reset is not None:
        return reset
    begins = None
    if position_ids is not None and position_ids.shape[-1] == length and length > 1:
        begins = position_ids == 0
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ConfigError(f"attention_mask must be (rows, positions), got {tuple(attention_mask.shape)}")
        real = attention_mask.bool()
        after_padding = (real & ~F.pad(real, (1, -1)))[:, -length:]
        begins = after_padding if begins is None else begins | after_padding
    # At the very first position there is nothing to forget, and most layers are quicker without resets.
    if begins is None or not begins[:, 1 if attention_mask is None or attention_mask.shape[1] == length else 0 :].any():
        return None
    return begins


def refuse_redrawn(layers: tuple[LayerConfig, ...], what: str) -> None:
    """ConfigError where a layer draws hash planes at every training forward, which ``what`` would draw twice."""
    for i, layer in enumerate(layers):
        if getattr(layer, "planes", None) == "redrawn":
            raise ConfigError(
                f"{what} recomputes a forward, and planes=redrawn of layers.{i} would draw others; use fixed"
            )
