"""A state moved on step by step; on a GPU by one CUDA graph, so that a step costs no launches of single kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from recollect.core.state import leaves, map_state
from recollect.core.types import State

Inputs = tuple[Tensor | None, ...]
Output = TypeVar("Output", bound=State)
Record = Callable[[Callable[[], None]], Callable[[], None]]
"""From a function that reads and writes fixed memory to one that repeats what it does."""

WARM_UPS = 2
"""Calls before a recording: libraries choose and allocate at their first ones."""


class Steps(Generic[Output]):
    """``step`` (state, inputs) -> (output, next state), pure, applied call after call from ``state`` on.

    Inputs are tensors of the same shapes at every call; None stays None. On a GPU the first call records the step as a
    CUDA graph, unless the state changes its shape (full attention's grows) or something in the step waits for the GPU:
    then every call runs as written, and ``why`` says so. Elsewhere it always does. The graph keeps one more copy of the
    state and holds while parameters do not move. Without gradients.
    """

    def __init__(
        self,
        step: Callable[[State, Inputs], tuple[Output, State]],
        state: State,
        *,
        record: Record | None = None,
    ) -> None:
        on_gpu = next((leaf.is_cuda for _, leaf in leaves(state)), False)
        self._step, self._state = step, state
        self._record: Record | None = cuda_graph if record is None and on_gpu else record
        self._replay: Callable[[], None] | None = None
        self._inputs: Inputs = ()
        self._output: Output | None = None
        self.why = "not on a GPU" if self._record is None else ""

    @property
    def state(self) -> State:
        """After the last call; what later calls do to it does not show."""
        return self._state if self._replay is None else map_state(torch.clone, self._state)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor | None) -> Output:
        """Move on by one step. The output is the caller's own."""
        if self._record is not None and self._replay is None and not self.why:
            self._prepare(self._record, inputs)
        if self._replay is None:
            output, self._state = self._step(self._state, inputs)
            return output
        for held, given in zip(self._inputs, inputs, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        self._replay()
        assert self._output is not None
        return map_state(torch.clone, self._output)  # pyright: ignore[reportReturnType] of the same structure

    def _prepare(self, record: Record, inputs: Inputs) -> None:
        state = map_state(torch.clone, self._state)
        held = tuple(None if x is None else x.clone() for x in inputs)
        output, after = self._step(state, held)
        if _shapes(after) != _shapes(state):
            self.why = "the state changes its shape"
            return
        for _ in range(WARM_UPS - 1):
            self._step(state, held)
        written: Output = map_state(torch.clone, output)  # pyright: ignore[reportAssignmentType] of the same structure

        def run() -> None:
            found, moved = self._step(state, held)
            moved = map_state(torch.clone, moved)  # parts of it may lie where others are to go
            _copy(found, written)
            _copy(moved, state)

        before = map_state(torch.clone, state)
        try:
            replay = record(run)
        except RuntimeError as error:
            self.why = f"no graph could be recorded: {' '.join(str(error).split())[:200]}"
            return
        _copy(before, state)
        self._replay, self._inputs, self._output, self._state = replay, held, written, state


def _copy(source: State, target: State) -> None:
    for (_, new), (_, old) in zip(leaves(source), leaves(target), strict=True):
        old.copy_(new)


def _shapes(state: State) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, leaf.shape, leaf.dtype) for name, leaf in leaves(state)]


def cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """Record ``run`` on the current device. Raises RuntimeError where something in it waits for the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
