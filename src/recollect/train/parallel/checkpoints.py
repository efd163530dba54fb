"""Checkpoints of runs that several processes carry out: who writes what, and how another number of them reads it.

Whole parameters (off, ddp) are written by the first process, in the form of a single one. Shards are written by those
that hold them, each a file; no process ever holds more than its own, twice while it writes. All processes must see one
file system. ``torch.distributed.checkpoint`` is not used: ``docs/distributed.md`` says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor

from recollect.train import checkpoint as ckpt
from recollect.train.parallel.model import local
from recollect.train.parallel.team import Team


def save(team: Team, folder: Path, stem: str, checkpoint: ckpt.Checkpoint, keep: int) -> None:
    """Write a checkpoint of all processes, and delete all but the newest ``keep``. Raises what any of them raises."""
    if team.kind == "fsdp":
        with team.together():
            if team.first:
                (folder / f"{stem}.json").unlink(missing_ok=True)
        written: dict[str, Any] = {}
        with team.together():
            name = f"{stem}.{team.rank}of{team.size}.safetensors"
            held = {key: tensor for key, tensor in checkpoint.tensors.items() if _holds(team, tensor)}
            layout = {key: (first_row(team, tensor), list(tensor.shape)) for key, tensor in held.items()}
            parts = {key: local(tensor) for key, tensor in held.items()}
            written = {"file": name, "tensors": layout, **ckpt.write_tensors(folder / name, parts)}
        shards = [json.loads(text) for text in team.texts(json.dumps(written))]
        with team.together():
            if team.first:
                ckpt.write_facts(folder, stem, {**checkpoint.facts, "shards": shards})
                ckpt.prune(folder, keep)
        return
    with team.together():
        if team.first:
            ckpt.save(folder, stem, checkpoint)
            ckpt.prune(folder, keep)


def restore(team: Team, stored: ckpt.Stored, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Put a checkpoint's rows into the shards of a model and its optimizer; returns the averages, sharded alike.

    Raises RunError for damage, KeyError and ValueError when it is of another model. The processes do not meet in it.
    """
    restore_weights(team, stored, model)
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name in stored.under("optim"):
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        if key == "step":
            step = stored.read(f"optim.{full_name}")
            optimizer.state[parameter][key] = step.to(parameter.device) if optimizer.defaults.get("fused") else step
        else:
            moment = torch.empty_like(parameter, requires_grad=False)
            _fill(team, moment, stored, f"optim.{full_name}")
            optimizer.state[parameter][key] = moment
    averages: dict[str, Tensor] = {}
    for name in stored.under("ema"):
        averages[name] = parameters[name].detach().clone()
        _fill(team, averages[name], stored, f"ema.{name}")
    return averages


def restore_weights(team: Team, stored: ckpt.Stored, model: nn.Module) -> None:
    """Put a checkpoint's rows into the shards of a model. Raises as ``restore``."""
    state, names = model.state_dict(), set(stored.under("model"))
    if differing := sorted(state.keys() ^ names):
        raise KeyError(f"{differing[0]} is in only one of them")
    for name, tensor in state.items():
        _fill(team, tensor, stored, f"model.{name}")


def first_row(team: Team, tensor: Tensor) -> int:
    """Where this process's rows begin: FSDP2 gives every process ceil(rows / processes) of them while there are any."""
    if not isinstance(tensor, DTensor):
        return 0
    return min(team.rank * -(-tensor.shape[0] // team.size), tensor.shape[0])


def _holds(team: Team, tensor: Tensor) -> bool:
    """Whether this process writes something of a tensor: its rows, or in the first one what all have."""
    return team.first or (isinstance(tensor, DTensor) and local(tensor).numel() > 0)


@torch.no_grad()
def _fill(team: Team, tensor: Tensor, stored: ckpt.Stored, name: str) -> None:
    if list(tensor.shape) != stored.shape(name):
        raise ValueError(f"{name} is {stored.shape(name)} in the checkpoint and {list(tensor.shape)} in the model")
    if tensor.ndim == 0:
        local(tensor).copy_(stored.read(name))
        return
    part, start = local(tensor), first_row(team, tensor)
    part.copy_(stored.read(name, start, start + part.shape[0]))
