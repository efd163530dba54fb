"""Public checkpoints, both families in both layouts, against transformers' own models with the same weights."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from recollect.core.errors import ConfigError, DataError, RecollectError
from recollect.hf.convert import convert, export, joined, parse_hax
from recollect.hf.loading import load_model
from recollect.models.beside import PATTERNS, Beside

VOCAB = 48
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def public(family: str, **more: Any) -> torch.nn.Module:
    torch.manual_seed(2)
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 8, **IDS, **more}
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(**shape))
    else:
        widths = {"num_heads": 6, "head_dim": 8, "n_groups": 1, "tie_word_embeddings": True, "chunk_size": 16}
        model = Mamba2ForCausalLM(Mamba2Config(**{**widths, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def as_state_spaces(model: Any, family: str, folder: Path, *, pickled: bool) -> None:
    """The same weights as the state-spaces repositories lay them out: other config, other embedding, no model_type."""
    folder.mkdir(exist_ok=True)
    c = model.config
    ssm: dict[str, Any] = {"d_state": c.state_size}
    if family == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups}
    config = {
        "d_model": c.hidden_size,
        "n_layer": c.num_hidden_layers,
        "vocab_size": c.vocab_size - 3,
        "ssm_cfg": ssm,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {k.replace(".embeddings.", ".embedding."): v.clone() for k, v in model.state_dict().items()}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A checkpoint of that family in the transformers layout."""
    public(family).save_pretrained(tmp_path / "public")
    return tmp_path / "public"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 37), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


@pytest.mark.parametrize("layout", ["transformers", "transformers-sharded", "state-spaces", "state-spaces-pickled"])
def test_logits_are_those_of_transformers(family: str, layout: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = public(family)
    source = tmp_path / "source"
    if layout.startswith("transformers"):
        model.save_pretrained(source, **({"max_shard_size": "20KB"} if layout.endswith("sharded") else {}))
        assert (source / "model.safetensors.index.json").exists() == layout.endswith("sharded")
    else:
        as_state_spaces(model, family, source, pickled=layout.endswith("pickled"))
    convert(source, tmp_path / "ours")
    with torch.no_grad():
        wanted = model(tokens).logits
    found = logits(tmp_path / "ours", tokens)
    assert found.shape == wanted.shape == (2, 37, VOCAB)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_branch_with_a_closed_gate_changes_not_one_bit(folder: Path, pattern: str, tmp_path: Path) -> None:
    tokens = torch.randint(1, VOCAB, (1, 300))
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "hax", hax=Beside(8, pattern))
    assert torch.equal(logits(tmp_path / "hax", tokens), logits(tmp_path / "plain", tokens))
    convert(folder, tmp_path / "open", hax=Beside(8, pattern, gate=1.0))
    assert (logits(tmp_path / "open", tokens) - logits(tmp_path / "plain", tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_queries_and_keys_begin_as_the_mixers_own(family: str, folder: Path, tmp_path: Path) -> None:
    """Of the activations that the attention reads: exactly in Mamba; in Mamba-2 before convolution and SiLU."""
    convert(folder, tmp_path / "hax", hax=Beside(8))
    mixer: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hax").backbone.layers[1].mixer
    x = torch.randn(3, 24)
    if family == "mamba":
        u = torch.randn(3, 48)
        _, B, C = mixer.mixer.x_proj(u).split([2, 8, 8], -1)
    else:
        _, u, B, C, _ = mixer.mixer.in_proj(x).split([48, 48, 8, 8, 6], -1)
    queries, keys = mixer.attention.to_qk(u).split(8, -1)
    torch.testing.assert_close(queries, C, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(keys, B, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_dual_branch_reads_the_mixers_own_and_can_be_closed(folder: Path, tmp_path: Path) -> None:
    tokens = torch.randint(1, VOCAB, (1, 40))
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "dual", hax=Beside(8, dual=True))
    assert torch.equal(logits(tmp_path / "dual", tokens), logits(tmp_path / "plain", tokens))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dual").eval()
    mixer = model.backbone.layers[1].mixer
    seen: list[torch.Tensor] = []
    own: list[tuple[torch.Tensor, ...]] = []
    mixer.attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer.mixer.forward = _telling(mixer.mixer.forward, own)
    model(tokens)
    (u, (C, B, values)), x = own[0], seen[0]
    assert torch.equal(x, torch.cat([values, C, B], -1))
    assert values.shape == u.shape
    found = mixer.attention.attention_inputs(x)
    for mine, theirs in ((found.q_BLHN, C), (found.k_BLHN, B)):
        direction = mine.squeeze(2) / mine.squeeze(2).norm(dim=-1, keepdim=True)
        torch.testing.assert_close(direction, theirs / theirs.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.q_BLHN.norm(dim=-1), torch.full(found.q_BLHN.shape[:3], 10.0))


@torch.no_grad()
def test_a_following_branch_reads_what_is_written_after_a_moment_like_this_and_can_be_closed(
    folder: Path, tmp_path: Path
) -> None:
    tokens = torch.randint(1, VOCAB, (1, 40))
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "follow", hax=Beside(8, follow=6))
    assert torch.equal(logits(tmp_path / "follow", tokens), logits(tmp_path / "plain", tokens))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "follow").eval()
    attention = model.backbone.layers[0].mixer.attention
    seen: list[torch.Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens.repeat(1, 2))
    inputs = attention.attention_inputs(seen[0])
    # In the first layer a token is as it was 40 tokens ago, convolution (4) and moment (6) behind it.
    likeness = torch.einsum("bihn,bjhn->bij", inputs.q_BLHN, inputs.k_BLHN)[0]
    for i in range(40 + 8, 79):
        torch.testing.assert_close(likeness[i, i - 39], torch.tensor(30.0), rtol=1e-3, atol=0)
        assert likeness[i, : i - 39].max() < 29.9, "the key of the place after is that of the moment itself"


def test_moments_and_the_mixers_own_queries_exclude_each_other() -> None:
    assert parse_hax(["follow=16"]) == Beside(follow=16)
    for wrong in ({"follow": 4, "dual": True}, {"follow": -1}):
        with pytest.raises(ConfigError, match="follow must not be negative nor go with dual"):
            Beside(**wrong)


def _telling(forward: Any, own: list[Any]) -> Any:
    """The same forward, which notes what its branch is called with."""

    def told(*args: Any, branch: Any, **kwargs: Any) -> Any:
        def noting(u: torch.Tensor, dual: Any = None) -> torch.Tensor:
            own.append((u, dual()))
            return branch(u, dual)

        return forward(*args, branch=noting, **kwargs)

    return told


@pytest.mark.parametrize("joined", [True, False])
def test_exported_again_transformers_reads_the_same_model(
    family: str, folder: Path, joined: bool, tmp_path: Path, tokens: torch.Tensor
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "ours", hax=Beside(8) if joined else None)
    export(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    before, after = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")).__name__.lower() == f"{family}forcausallm"
    torch.testing.assert_close(logits(tmp_path / "back", tokens), logits(folder, tokens), rtol=1e-5, atol=1e-5)


def test_attention_put_beside_a_model_of_ours_is_that_of_conversion(
    folder: Path, tmp_path: Path, tokens: torch.Tensor
) -> None:
    convert(folder, tmp_path / "plain")
    convert(folder, tmp_path / "hax", hax=Beside(8, gate=1.0), seed=7)
    found = joined(load_model(tmp_path / "plain"), Beside(8, gate=1.0), seed=7).eval()
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, logits(tmp_path / "hax", tokens))
    with pytest.raises(ConfigError, match="all one Mamba"):
        joined(found, Beside(8))


def test_the_type_is_kept_or_chosen(folder: Path, tmp_path: Path) -> None:
    for name, dtype in (("kept", None), ("half", torch.bfloat16)):
        convert(folder, tmp_path / name, dtype=dtype)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert stored["backbone.embeddings.weight"].dtype == (dtype or torch.float32)
        assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def edited(folder: Path, change: Any) -> None:
    """Weights of the folder with ``change`` applied to the mapping."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def configured(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Bomb:
    """A pickle that would leave a trace if it were executed."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("exploded",)


def _explode(folder: Path, *, zipped: bool) -> None:
    (folder / "model.safetensors").unlink()
    if zipped:
        torch.save({"backbone.norm_f.weight": Bomb()}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"backbone.norm_f.weight": Bomb()}, protocol=2))


WRONG = {
    "missing": (
        lambda f: edited(f, lambda t: t.pop("backbone.norm_f.weight")),
        r"1 missing \(backbone.norm_f.weight\)",
    ),
    "extra": (lambda f: edited(f, lambda t: t.update(oops=torch.ones(1))), r"1 unexpected \(oops\)"),
    "shape": (
        lambda f: edited(f, lambda t: t.update({"backbone.norm_f.weight": torch.ones(5)})),
        r"norm_f.weight has shape \(5,\), its config calls for \(24,\)",
    ),
    "head": (lambda f: edited(f, lambda t: t.update({"lm_head.weight": torch.ones(48, 24)})), "lm_head.weight differs"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"0" * 99), "is damaged"),
    "no config": (lambda f: (f / "config.json").unlink(), "does not exist"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "code": (lambda f: _explode(f, zipped=False), "is refused: its pickle"),
    "zipped code": (lambda f: _explode(f, zipped=True), "is refused: its pickle"),
    "other model": (lambda f: configured(f, model_type="gpt2"), "model_type 'gpt2' cannot be converted"),
    "no layout": (lambda f: (f / "config.json").write_text('{"n": 1}'), "neither of the transformers layout"),
    "bias": (lambda f: configured(f, use_bias=True), "use_bias=True cannot be converted"),
    "deeper": (lambda f: configured(f, num_hidden_layers=3), "missing"),
    "text": (lambda f: configured(f, hidden_size="wide"), "hidden_size must be a positive whole number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    folder: Path, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = WRONG[what]
    change(folder)
    with pytest.raises(RecollectError, match=message) as error:
        convert(folder, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["public"]


def test_options_that_the_state_spaces_layout_may_have_and_we_have_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    as_state_spaces(public("mamba2"), "mamba2", source, pickled=False)
    for change, message in (
        ({"rms_norm": False}, "rms_norm=False"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba3' cannot be converted"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
    ):
        kept = (source / "config.json").read_text()
        configured(source, **change)
        with pytest.raises(ConfigError, match=message):
            convert(source, tmp_path / "ours")
        (source / "config.json").write_text(kept)
    convert(source, tmp_path / "ours")


def test_a_place_that_is_taken_is_left_alone(folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "note").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        convert(folder, taken)
    assert [path.name for path in taken.iterdir()] == ["note"]
    with pytest.raises(DataError, match="not a folder with a checkpoint"):
        convert(tmp_path / "nowhere", tmp_path / "ours")


def test_only_what_transformers_can_build_is_exported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a model of recollect"):
        export(folder, tmp_path / "back")
    convert(folder, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["layers"][1]["d_state"] = 9
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="layers of 2 configs"):
        export(tmp_path / "ours", tmp_path / "back")


def test_options_of_the_command_line() -> None:
    assert parse_hax([]) == Beside()
    assert parse_hax(["k=64", "pattern=SW+D", "gate=0.5", "planes=fixed"]) == Beside(64, "SW+D", 0.5, "fixed")
    for wrong, message in (("k", "give k=N"), ("keys=3", "give k=N"), ("k=many", "'many' is not a number")):
        with pytest.raises(ConfigError, match=message):
            parse_hax([wrong])
    assert replace(Beside(), n_keys=64) != Beside()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.utils.logging.disable_progress_bar()
