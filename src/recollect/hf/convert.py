"""Public Mamba checkpoints into our models, with or without sparse attention beside every layer, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recollect.core.config import to_dict
from recollect.core.errors import ConfigError, DataError
from recollect.core.layer import BranchedConfig, LayerConfig
from recollect.hf.configuration import RecollectConfig
from recollect.hf.layouts import Described, describe, transformers_config
from recollect.hf.loading import quiet
from recollect.hf.modeling import KEPT_IN_FP32, RecollectForCausalLM
from recollect.hf.weights import read_json, read_weights
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.models.beside import Beside

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
SHOWN = 4
"""Keys that an error lists before it only counts."""


def convert(
    source: str | Path,
    out: Path,
    *,
    hax: Beside | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> RecollectConfig:
    """Write the public checkpoint ``source`` (a folder, or a name on the hub) as a model of ours into ``out``.

    Every key and shape must be what the config promises; ``dtype`` None keeps that of the file. With ``hax`` every
    layer gets that attention, its queries and keys begun as ``begin_attention`` does, the rest drawn from ``seed``.
    Tokenizer files come along; ``tokenizer`` names one to take instead (the state-spaces layout has none).

    Raises DataError for files that are missing, damaged or refused, ConfigError for a model that cannot be converted,
    and for an ``out`` that is there already. Nothing is left behind then.
    """
    folder = fetch(source)
    described = describe(read_json(folder / "config.json"), str(folder / "config.json"))
    say(f"{described.layout} layout: {described.n_layers} of {described.layer.kind}, {described.layer.d_model} wide")
    tensors = renamed(read_weights(folder), described, str(folder))
    layer: LayerConfig = described.layer if hax is None else hax.around(described.layer)
    dtype = dtype or tensors["backbone.embeddings.weight"].dtype
    config = RecollectConfig.of(
        [layer] * described.n_layers,
        described.vocab_size,
        layer_norm_epsilon=described.epsilon,
        residual_in_fp32=described.residual_in_fp32,
        tie_word_embeddings=described.tied,
        **described.special,
    )
    with torch.random.fork_rng(devices=[]), making(out) as partial:
        torch.manual_seed(seed)
        model = RecollectForCausalLM(config)
        place(model, tensors, described.layer, hax is not None)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name.endswith(KEPT_IN_FP32) else dtype)
        config.dtype = dtype
        with quiet():
            model.save_pretrained(partial)
        copy_tokenizer(folder, partial, tokenizer, config.vocab_size, say)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")
    return config


def fetch(source: str | Path) -> Path:
    """The folder of a checkpoint: ``source`` itself, or what the hub has under that name."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1:
        raise DataError(
            f"{source} is not a folder with a checkpoint, nor a name on the hub such as state-spaces/mamba-130m"
        )
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.bin", "*.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # the library raises many kinds, none of which a user could act upon differently
        raise DataError(
            f"{source} is no folder here and could not be downloaded ({type(error).__name__}); give a local folder"
        ) from None


def renamed(tensors: Mapping[str, Tensor], described: Described, where: str) -> dict[str, Tensor]:
    """The tensors under our names, every name and shape checked against what ``described`` calls for.

    Where the head is tied to the embedding it may be there too, and must then be equal. Raises DataError otherwise.
    """
    ours = "backbone.embeddings.weight"
    found = {ours if name == described.embedding else name: tensor for name, tensor in tensors.items()}
    with torch.device("meta"):
        layer = described.layer.build()
    width = described.layer.d_model
    shapes: dict[str, tuple[int, ...]] = {ours: (described.vocab_size, width), "backbone.norm_f.weight": (width,)}
    for i in range(described.n_layers):
        shapes[f"backbone.layers.{i}.norm.weight"] = (width,)
        for name, parameter in layer.named_parameters():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = tuple(parameter.shape)
    head = found.get("lm_head.weight")
    if not described.tied:
        shapes["lm_head.weight"] = (described.vocab_size, width)
    elif head is not None:
        if head.shape != found.get(ours, head).shape or not torch.equal(head, found.get(ours, head)):
            raise DataError(
                f"{where}: config says tied embeddings, but lm_head.weight differs from {described.embedding}"
            )
        del found["lm_head.weight"]
    _compare(set(shapes), set(found), where)
    for name, shape in shapes.items():
        if tuple(found[name].shape) != shape:
            raise DataError(f"{where}: {name} has shape {tuple(found[name].shape)}, its config calls for {shape}")
    return found


def _compare(wanted: set[str], there: set[str], where: str) -> None:
    problems = [
        f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in (("missing", sorted(wanted - there)), ("unexpected", sorted(there - wanted)))
        if names
    ]
    if problems:
        raise DataError(f"{where}: weights do not fit config.json: {'; '.join(problems)}")


def joined(model: RecollectForCausalLM, beside: Beside, seed: int = 0) -> RecollectForCausalLM:
    """The same model with attention beside every layer, as ``convert`` puts it there; it shares no weights.

    Raises ConfigError where its layers are not all one mixer that attention can join.
    """
    layers = set(model.config.layer_configs())
    layer = layers.pop()
    if layers or not isinstance(layer, BranchedConfig):
        raise ConfigError("attention can be put beside the layers of models whose layers are all one Mamba or Mamba-2")
    options = {**model.config.to_dict(), "layers": [to_dict(beside.around(layer))] * model.config.num_hidden_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = RecollectForCausalLM(RecollectConfig.from_dict(options))
    place(found, dict(model.named_parameters()), layer, True)
    return found


@torch.no_grad()
def place(model: RecollectForCausalLM, tensors: Mapping[str, Tensor], layer: BranchedConfig, joined: bool) -> None:
    """Put a checkpoint's tensors, under our names, into a model of its layers, each within a HAX where ``joined``."""
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        target = name.replace(".mixer.", ".mixer.mixer.", 1) if joined else name
        own[target].copy_(tensor)
    if joined:
        for block in model.backbone.layers:
            hax: Any = block.mixer
            begin_attention(hax, layer)


@torch.no_grad()
def begin_attention(hax: HAX, layer: BranchedConfig) -> None:
    """Start queries as the mixer's C and keys as its B, the duals of attention's in a state-space model.

    In Mamba both are linear in the inner activations u that the attention reads, so their rows of ``x_proj`` are taken
    as they are. In Mamba-2 they are made from the layer's input beside u: with W_x and W_B the rows of ``in_proj`` that
    give u and B before convolution and SiLU, the map taken is the smallest M with M W_x = W_B, exact up to those two.
    With several groups of B and C the first is taken. Needs ``d_key = d_state`` and one head.
    """
    c = hax.config
    if c.n_heads != 1 or c.d_key != getattr(layer, "d_state", None) or c.qk != "separate":
        return
    n = c.d_key
    mixer: Any = hax.mixer
    if isinstance(layer, Mamba.Config):
        keys, queries = mixer.x_proj.weight[layer.rank :].float().split(n)
    elif isinstance(layer, Mamba2.Config):
        inner, width = layer.d_inner, layer.n_groups * layer.d_state
        weights = mixer.in_proj.weight.float().split([inner, inner, width, width, layer.n_heads])
        inverse = torch.linalg.pinv(weights[1])
        keys, queries = weights[2][:n] @ inverse, weights[3][:n] @ inverse
    else:
        return
    hax.attention.to_qk.weight.copy_(torch.cat([queries, keys]))


def export(source: Path, out: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write a model of ours in the transformers layout, without its attention branches.

    Raises ConfigError where its layers are not all one Mamba or Mamba-2, within a HAX or not, and as ``convert`` does.
    """
    config = read_json(source / "config.json")
    if config.get("model_type") != RecollectConfig.model_type:
        raise ConfigError(f"{source} is not a model of recollect (model_type {config.get('model_type')!r})")
    ours = RecollectConfig.from_dict(config)
    layers = {layer.mixer if isinstance(layer, HAX.Config) else layer for layer in ours.layer_configs()}
    if len(layers) > 1:
        raise ConfigError(f"{source} has layers of {len(layers)} configs; transformers' Mamba models have one for all")
    layer = layers.pop()
    if not isinstance(layer, BranchedConfig):
        raise ConfigError(f"transformers has no model of '{layer.kind}' layers; only mamba and mamba2 can be exported")
    described = transformers_config(
        layer,
        ours.num_hidden_layers,
        ours.vocab_size,
        layer_norm_epsilon=ours.layer_norm_epsilon,
        residual_in_fp32=ours.residual_in_fp32,
        tie_word_embeddings=ours.tie_word_embeddings,
        **{name: getattr(ours, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    dropped, kept = 0, dict[str, Tensor]()
    for name, tensor in read_weights(source).items():
        if ".mixer.attention." in name or name.endswith(".mixer.gate"):
            dropped += tensor.numel()
        else:
            kept[name.replace(".mixer.mixer.", ".mixer.")] = tensor.contiguous()
    expected = Described(
        "transformers", layer, ours.num_hidden_layers, ours.vocab_size, ours.tie_word_embeddings, 0, True, {}
    )
    kept = renamed(kept, expected, str(source))
    with making(out) as partial:
        (partial / "config.json").write_text(json.dumps(described, indent=2))
        save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
        copy_tokenizer(source, partial, None, ours.vocab_size, say)
    say(f"{out}: transformers layout, {dropped:,} numbers of attention branches left out")


def copy_tokenizer(folder: Path, out: Path, tokenizer: str | None, vocab_size: int, say: Callable[[str], None]) -> None:
    """Save the tokenizer that ``tokenizer`` names, or copy the files of the one in ``folder``, into ``out``."""
    if tokenizer is not None:
        from recollect.text.tokenizer import check_vocabulary, load_tokenizer

        chosen = load_tokenizer(tokenizer)
        check_vocabulary(chosen, vocab_size)
        chosen.save(out)
        return
    there = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    for name in there:
        shutil.copyfile(folder / name, out / name)
    if not there:
        say("no tokenizer beside the weights; name one with --tokenizer to have it saved with the model")


@contextmanager
def making(out: Path) -> Generator[Path]:
    """A folder that becomes ``out`` when all went well, and is gone when not. ConfigError where ``out`` is not free."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def parse_hax(assignments: Iterable[str]) -> Beside:
    """``k=128``, ``pattern=SW+D``, ``gate=0``, ``planes=fixed``, ``dual=true``, ``follow=16``; else ConfigError."""
    names = {"k": "n_keys"} | {name: name for name in ("n_keys", "pattern", "gate", "planes", "dual", "follow")}
    kinds: dict[str, Callable[[str], Any]] = {"n_keys": int, "gate": float, "dual": _truth, "follow": int}
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in names or not text:
            raise ConfigError(
                f"--hax {assignment}: give k=N, pattern=NAME, gate=X, planes=fixed|redrawn, dual=true or follow=N"
            )
        try:
            values[names[name]] = kinds.get(names[name], str)(text)
        except (ValueError, KeyError):
            wanted = "true or false" if name == "dual" else "a number"
            raise ConfigError(f"--hax {assignment}: '{text}' is not {wanted}") from None
    return Beside(**values)


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text]
