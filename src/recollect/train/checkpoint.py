"""Checkpoints: tensors in safetensors, the rest in JSON, so that loading one never executes code.

``step-00000500.safetensors`` is written first, then ``step-00000500.json`` with its size and SHA-256: a checkpoint
exists exactly when its JSON does, and a damaged one is noticed, not loaded.

A run whose parameters are sharded leaves ``step-00000500.0of2.safetensors`` and so on, one per process, and then the
JSON, whose ``shards`` say of every file its size and SHA-256 and of every tensor in it the whole shape and the row it
starts at. Reading is the same for both: whole, or the rows that a process holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
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
    (folder / f"{stem}.json").unlink(missing_ok=True)
    written = write_tensors(folder / f"{stem}.safetensors", checkpoint.tensors)
    write_facts(folder, stem, dict(checkpoint.facts) | written)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file of tensors; returns its size and digest, ``bytes`` and ``sha256``."""
    data = save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    write_atomically(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_facts(folder: Path, stem: str, facts: Mapping[str, Any]) -> None:
    """Write ``folder/stem.json``, from when on the checkpoint exists."""
    write_atomically(folder / f"{stem}.json", json.dumps(facts, indent=2).encode())


def load(folder: Path, stem: str) -> Checkpoint:
    """Read a checkpoint, on the CPU, its shards joined.

    Raises RunError saying which file to delete when its size, digest or form is not what was written.
    """
    path = folder / f"{stem}.safetensors"
    try:
        known = json.loads((folder / f"{stem}.json").read_text())
        if "shards" in known:
            stored = Stored(folder, stem)
            stored.verify()
            return Checkpoint({name: stored.read(name) for name in stored.names}, known)
        data = path.read_bytes()
        if len(data) != known["bytes"]:
            raise ValueError(f"it has {len(data)} bytes, not {known['bytes']}")
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise ValueError("its contents do not match their digest")
        return Checkpoint(load_tensors(data), known)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunError(f"checkpoint {path} is damaged ({error}); {_remedy(folder, stem)}") from None


class Stored:
    """The tensors of a checkpoint, whole or in shards, read as they are asked for and no more of them.

    Every method raises RunError as ``load`` does.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        with self._readable():
            self.facts: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())
            whole = {"file": f"{stem}.safetensors", **self.facts}
            self._files: list[dict[str, Any]] = self.facts.get("shards") or [whole]
            self._pieces: dict[str, list[tuple[int, str]]] = {}
            """Where the parts of each tensor begin, and in which files they are."""
            self._shapes: dict[str, list[int]] = {}
            for file in self._files:
                for name, (start, shape) in self._layout(file).items():
                    self._pieces.setdefault(name, []).append((start, file["file"]))
                    self._shapes[name] = shape

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._pieces)

    def under(self, prefix: str) -> list[str]:
        """The names below ``prefix.``, without it."""
        return [name.removeprefix(f"{prefix}.") for name in self.names if name.startswith(f"{prefix}.")]

    def shape(self, name: str) -> list[int]:
        """The whole shape of a tensor."""
        return self._shapes[name]

    def verify(self, first: int = 0, every: int = 1) -> None:
        """Compare sizes and digests of the files ``first``, ``first + every``, ...: processes divide them."""
        with self._readable():
            for file in self._files[first::every]:
                path = self.folder / file["file"]
                if path.stat().st_size != file["bytes"]:
                    raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {file['bytes']}")
                with path.open("rb") as opened:
                    if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                        raise ValueError(f"the contents of {path.name} do not match their digest")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from ``start`` to ``stop``."""
        shape = self._shapes[name]
        with self._readable():
            if not shape:
                return self._open(self._pieces[name][0][1]).get_tensor(name)
            stop = shape[0] if stop is None else stop
            found: list[Tensor] = []
            at = start
            for begins, file in sorted(self._pieces[name]):
                rows = self._open(file).get_slice(name)
                ends = begins + rows.get_shape()[0]
                if begins <= at < min(ends, stop):
                    found.append(rows[at - begins : min(ends, stop) - begins])
                    at = min(ends, stop)
            if at != stop:
                raise ValueError(f"rows from {at} on of {name} are in none of its files")
            if not found:
                return self._open(self._pieces[name][0][1]).get_slice(name)[0:0]
            return found[0] if len(found) == 1 else torch.cat(found)

    def _layout(self, file: Mapping[str, Any]) -> dict[str, tuple[int, list[int]]]:
        """First row and whole shape of every tensor with rows in a file."""
        if "tensors" in file:
            return {name: (start, shape) for name, (start, shape) in file["tensors"].items()}
        opened = self._open(file["file"])
        return {name: (0, opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def _open(self, file: str) -> Any:
        return safetensors.safe_open(self.folder / file, framework="pt")

    @contextmanager
    def _readable(self) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            path = self.folder / f"{self.stem}.safetensors"
            raise RunError(f"checkpoint {path} is damaged ({error}); {_remedy(self.folder, self.stem)}") from None


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
        if path.name.partition(".")[0] not in kept:
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
