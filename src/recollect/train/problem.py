"""What a training run needs to know of the thing it trains: the one seam between the loop and everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Share(NamedTuple):
    """A part of a batch: so many of its rows."""

    batch: Any
    weight: float = 1.0
    """Its share of the batch's loss; those of all parts sum to 1."""
    counted: float | None = None
    """By how much its masked means count against those of parts of the same weight (``models.chunked_loss.counting``);
    None for a batch in one part."""
    number: int | None = None
    """Its number among the parts, which addresses its random numbers; None for a batch in one part."""


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

    def shares(self, batch: Any, n: int) -> list[Share]:
        """A batch in ``n`` parts, for processes and for gradient accumulation; n is at least 2.

        Here, for batches in which every tensor of one axis or more has one entry per row: equally many rows each, in
        order. The loss has to be a mean over rows, over what every row has equally many of, or over the true entries
        of the batch's ``mask`` by ``masked_cross_entropy``; other problems say here how they are split. Raises
        ConfigError when the rows cannot be shared equally.
        """
        from recollect.train.shares import share_rows

        return share_rows(batch, n)

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

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the model, in order: what fsdp gathers one at a time, and ``--recompute`` runs again.

        Here those of every backbone in it.
        """
        from recollect.models.backbone import Backbone

        return [layer for module in model.modules() if isinstance(module, Backbone) for layer in module.layers]

    @abstractmethod
    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        """Scores on data of the ``eval`` stream. Called in eval mode without gradients; ``final`` may take longer."""

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """JSON facts for ``results.json``: at least ``params`` and ``state_bytes`` (of one sequence)."""
