"""Values that follow from parameters, made once where the parameters are known to stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")

_scope: ContextVar[object | None] = ContextVar("unchanging", default=None)


@contextmanager
def unchanging() -> Generator[None]:
    """Promise that no parameter changes inside, so that layers step without deriving their systems anew each time.

    ``WorldModel.imagine`` promises it for its loop; put it around loops of ``step`` of your own. It has to be said:
    nothing about a parameter tells that a fused optimizer has written to it.
    """
    if _scope.get() is not None:
        yield
        return
    token = _scope.set(object())
    try:
        yield
    finally:
        _scope.reset(token)


class Derived(Generic[Value]):
    """What a layer would compute anew at every step: a discretised system, say.

    Kept only inside ``unchanging()`` and where no gradient is recorded. Copies and pickles begin without it.
    """

    def __init__(self) -> None:
        self._scope: object | None = None
        self._key: Hashable = None
        self._value: Value | None = None

    def of(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """``make()``, or what it returned before. ``key`` is all it depends on besides parameters."""
        scope = _scope.get()
        if scope is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if self._value is None or self._scope is not scope or self._key != key:
            self._scope, self._key, self._value = scope, key, make()
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[Value]:
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[Any]], tuple[()]]:
        return Derived, ()
