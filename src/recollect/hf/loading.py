"""Models read from folders: ours, strictly, and whatever causal language model transformers knows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from recollect.core.errors import ConfigError, DataError, described
from recollect.hf.configuration import RecollectConfig
from recollect.hf.modeling import RecollectForCausalLM
from recollect.hf.weights import read_json


def load_model(folder: Path, dtype: torch.dtype | None = None) -> RecollectForCausalLM:
    """A model of ours that ``save_pretrained`` or ``recollect lm`` wrote, on the CPU, in the stored type or ``dtype``.

    Every parameter must be in the file and nothing else. Raises ConfigError for another kind of model, DataError for
    files that are missing, damaged or do not fit.
    """
    read_config(folder)
    with quiet():
        try:
            loaded: Any = RecollectForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        except ConfigError:
            raise
        except Exception as error:  # of transformers, safetensors and torch: no common base
            raise DataError(f"{folder} cannot be loaded ({described(error)})") from None
    model, found = loaded
    for what, names in (("missing", found["missing_keys"]), ("unexpected", found["unexpected_keys"])):
        if names:
            raise DataError(f"{folder}: {len(names)} {what} weights ({', '.join(sorted(names)[:4])}); it is not whole")
    return model


def read_config(folder: Path) -> RecollectConfig:
    """The config of a model of ours. Raises as ``load_model`` does."""
    data = read_json(folder / "config.json")
    if (kind := data.get("model_type")) != RecollectConfig.model_type:
        raise ConfigError(
            f"{folder} holds a model of type {kind!r}, not one of ours; first: recollect lm convert {folder} --out DIR"
        )
    return RecollectConfig.from_dict(data)


def load_any(folder: str | Path) -> PreTrainedModel:
    """A causal language model, ours or one of transformers' own, in evaluation mode. Runs no code of the checkpoint.

    Raises DataError where there is none or it cannot be read.
    """
    path = Path(folder)
    if path.is_dir() and read_json(path / "config.json").get("model_type") == RecollectConfig.model_type:
        return load_model(path).eval()
    if not path.is_dir() and str(folder).count("/") != 1:
        raise DataError(f"'{folder}' is not a folder with a model, nor a name on the hub")
    with quiet():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)
        except Exception as error:  # see above
            raise DataError(f"'{folder}' cannot be loaded as a causal language model ({described(error)})") from None
    return model.eval()


@contextmanager
def quiet() -> Generator[None]:
    """Without transformers' progress bars and load reports: what they say is checked and told in one line."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
