"""What a training run needs to know of the thing it trains: the one seam between the loop and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from recollect.core.seeding import Streams


Counting = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""From a title to a function of (done, all) that shows how far something is while it is open."""


@dataclass(frozen=True)
class Evaluation:
    """Scores: ``metrics`` are numbers to tabulate, ``details`` JSON data, ``arrays`` go to ``arrays.npz``."""

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, Any])


class Problem(ABC):
    """A model, where its batches come from, its loss and its scores.

    Every source of chance is addressed by name and step, never consumed in order: that is what lets a run resume bit
    for bit from parameters and optimizer state alone.
    """

    headline: str = "loss"
    """The metric of ``evaluate`` that progress shows and the best checkpoint is chosen by."""

    higher_is_better: bool = False

    def make_data(self, counting: Counting, workers: int = 0) -> None:  # noqa: B027 (most make their data as they go)
        """Make what is read from disk and not there yet, with so many processes; it is made when read otherwise."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The untrained model on the CPU. Called under the global torch seed of the run's ``init`` stream."""

    @abstractmethod
    def batch(self, step: int, streams: Streams, device: torch.device) -> Any:
        """The batch of 1-based ``step``, from ``streams.numpy("data", "train", step)`` or its torch twin.

        Any tree of dataclasses, mappings, tuples and tensors; whatever else is in it must pickle. The same arguments
        give the same batch, in any process: the loop asks for it on the CPU, maybe in a worker, and moves it itself.
        """

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """A scalar to descend and the numbers to log. ``generator`` is this step's own, on the batch's device."""

    def compiled(self, model: nn.Module) -> list[nn.Module]:
        """The modules that ``--compile`` compiles: their calls in ``loss`` are what takes the time.

        The backbone of a model that has one: before and after it shapes follow from the data. Else the model.
        """
        return [getattr(model, "backbone", model)]

    @abstractmethod
    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        """Scores on data of the ``eval`` stream. Called in eval mode without gradients; ``final`` may take longer."""

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """JSON facts for ``results.json``: at least ``params`` and ``state_bytes`` (of one sequence)."""
