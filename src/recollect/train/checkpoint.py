"""Checkpoints: tensors in safetensors, the rest in JSON, so that loading one never executes code.

``step-00000500.safetensors`` is written first, then ``step-00000500.json`` with its size and SHA-256: a checkpoint
exists exactly when its JSON does, and a damaged one is noticed, not loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn, optim

from recollect.core.errors import RunError
from recollect.core.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and the JSON facts stored beside them (``step``, ``wall_s``, ``best``)."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below ``prefix.``, under the rest of their names."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


def save(folder: Path, stem: str, checkpoint: Checkpoint) -> None:
    """Write ``folder/stem.safetensors`` and then ``folder/stem.json``. Replaces one of the same name."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    data = save_tensors(tensors)
    facts = dict(checkpoint.facts) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / f"{stem}.json").unlink(missing_ok=True)
    write_atomically(folder / f"{stem}.safetensors", data)
    write_atomically(folder / f"{stem}.json", json.dumps(facts, indent=2).encode())


def load(folder: Path, stem: str) -> Checkpoint:
    """Read a checkpoint, on the CPU.

    Raises RunError saying which file to delete when its size, digest or form is not what was written.
    """
    path = folder / f"{stem}.safetensors"
    try:
        known = json.loads((folder / f"{stem}.json").read_text())
        data = path.read_bytes()
        if len(data) != known["bytes"]:
            raise ValueError(f"it has {len(data)} bytes, not {known['bytes']}")
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise ValueError("its contents do not match their digest")
        return Checkpoint(load_tensors(data), known)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunError(f"checkpoint {path} is damaged ({error}); {_remedy(folder, stem)}") from None


def facts(folder: Path, stem: str) -> dict[str, Any]:
    """The facts beside a checkpoint's tensors. Raises RunError as ``load`` does when they cannot be read."""
    try:
        return dict(json.loads((folder / f"{stem}.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"checkpoint {folder / stem}.json is damaged ({error}); {_remedy(folder, stem)}") from None


def _remedy(folder: Path, stem: str) -> str:
    earlier = [name for name in stems(folder) if name < stem]
    if stem.startswith("best-"):
        return f"delete {folder / stem}.json and do without it, or train again with another --out"
    step = f"the checkpoint of step {step_of(earlier[-1])}" if earlier else "the beginning"
    return f"delete {folder / stem}.json and run the same command again to resume from {step}"


def stem_of(step: int, kind: str = "step") -> str:
    """The name of the checkpoint after ``step`` steps; of kind "best" it is the weights of a best validation."""
    return f"{kind}-{step:08d}"


def step_of(stem: str) -> int:
    """The number of steps taken before the checkpoint of that name."""
    return int(stem.rpartition("-")[2])


def stems(folder: Path, kind: str = "step") -> list[str]:
    """Names of the checkpoints of a run, oldest first."""
    return sorted(path.stem for path in folder.glob(f"{kind}-*.json"))


def prune(folder: Path, keep: int, kind: str = "step") -> None:
    """Delete all but the newest ``keep`` checkpoints, and what a killed process left without its JSON."""
    kept = stems(folder, kind)[-keep:]
    for path in folder.glob(f"{kind}-*.json"):
        if path.stem not in kept:
            path.unlink(missing_ok=True)
    for path in [*folder.glob(f"{kind}-*.safetensors"), *folder.glob("*.partial")]:
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as ``parameter name.key``, for example ``blocks.0.norm.weight.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave, in each parameter's own memory layout and on its device."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        if key == "step":
            optimizer.state[parameter][key] = tensor.to(parameter.device) if optimizer.defaults.get("fused") else tensor
        else:
            optimizer.state[parameter][key] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
