"""Checkpoints of random weights in the public layouts: to try conversion and training without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from recollect.core.errors import ConfigError
from recollect.hf.configuration import RecollectConfig
from recollect.hf.convert import making
from recollect.hf.layouts import Layout, transformers_config
from recollect.hf.modeling import RecollectForCausalLM
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.text.tokenizer import TextTokenizer

SHAPES: dict[str, tuple[int, int, int]] = {"tiny": (64, 2, 16), "small": (256, 6, 64), "130m": (768, 24, 128)}
"""Width, layers and the state of Mamba-2 (Mamba: 16 always); 130m is that of the public models of that size."""


def write_random(
    out: Path,
    *,
    family: Literal["mamba", "mamba2"] = "mamba2",
    layout: Layout = "transformers",
    shape: str = "tiny",
    tokenizer: TextTokenizer | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> int:
    """Write one to ``out``, and the tokenizer with it if there is one; returns the number of parameters.

    ``vocab_size`` None: that of the tokenizer, which is then needed, rounded up to a multiple of 16. Raises ConfigError
    for an unknown shape, for a vocabulary that nothing decides, and for an ``out`` that is there already.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}")
    if vocab_size is None and tokenizer is None:
        raise ConfigError("a checkpoint needs a vocabulary: give a tokenizer, or its size")
    rows = -(-(vocab_size or (tokenizer.vocab_size if tokenizer else 0)) // 16) * 16
    width, n_layers, d_state = SHAPES[shape]
    head = min(64, width // 2)
    layer = Mamba.Config(width) if family == "mamba" else Mamba2.Config(width, d_state=d_state, d_head=head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RecollectForCausalLM(RecollectConfig.of([layer] * n_layers, rows))
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    eos = 0 if tokenizer is None else tokenizer.eos_id
    special = {f"{name}_token_id": eos for name in ("bos", "eos", "pad")}
    config: dict[str, Any]
    if layout == "transformers":
        config = transformers_config(layer, n_layers, rows, tie_word_embeddings=True, **special)
    else:
        own = {"layer": "Mamba2", "d_state": d_state, "headdim": head} if family == "mamba2" else {}
        config = {"d_model": width, "n_layer": n_layers, "vocab_size": rows, "ssm_cfg": own, "rms_norm": True}
        config |= {
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 16,
            "tie_embeddings": True,
        }
        tensors = {name.replace(".embeddings.", ".embedding."): tensor for name, tensor in tensors.items()}
    with making(out) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(partial)
    return sum(tensor.numel() for tensor in tensors.values())
