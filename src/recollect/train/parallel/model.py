"""How a model lies among the processes of a team: whole in each and averaged (DDP), or in shards (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from recollect.models.chunked_loss import counting
from recollect.ops import dispatch
from recollect.train.parallel.team import Team
from recollect.train.problem import Problem, Share

MARKS = ("_no_weight_decay", "_lr_scale")
"""What a layer may write on a parameter for ``train.optimizer``."""


class SharedModel:
    """``model``, whose parameters keep their names, and the way to its loss through which gradients are shared.

    Under fsdp every layer (``Problem.layers``) is a unit, gathered when it is run, and what is left is one more.
    Parameters, gradients, moments and averages are DTensors cut along their first axis. Parameters stay float32 where
    they lie and where they are gathered: autocast chooses what runs in bf16, as in one process, and what layers keep in
    float32 (decay rates, step sizes) keeps its digits.
    """

    def __init__(self, team: Team, problem: Problem, model: nn.Module, device: torch.device) -> None:
        self.team, self.model, self.device = team, model, device
        self._loss: nn.Module = _Loss(problem, model)
        if team.kind == "fsdp":
            _shard(self._loss, model, problem.layers(model), init_device_mesh(device.type, (team.size,)))
        elif team.kind == "ddp":
            self._loss = _averaged(self._loss, device)

    def loss(self, share: Share, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of one share, of which the mean over all shares by their weight is the batch's, and its numbers."""
        with counting(share.counted):
            return self._loss(share.batch, generator)

    @contextmanager
    def sharing(self, last: bool) -> Generator[None]:
        """Around loss and backward of a share. Whole gradients are exchanged after the last one only; sharded ones
        after each, as they are never held whole.
        """
        if isinstance(self._loss, DistributedDataParallel) and not last:
            with self._loss.no_sync():
                yield
        elif self.team.kind == "fsdp" and self.device.type == "cpu":
            with _torch_kernels():
                yield
        else:
            yield

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The model's state with ``values`` in place of parameters, gathered in the first process; None in others.

        The others hold one whole tensor at a time. Where nothing is sharded, nothing is copied.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            tensor = values.get(name, tensor)
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.team.first:
                found[name] = full
        return found if self.team.first else None


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Loss(nn.Module):
    """The problem's loss as a module's forward, which is what DDP and FSDP2 hook."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._problem = problem

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        return self._problem.loss(self.model, batch, generator)


@contextmanager
def _torch_kernels() -> Generator[None]:
    """Without numba: it reads tensors as numpy arrays, and torch does not free memory that numpy was shown, as FSDP2
    has to after every layer.
    """
    before, dispatch.KERNELS = dispatch.KERNELS, "torch"
    try:
        yield
    finally:
        dispatch.KERNELS = before


def _averaged(loss: nn.Module, device: torch.device) -> DistributedDataParallel:
    # Heads of weight 0 and layers that a stage leaves out take no part in some steps, so DDP has to look for parameters
    # without a gradient; it complains when it finds none, and so is given one to find.
    loss.unused = nn.Parameter(torch.zeros(1, device=device))
    with warnings.catch_warnings():
        # Versions of torch differ in what they call this option.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers")
        return DistributedDataParallel(
            loss,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=True,
        )


def _shard(root: nn.Module, model: nn.Module, layers: Sequence[nn.Module], mesh: Any) -> None:
    marks = {
        name: {mark: getattr(p, mark) for mark in MARKS if hasattr(p, mark)} for name, p in model.named_parameters()
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    # Nothing here writes into what a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for name, parameter in model.named_parameters():
        for mark, value in marks[name].items():
            setattr(parameter, mark, value)
