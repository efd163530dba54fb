"""The tensors of a checkpoint folder, read without executing code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from recollect.core.errors import DataError

FILES = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference; with ``.index.json`` behind the name where the weights are in several files."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. DataError where the file is missing or something else."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; a checkpoint is a folder with config.json and weights") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in ``folder``, on the CPU as stored.

    ``model.safetensors`` or ``pytorch_model.bin``, whole or in the parts that an index lists. A pickle is read with
    ``weights_only``: one that would execute code is a DataError, like a file that is missing or damaged.
    """
    for name in FILES:
        index = folder / f"{name}.index.json"
        if index.exists():
            parts = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not parts:
                raise DataError(f"{index} lists no files (weight_map is empty)")
            return {key: tensor for part in parts for key, tensor in _read(folder / part).items()}
        if (folder / name).exists():
            return _read(folder / name)
    raise DataError(f"{folder} has no weights: neither {' nor '.join(FILES)}, whole or with an index")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise DataError(f"{path} does not exist, but the index beside it lists it; the download is not complete")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is refused: its pickle holds more than tensors, and reading it would execute code"
        ) from None
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is damaged ({str(error).strip().splitlines()[0]})") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise DataError(f"{path} is not a mapping from names to tensors")
    return found
