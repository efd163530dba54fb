"""A next-token model on any backbone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config as BaseConfig
from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.types import Aux, State
from recollect.models.backbone import Backbone
from recollect.models.chunked_loss import masked_cross_entropy


class LanguageModel(nn.Module):
    """Token embedding, backbone, and an output head tied to the embedding: logits = h E^T.

    ``loss`` reads only the positions where ``mask`` is true and makes logits for no others, and for long texts never
    for all of them at once.
    """

    @dataclass(frozen=True)
    class Config(BaseConfig, kind="language-model"):
        """``embedding_std`` is the scale of the tied embedding at initialisation; ``aux_weight`` that of
        layers' own losses.
        """

        vocab_size: int
        backbone: Backbone.Config
        embedding_std: float = 0.1
        aux_weight: float = 0.1

        def __post_init__(self) -> None:
            if self.vocab_size < 2:
                raise ConfigError(f"language-model: vocab_size must be at least 2, got {self.vocab_size}")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.backbone.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.backbone = Backbone(config.backbone)

    def hidden(
        self, tokens: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, State, Aux]:
        """Last hidden states (B, L, D) of tokens (B, L) int64, the state to go on from, and the layers' losses."""
        return self.backbone(self.embedding(tokens), state, reset=reset)

    def forward(
        self, tokens: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, L, V) for the token after each position, and the state to go on from."""
        h, state, _ = self.hidden(tokens, state, reset=reset)
        return self.head(h), state

    def step(self, token: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits (B, V) after one more token (B,)."""
        h, state = self.backbone.step(self.embedding(token), state, reset=reset)
        return self.head(h), state

    def head(self, h: Tensor) -> Tensor:
        """h E^T."""
        return F.linear(h, self.embedding.weight)

    def loss(
        self, tokens: Tensor, labels: Tensor, mask: Tensor, reset: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over masked positions plus ``aux_weight`` times the layers' losses; and its
        parts, detached. ``reset`` (B, L) is true where a packed row begins another sample.
        """
        h, _, aux = self.hidden(tokens, reset=reset)
        cross_entropy, accuracy = masked_cross_entropy(h, self.embedding.weight, labels, mask)
        total = cross_entropy
        for value in aux.values():
            total = total + self.config.aux_weight * value
        metrics = {"cross_entropy": cross_entropy, "accuracy": accuracy, **aux}
        return total, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, n: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Append ``n`` tokens to the prompt (B, L): the prompt in parallel, then one step each. Temperature 0
        is greedy.
        """
        state = self.backbone.init_state(tokens.shape[0], device=tokens.device)
        logits, state = self(tokens, state)
        logits = logits[:, -1]
        with unchanging():
            for _ in range(n):
                if temperature > 0:
                    probabilities = torch.softmax(logits / temperature, -1)
                    chosen = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                else:
                    chosen = logits.argmax(-1)
                tokens = torch.cat([tokens, chosen[:, None]], 1)
                logits, state = self.step(chosen, state)
        return tokens
