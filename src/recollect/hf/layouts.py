"""What public Mamba checkpoints say of themselves, in our terms: two families in two layouts.

*transformers*: ``config.json`` has ``model_type`` mamba or mamba2. *state-spaces*: it has ``d_model``, ``n_layer`` and
``ssm_cfg`` and no ``model_type``; the embedding is called ``embedding``. The layers' parameters have the same names in
both, and in ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recollect.core.errors import ConfigError
from recollect.core.layer import BranchedConfig
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import NORM_EPS, Mamba2

Layout = Literal["transformers", "state-spaces"]

FAMILIES = ("mamba", "mamba2")


@dataclass(frozen=True)
class Described:
    """A public checkpoint's own description."""

    layout: Layout
    layer: BranchedConfig
    """Of all its layers alike."""
    n_layers: int
    vocab_size: int
    """Rows of the embedding, padding among them."""
    tied: bool
    epsilon: float
    residual_in_fp32: bool
    special: dict[str, Any]
    """Token ids: bos, eos, pad."""

    @property
    def embedding(self) -> str:
        """What the layout calls the embedding."""
        return "backbone.embeddings.weight" if self.layout == "transformers" else "backbone.embedding.weight"


def describe(config: Mapping[str, Any], where: str) -> Described:
    """Read a ``config.json``. ConfigError for another layout or model, or an option that our layers do not have."""
    if "model_type" in config:
        return _transformers(config, where)
    if "d_model" in config and "n_layer" in config:
        return _state_spaces(config, where)
    raise ConfigError(
        f"{where} is neither of the transformers layout (model_type mamba or mamba2) nor of the state-spaces one "
        f"(d_model, n_layer)"
    )


def _transformers(config: Mapping[str, Any], where: str) -> Described:
    family = config["model_type"]
    if family not in FAMILIES:
        hint = "it is one of ours already" if family == "recollect" else f"known: {', '.join(FAMILIES)}"
        raise ConfigError(f"{where}: model_type '{family}' cannot be converted; {hint}")
    # Absent keys stand for the defaults of transformers' own config.
    _require(config, where, {"hidden_act": "silu", "use_bias": False})
    width = _number(config, "hidden_size", where, 768 if family == "mamba" else 4096)
    common: dict[str, Any] = {
        "d_state": _number(config, "state_size", where, 16 if family == "mamba" else 128),
        "d_conv": _number(config, "conv_kernel", where, 4),
        "expand": _number(config, "expand", where, 2),
    }
    if family == "mamba":
        rank = config.get("time_step_rank", "auto")
        layer = Mamba.Config(
            width,
            **common,
            dt_rank=None if rank == "auto" else int(rank),
            conv_bias=bool(config.get("use_conv_bias", True)),
        )
        if (inner := config.get("intermediate_size", layer.d_inner)) != layer.d_inner:
            raise ConfigError(
                f"{where}: intermediate_size {inner} is not expand x hidden_size = {layer.d_inner}; the layer needs it"
            )
    else:
        _require(config, where, {"use_conv_bias": True})
        # JSON has no infinity: transformers writes {"__float__": "Infinity"}.
        limit = [
            float(number["__float__"] if isinstance(number, dict) else number)
            for number in config.get("time_step_limit", (0.0, "inf"))
        ]
        if limit != [0.0, float("inf")]:
            raise ConfigError(f"{where}: time_step_limit {limit} clamps step sizes; our layer does not, cannot convert")
        layer = Mamba2.Config(
            width,
            **common,
            d_head=_number(config, "head_dim", where, 64),
            n_groups=_number(config, "n_groups", where, 8),
        )
        if (heads := config.get("num_heads", layer.n_heads)) != layer.n_heads:
            raise ConfigError(f"{where}: num_heads {heads} does not fit expand, hidden_size and head_dim")
    epsilon = float(config.get("layer_norm_epsilon", 1e-5))
    _check_epsilon(family, epsilon, where)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    return Described(
        "transformers",
        layer,
        _number(config, "num_hidden_layers", where, 32 if family == "mamba" else 64),
        _number(config, "vocab_size", where, 50280 if family == "mamba" else 32768),
        bool(config.get("tie_word_embeddings", family == "mamba")),
        epsilon,
        bool(config.get("residual_in_fp32", True)),
        special,
    )


def _state_spaces(config: Mapping[str, Any], where: str) -> Described:
    _require(config, where, {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []})
    options = dict(config.get("ssm_cfg") or {})
    family = str(options.pop("layer", "Mamba1"))
    width = _number(config, "d_model", where)
    names = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand"}
    if family == "Mamba1":
        names |= {"dt_rank": "dt_rank", "conv_bias": "conv_bias"}
        if options.get("dt_rank") == "auto":
            options["dt_rank"] = None
        build = Mamba.Config
    elif family == "Mamba2":
        names |= {"headdim": "d_head", "ngroups": "n_groups"}
        options.setdefault("d_state", 128)
        build = Mamba2.Config
    else:
        raise ConfigError(f"{where}: ssm_cfg.layer '{family}' cannot be converted; known: Mamba1, Mamba2")
    # What decides only how a model starts or is executed.
    for harmless in ("chunk_size", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range"):
        options.pop(harmless, None)
    if unknown := sorted(set(options) - set(names)):
        raise ConfigError(f"{where}: ssm_cfg has options that our layer does not: {', '.join(unknown)}")
    layer = build(width, **{names[name]: value for name, value in options.items()})
    vocab, multiple = _number(config, "vocab_size", where), _number(config, "pad_vocab_size_multiple", where, 8)
    return Described(
        "state-spaces",
        layer,
        _number(config, "n_layer", where),
        -(-vocab // multiple) * multiple,
        bool(config.get("tie_embeddings", True)),
        1e-5,
        bool(config.get("residual_in_fp32", True)),
        {},
    )


def transformers_config(layer: BranchedConfig, n_layers: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    """The ``config.json`` with which transformers builds the model of ``n_layers`` such layers."""
    if isinstance(layer, Mamba.Config):
        own = {
            "model_type": "mamba",
            "architectures": ["MambaForCausalLM"],
            "time_step_rank": layer.rank,
            "use_conv_bias": layer.conv_bias,
            "intermediate_size": layer.d_inner,
        }
    elif isinstance(layer, Mamba2.Config):
        own = {
            "model_type": "mamba2",
            "architectures": ["Mamba2ForCausalLM"],
            "num_heads": layer.n_heads,
            "head_dim": layer.d_head,
            "n_groups": layer.n_groups,
            "use_conv_bias": True,
            "chunk_size": 64,
        }
    else:
        raise ConfigError(f"transformers has no model of '{layer.kind}' layers; only mamba and mamba2 can be exported")
    if not layer.d_conv:
        raise ConfigError(f"{layer.kind} without a convolution (d_conv=0) is not something transformers can build")
    return {
        **own,
        "hidden_size": layer.d_model,
        "state_size": layer.d_state,
        "conv_kernel": layer.d_conv,
        "expand": layer.expand,
        "num_hidden_layers": n_layers,
        "vocab_size": vocab_size,
        "use_bias": False,
        "hidden_act": "silu",
        **more,
    }


def _require(config: Mapping[str, Any], where: str, wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        found = config.get(name)
        if found is not None and found != value:
            raise ConfigError(f"{where}: {name}={found!r} cannot be converted; our layers have {name}={value!r}")


def _number(config: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}: {name} must be a positive whole number, got {value!r}")
    return value


def _check_epsilon(family: str, epsilon: float, where: str) -> None:
    if family == "mamba2" and epsilon != NORM_EPS:
        raise ConfigError(
            f"{where}: layer_norm_epsilon {epsilon} cannot be converted; the gated norm here has {NORM_EPS}"
        )
