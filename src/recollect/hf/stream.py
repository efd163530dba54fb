"""Text written token by token, with what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.core.steps import Steps
from recollect.core.types import State
from recollect.hf.cache import StateLayer
from recollect.hf.modeling import RecollectForCausalLM
from recollect.text.tokenizer import TextTokenizer

PIECE = 2048
"""Tokens of the prompt that are read at once: memory does not grow with its length."""


class Stream:
    """The pieces of text that a model writes after a prompt; iterate once. ``summary`` is one line on time and state.

    Temperature 0 takes the likeliest token, else one is drawn from the likeliest that together have ``top_p``. Ends at
    the tokenizer's end token or after ``n``. A piece appears as soon as its bytes are whole characters.
    """

    def __init__(
        self,
        model: RecollectForCausalLM,
        tokenizer: TextTokenizer,
        prompt: str,
        n: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        if n < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ConfigError(f"cannot write {n} tokens at temperature {temperature} and top_p {top_p}")
        self.model, self.tokenizer, self.n = model.eval(), tokenizer, n
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.prompt = tokenizer.encode(prompt)
        if not self.prompt:
            raise ConfigError("the prompt has no tokens; give some text to go on from")
        self.summary = ""

    @torch.no_grad()
    def __iter__(self) -> Iterator[str]:
        with unchanging():
            yield from self._pieces()

    def _pieces(self) -> Iterator[str]:
        started = time.perf_counter()
        tokens = torch.tensor([self.prompt], device=self.model.device)
        cache, logits = DynamicCache(config=self.model.config), tokens.new_zeros(0)
        for piece in tokens.split(PIECE, 1):
            out = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1]
        read_s, started = time.perf_counter() - started, time.perf_counter()
        steps = Steps(partial(self._step, cache), tuple(layer.state for layer in _layers(cache)))
        written: list[int] = []
        shown = ""
        while len(written) < self.n and (chosen := self._choose(logits)) != self.tokenizer.eos_id:
            written.append(chosen)
            text = self.tokenizer.decode(written)
            # A character may be spread over several tokens: until they are there it decodes to a replacement.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
            logits = steps(tokens.new_tensor([[chosen]]))
        if rest := self.tokenizer.decode(written)[len(shown) :]:
            yield rest
        wrote_s = time.perf_counter() - started
        self.summary = (
            f"{len(self.prompt):,} tokens read in {read_s:.2f} s, {len(written):,} written at "
            f"{len(written) / max(wrote_s, 1e-9):.1f} a second; the state has {nbytes(steps.state):,} bytes"
        )

    def _step(self, cache: DynamicCache, state: State, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, State]:
        """Logits (1, V) after one more token (1, 1), and the states of all layers."""
        layers = _layers(cache)
        for layer, part in zip(layers, state, strict=True):
            layer.state = part
        out = self.model(inputs[0], past_key_values=cache, use_cache=True)
        return out.logits[:, -1], tuple(layer.state for layer in layers)

    def _choose(self, logits: Tensor) -> int:
        if self.temperature == 0:
            return int(logits[0].argmax())
        p, order = torch.softmax(logits[0].float() / self.temperature, -1).sort(descending=True)
        # The first one stays whatever its share.
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0)
        return int(order[torch.multinomial(p, 1, generator=self.generator)])


def _layers(cache: DynamicCache) -> list[StateLayer]:
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]
