"""HAX over every mixer, its presets, and what its configs refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.core.config import dumps, from_dict, override, to_dict
from recollect.core.errors import ConfigError
from recollect.core.layer import BranchedConfig, LayerConfig
from recollect.layers import LAYERS
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.layers.sparse import SparseAttention
from recollect.ops.patterns import (
    Dilated,
    Full,
    KeySelection,
    Lsh,
    Sink,
    Window,
    key_budget,
    published_pattern,
)
from recollect.ops.sparse_attention import sparse_attention


def sparse(**options: Any) -> SparseAttention:
    return SparseAttention(SparseAttention.Config(8, **({"d_key": 4} | options)))


def double(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", LAYERS)
def test_hax_joins_every_mixer(kind: str) -> None:
    mixer = LAYERS[kind].Config.tiny()
    config = HAX.Config.recommended(mixer.d_model, mixer)
    assert config.arrangement == ("parallel" if isinstance(mixer, BranchedConfig) else "sequence")
    layer = config.build().double().eval()
    x = double(2, 12, mixer.d_model)
    state, folded = layer.init_state(2), []
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        folded.append(y_t)
    torch.testing.assert_close(torch.stack(folded, 1), layer(x).y, rtol=0, atol=1e-9)


def test_the_published_preset_has_the_papers_numbers() -> None:
    config = HAX.Config.published(64)
    assert config.patterns == (Lsh(32, n_bits=8, n_rounds=1, rule="sign"), KeySelection(32))
    assert key_budget(config.union) == 64
    assert (config.d_key, config.n_heads, config.gate_init, config.init_std) == (32, 1, 1.0, 0.1)
    assert (config.planes, config.selection, config.selection_target) == ("redrawn", "ranking", "sum")
    assert config.samples == 32
    assert (config.qk, config.normalise, config.include_self) == ("separate", None, False)
    assert config.arrangement == "parallel"
    assert config.attention.start_scale == 32**-0.5
    mixer = config.mixer
    assert isinstance(mixer, Mamba2.Config)
    assert (mixer.d_state, mixer.d_head, mixer.n_heads, mixer.d_inner) == (32, 16, 8, 128)
    layer = HAX(config)
    added = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in layer.mixer.parameters())
    assert added == 64 * 128 + 128 + (64 * 64 + 64) * 2 + 65, "one map to q and k, the gate, the scorer, no values"
    assert HAX.Config.published(64, S5.Config(64, d_state=16), n_keys=8).d_key == 16
    assert key_budget(HAX.Config.published(64, n_keys=8).patterns) == 8


def test_the_recommended_preset_follows_its_mixer_and_its_use() -> None:
    config = HAX.Config.recommended(64, S5.Config(64), gate_init=0.1)
    assert (config.arrangement, config.gate_init, config.selection, config.planes) == (
        "parallel",
        0.1,
        "ranking",
        "projected",
    )
    assert key_budget(config.union) == 32
    assert HAX.Config.recommended(64, Attention.Config(64)).arrangement == "sequence"


def test_the_language_preset_has_the_papers_numbers() -> None:
    config = HAX.Config.published_language(768)
    lsh, key_selection = config.patterns
    assert isinstance(lsh, Lsh)
    assert (lsh.n_keys, lsh.rule, lsh.n_buckets, lsh.n_planes) == (64, "argmax", 128, 128)
    assert key_selection == KeySelection(64)
    assert (config.planes, config.selection_target) == ("redrawn", "sum")


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("D", (Dilated(64, stride=32),)),
        ("SW", (Window(64),)),
        ("SW+D", (Window(32), Dilated(32, stride=64))),
        ("A", (Window(32), Sink(32))),
        ("LSH", (Lsh(64, n_bits=8),)),
        ("KS", (KeySelection(64),)),
        ("HAX", (Lsh(32, n_bits=8), KeySelection(32))),
        ("full", (Full(),)),
    ],
)
def test_published_rows_have_their_budgets(name: str, patterns: Any) -> None:
    assert published_pattern(name) == patterns
    assert key_budget(patterns) == (None if name == "full" else 64)
    SparseAttention.Config(8, patterns=published_pattern(name, n_keys=4)).build()


def test_a_dilated_row_can_reach_back_over_its_own_task() -> None:
    assert published_pattern("D", max_length=1058) == (Dilated(64, stride=16),)


# Configs


PRESETS: dict[str, LayerConfig] = {
    "published": HAX.Config.published(64),
    "language": HAX.Config.published_language(64),
    "recommended": HAX.Config.recommended(64, GRU.Config(64)),
    "in-sequence": HAX.Config.recommended(64, Attention.Config(64)),
}


@pytest.mark.parametrize(
    "config", [*HAX.Config.declared().values(), *SparseAttention.Config.declared().values(), *PRESETS.values()]
)
def test_configs_read_back(config: LayerConfig) -> None:
    assert from_dict(LayerConfig, json.loads(dumps(config))) == config


def test_options_pass_through_hax_and_can_be_overridden() -> None:
    config = override(HAX.Config.tiny(), ["selection=gate+kl", "patterns.0.rule=argmax", "planes=learned", "samples=7"])
    attention = config.attention
    assert (attention.selection, attention.planes, attention.samples) == ("gate+kl", "learned", 7)
    assert attention.patterns[0] == Lsh(4, n_bits=2, rule="argmax")
    assert HAX.Config.tiny().attention.options() == HAX.Config.tiny().options()
    layer = HAX(config)
    assert set(layer.train()(torch.randn(1, 20, 8)).aux) == {"hash", "selection"}


WINDOW = (Window(4),)
DUAL = Mamba.Config(8, d_state=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lsh(4, rule="sing"), r"pattern lsh: rule 'sing' is unknown; did you mean 'sign'\?"),
        (lambda: Lsh(0), "n_keys must be at least 1"),
        (lambda: KeySelection(0), "n_keys must be at least 1"),
        (lambda: sparse(patterns=("lsh",)), "'lsh' is not a pattern; give a spec"),
        (lambda: sparse(d_key=0), "sparse: d_key must be at least 1"),
        (lambda: sparse(n_heads=0), "sparse: n_heads must be at least 1"),
        (lambda: sparse(n_heads=3), "d_model 8 is not divisible by n_heads 3"),
        (lambda: sparse(qk="share"), r"sparse: qk 'share' is unknown; did you mean 'shared'\?"),
        (lambda: sparse(qk="dual"), "sparse: qk=dual takes the queries and keys of a mixer; use it within hax"),
        (lambda: sparse(d_read=-8), "d_read must not be negative"),
        (
            lambda: HAX.Config(8, mixer=GRU.Config(8), written=True),
            "written=true needs arrangement=parallel and a mixer",
        ),
        (
            lambda: HAX.Config(8, qk="dual", mixer=S5.Config(8)),
            "qk=dual needs arrangement=parallel and a mixer with queries",
        ),
        (lambda: HAX.Config(8, mixer=DUAL, qk="dual", arrangement="sequence"), "qk=dual needs arrangement=parallel"),
        (lambda: HAX.Config(8, qk="dual", mixer=DUAL, d_key=3), r"n_heads \* d_key must be that, got 1 \* 3"),
        (lambda: HAX.Config(8, qk="dual", mixer=DUAL, d_key=4, init_std=0.1), "qk=dual starts as the identity"),
        (lambda: sparse(normalise="l1"), r"sparse: normalise 'l1' is unknown; did you mean 'l2'\?"),
        (lambda: sparse(planes="learnt"), r"sparse: planes 'learnt' is unknown; did you mean 'learned'\?"),
        (lambda: sparse(selection="gates"), r"sparse: selection 'gates' is unknown; did you mean 'gate'\?"),
        (lambda: sparse(selection_target="max"), "selection_target 'max' is unknown"),
        (lambda: sparse(scale=0.0), "scale must be positive or null"),
        (lambda: sparse(init_std=-1.0), "init_std must be positive or null"),
        (lambda: sparse(samples=0), "samples must be at least 1 or null"),
        (lambda: sparse(patterns=WINDOW, planes="learned"), "planes=learned needs Lsh"),
        (lambda: sparse(patterns=WINDOW, planes="redrawn"), "planes=redrawn needs Lsh"),
        (lambda: sparse(patterns=WINDOW, selection="kl"), "selection=kl needs KeySelection"),
        (lambda: sparse(patterns=WINDOW, selection="gate"), "selection=gate needs KeySelection"),
        (lambda: sparse(patterns=WINDOW, selection_target="sum"), "selection_target=sum needs KeySelection"),
        (lambda: sparse(selection="kl", selection_target="sum"), "selection_target=sum is for selection=ranking"),
        (lambda: HAX.Config(8, mixer=GRU.Config(8), selection="gat"), r"hax: selection 'gat' .* did you mean 'gate'"),
        (lambda: HAX.Config(8, mixer=GRU.Config(8), arrangement="before"), "arrangement 'before' is not one of"),
        (lambda: HAX.Config.published(64, n_keys=7), "n_keys must be even"),
        (lambda: published_pattern("SWD"), r"unknown published pattern 'SWD'; did you mean 'SW(\+D)?'\?"),
        (lambda: published_pattern("D", n_keys=64, max_length=32), "max_length 32 must be at least n_keys 64"),
    ],
)
def test_bad_configs_say_in_one_line_what_is_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_unknown_pattern_kind_names_the_nearest() -> None:
    data = to_dict(HAX.Config.tiny())
    data["patterns"][0] = {"kind": "lhs", "n_keys": 4}
    with pytest.raises(ConfigError, match=r"patterns\.0: unknown kind 'lhs'; did you mean 'lsh'\?"):
        from_dict(LayerConfig, data)
    data["patterns"][0] = {"kind": "key_selection", "n_keys": 4}
    with pytest.raises(ConfigError, match=r"did you mean 'key-selection'\?"):
        from_dict(LayerConfig, data)


@pytest.mark.parametrize("path", ["dense", "tiled"])
def test_a_gated_key_is_one_feature_wider_in_the_op(path: str) -> None:
    """q . k * scale + bias is the product of (q, 1) and (k, bias / scale): no execution knows of gates."""
    q, k, v, bias = (
        double(1, 70, 1, 4),
        double(1, 70, 1, 4, seed=1),
        double(1, 70, 1, 3, seed=2),
        double(1, 70, 1, seed=3),
    )
    wide_q, wide_k = torch.cat([q, torch.ones(1, 70, 1, 1)], -1), torch.cat([k, bias[..., None] / 0.5], -1)
    y, _ = sparse_attention(wide_q, wide_k, v, (Window(9),), scale=0.5, path=path)
    at = torch.arange(70)
    inside = (at[:, None] >= at) & (at[:, None] - at < 9)
    logits = (0.5 * q[0, :, 0] @ k[0, :, 0].mT + bias[0, :, 0]).masked_fill(~inside, -torch.inf)
    torch.testing.assert_close(y[0, :, 0], logits.softmax(-1) @ v[0, :, 0])
