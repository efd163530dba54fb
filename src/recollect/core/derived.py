"""Values that follow from a module's parameters, kept while those stay."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """What a step by step run would compute anew at every step: a discretised system, say.

    Kept only where no gradient is recorded, and for as long as the module's own parameters (not its children's) are the
    same tensors with the same values, in-place changes included. Copies and pickles of a module begin without it.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._seen: list[tuple[Tensor, int]] = []
        self._value: Value | None = None

    def of(self, module: nn.Module, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()``, or what it returned last time. ``key`` is all it depends on besides the parameters."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        # A view holds on to its memory, so that no other tensor can come to lie at the same address meanwhile.
        now = [(p.detach(), p._version) for p in module.parameters(recurse=False)]
        if self._value is None or self._key != key or not _same(self._seen, now):
            self._key, self._seen, self._value = key, now, make()
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[Value]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[Any]], tuple[()]]:
        return Derived, ()


def _same(before: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]]) -> bool:
    return len(before) == len(now) and all(
        was.data_ptr() == tensor.data_ptr() and changes == version and was.dtype == tensor.dtype
        for (was, changes), (tensor, version) in zip(before, now, strict=True)
    )
