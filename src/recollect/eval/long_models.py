"""What the long-context evaluation asks of a model, and how ours and those of transformers answer it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.derived import unchanging
from recollect.core.errors import RecollectError
from recollect.core.types import State
from recollect.models.language_model import LanguageModel

SEGMENT = 16_384
"""Tokens of a prompt that are read at a time where the state can be carried on: activations are those of so many."""

CHUNK = 1024
"""Positions whose logits are held at a time."""


class LongModel(Protocol):
    """A causal language model, greedy. Rows of unlike length are padded on the left, where ``real`` is false."""

    def generate(self, prompt: Tensor, n_tokens: int, real: Tensor | None = None) -> Tensor:
        """The next ``n_tokens`` (B, n_tokens) int64 after prompts (B, L)."""
        ...

    def forced(self, prompt: Tensor, answers: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) for each of ``answers`` (B, N), given the prompt and the answers before it."""
        ...

    def nll(self, tokens: Tensor, chunk: int = CHUNK) -> Tensor:
        """-log p (B, L-1) float32 of every token after the first, given those before it; ``chunk`` bounds how many
        positions' logits exist at a time.
        """
        ...


class OwnModel:
    """A ``LanguageModel``: reads in segments that carry the state on, so that memory does not grow with the text."""

    def __init__(self, model: LanguageModel, segment: int = SEGMENT) -> None:
        if segment < 1:
            raise RecollectError(f"long context: segment must be at least 1, got {segment}")
        self.model = model
        self.segment = segment
        self._read: tuple[Tensor, Tensor, State] | None = None

    @torch.no_grad()
    def generate(self, prompt: Tensor, n_tokens: int, real: Tensor | None = None) -> Tensor:
        """The next ``n_tokens`` (B, n_tokens) after prompts (B, L). Cost: the prompt once, then single steps."""
        logits, state = self._after(prompt, real)
        chosen: list[Tensor] = []
        with unchanging():
            for i in range(n_tokens):
                chosen.append(logits.argmax(-1))
                if i + 1 < n_tokens:
                    logits, state = self.model.step(chosen[-1], state)
        return torch.stack(chosen, 1).cpu()

    @torch.no_grad()
    def forced(self, prompt: Tensor, answers: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) for each of ``answers``. The prompt is read once for this and ``generate``."""
        first, state = self._after(prompt, real)
        if answers.shape[1] == 1:
            return first[:, None]
        h, _, _ = self.model.hidden(answers[:, :-1].to(first.device), state)
        return torch.cat([first[:, None], self.model.head(h)], 1)

    @torch.no_grad()
    def nll(self, tokens: Tensor, chunk: int = CHUNK) -> Tensor:
        """-log p (B, L-1) of every token after the first."""
        device = self.model.embedding.weight.device
        state, parts = None, []
        for start in range(0, tokens.shape[1] - 1, self.segment):
            end = min(start + self.segment, tokens.shape[1] - 1)
            h, state, _ = self.model.hidden(tokens[:, start:end].to(device), state)
            parts.append(_nll(self.model.head, h, tokens[:, start + 1 : end + 1].to(device), chunk))
        return torch.cat(parts, 1)

    def _after(self, prompt: Tensor, real: Tensor | None) -> tuple[Tensor, State]:
        """Logits (B, V) after the prompt, and the state; kept for another question about the very same tensor."""
        if self._read is None or self._read[0] is not prompt:
            device = self.model.embedding.weight.device
            # What stands before a reset is forgotten: padding on the left is never part of a sequence.
            reset = None if real is None or bool(real.all()) else _first(real).to(device)
            state, h = None, None
            for start in range(0, prompt.shape[1], self.segment):
                part = slice(start, start + self.segment)
                begins = None if reset is None else reset[:, part]
                h, state, _ = self.model.hidden(prompt[:, part].to(device), state, reset=begins)
            assert h is not None
            self._read = prompt, self.model.head(h[:, -1]), state
        return self._read[1:]


class TransformersModel:
    """A causal language model of transformers, by its ``generate``, ``forward`` and, for ``nll``, base model and head;
    the package is not imported here.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self._positions = "position_ids" in accepted
        self._split: bool | None = None

    @torch.no_grad()
    def generate(self, prompt: Tensor, n_tokens: int, real: Tensor | None = None) -> Tensor:
        """The next ``n_tokens`` (B, n_tokens); after its end token a row is filled up with it."""
        device = self._device
        settings = getattr(self.model, "generation_config", None)
        end = getattr(settings, "eos_token_id", None)
        end = end[0] if isinstance(end, (list, tuple)) else end
        fill = 0 if end is None else int(end)
        mask = torch.ones_like(prompt) if real is None else real.long()
        out: Tensor = self.model.generate(
            prompt.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=n_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=fill,
        )
        new = out[:, prompt.shape[1] :].cpu()
        return F.pad(new, (0, n_tokens - new.shape[1]), value=fill)

    @torch.no_grad()
    def forced(self, prompt: Tensor, answers: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) for each of ``answers``, in one pass over prompt and answers."""
        n = answers.shape[1]
        tokens = torch.cat([prompt, answers[:, :-1]], 1).to(self._device)
        more: dict[str, Any] = {"logits_to_keep": n} if self._keeps else {}
        if real is not None and not bool(real.all()):
            mask = torch.cat([real.long(), torch.ones_like(answers[:, :-1])], 1).to(self._device)
            more["attention_mask"] = mask
            if self._positions:
                more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids=tokens, use_cache=False, **more).logits[:, -n:]

    @torch.no_grad()
    def nll(self, tokens: Tensor, chunk: int = CHUNK) -> Tensor:
        """-log p (B, L-1) of every token after the first.

        From the base model's last states and the head, if these are what its logits are made of (asked once, of the
        first tokens); a model that does more to its logits makes all of them at once.
        """
        tokens = tokens.to(self._device)
        find_head = getattr(self.model, "get_output_embeddings", lambda: None)
        head = find_head()
        if self._split is None:
            few = tokens[:1, :32]
            self._split = head is not None and torch.allclose(
                head(self._states(few)).float(), self._logits(few).float(), atol=1e-3, rtol=1e-3
            )
        if head is None or not self._split:
            logits = self._logits(tokens[:, :-1])
            return _nll(lambda part: part, logits, tokens[:, 1:], chunk)
        return _nll(head, self._states(tokens[:, :-1]), tokens[:, 1:], chunk)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _states(self, tokens: Tensor) -> Tensor:
        out = self.model.base_model(input_ids=tokens, use_cache=False)
        found = getattr(out, "last_hidden_state", None)
        return out[0] if found is None else found

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def _nll(head: Callable[[Tensor], Tensor], h: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """-log p (B, L) of labels (B, L) from states (B, L, D), ``chunk`` positions of all rows together at a time."""
    rows = zip(h.flatten(0, 1).split(chunk), labels.flatten().split(chunk), strict=True)
    parts = [F.cross_entropy(head(part).float(), wanted, reduction="none") for part, wanted in rows]
    return torch.cat(parts).view(labels.shape)


def _first(real: Tensor) -> Tensor:
    """Where each row's padding ends: (B, L) bool, true at the first real position."""
    return real & ~F.pad(real, (1, -1))


def as_long_model(model: Any) -> LongModel:
    """A model by whichever way it can be asked. Raises RecollectError for what is no language model."""
    if isinstance(model, LanguageModel):
        return OwnModel(model)
    if _is_long_model(model):
        return model
    if isinstance(model, nn.Module) and hasattr(model, "generate") and hasattr(model, "base_model"):
        return TransformersModel(model)
    raise RecollectError(
        f"{type(model).__name__} is no language model that can be asked: give a recollect LanguageModel, a causal "
        "language model of transformers, or an object with generate, forced and nll"
    )


def _is_long_model(model: Any) -> TypeGuard[LongModel]:
    return all(callable(getattr(model, name, None)) for name in ("generate", "forced", "nll"))


@contextmanager
def at_rest(model: LongModel) -> Generator[None]:
    """In evaluation mode, as far as the model is a module or holds one; afterwards as it was."""
    module: Any = getattr(model, "model", model)
    training = isinstance(module, nn.Module) and module.training
    if training:
        module.eval()
    try:
        yield
    finally:
        if training:
            module.train()
