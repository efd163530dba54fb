"""Our layers as a language model of transformers: caches, padding, packing, saving, training."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.hf import RecollectConfig, RecollectForCausalLM
from recollect.hf.cache import StateLayer, state_bytes
from recollect.hf.modeling import KEPT_IN_FP32
from recollect.layers import LAYERS
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.ops.patterns import KeySelection, Lsh

WIDTH, VOCAB = 16, 40
MAMBA2 = Mamba2.Config(WIDTH, d_state=8, d_head=8, chunk_size=16)
HAXED = HAX.Config(WIDTH, mixer=MAMBA2, patterns=(Lsh(4, n_bits=2), KeySelection(3)), d_key=4)
STACKS: dict[str, tuple[LayerConfig, ...]] = {
    "mamba": (Mamba.Config(WIDTH, d_state=4), Mamba.Config(WIDTH, d_state=4)),
    "mamba2": (MAMBA2, MAMBA2),
    "hax": (HAXED, HAXED),
    "mixed": (MAMBA2, HAXED, S5.Config(WIDTH)),
}


def build(name: str, **more: Any) -> RecollectForCausalLM:
    torch.manual_seed(0)
    config = RecollectConfig.of(STACKS[name], VOCAB, eos_token_id=None, **more)
    model = RecollectForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.backbone.layers:
            # So much that layers outweigh the token itself, or every continuation repeats its last token.
            block.norm.weight.fill_(4)
    return model


def prompt(rows: int = 3, length: int = 13) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    importlib.import_module("transformers").utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_pieces_and_single_tokens_give_the_logits_of_the_whole(name: str) -> None:
    model, tokens = build(name), prompt()
    whole = model(tokens).logits
    cache, found, at = None, [], 0
    for n in (5, 1, 4, 1, 1, 1):
        out = model(tokens[:, at : at + n], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + n
        found.append(out.logits)
        assert cache.get_seq_length() == at
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("name", STACKS)
def test_generation_is_the_same_with_the_cache_and_without(name: str, how: dict[str, Any]) -> None:
    model, tokens, found = build(name), prompt(), []
    for use_cache in (True, False):
        if not use_cache:
            how = {key: value for key, value in how.items() if key != "prefill_chunk_size"}
        torch.manual_seed(3)
        options = {"do_sample": False, **how}
        found.append(model.generate(tokens, max_new_tokens=12, pad_token_id=0, use_cache=use_cache, **options))
    assert found[0].tolist() == found[1].tolist()
    assert found[0].shape == (3, 25)
    assert len(set(found[0][:, 13:].flatten().tolist())) > 3, "a model that repeats itself would agree with anything"


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("name", STACKS)
def test_a_batch_padded_on_the_left_is_each_row_alone(name: str, how: dict[str, Any]) -> None:
    model, tokens = build(name), prompt()
    lengths = (13, 6, 9)
    padded = torch.zeros_like(tokens)
    mask = torch.zeros_like(tokens)
    for i, n in enumerate(lengths):
        padded[i, 13 - n :], mask[i, 13 - n :] = tokens[i, :n], 1
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    together = model.generate(padded, attention_mask=mask, **options)
    for i, n in enumerate(lengths):
        alone = model.generate(tokens[i : i + 1, :n], **options)
        assert together[i, 13:].tolist() == alone[0, n:].tolist()


@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model, tokens = build(name), prompt(1, 14)
    begins = torch.zeros(1, 14, dtype=torch.bool)
    begins[0, [0, 6]] = True
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    alone = torch.cat([model(tokens[:, :6]).logits, model(tokens[:, 6:]).logits], 1)
    for packed in (model(tokens, reset=begins), model(tokens, position_ids=positions)):
        torch.testing.assert_close(packed.logits, alone, rtol=1e-4, atol=1e-4)
    assert (model(tokens).logits[:, 6:] - alone[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_model(name: str, tied: bool, tmp_path: Path) -> None:
    model, tokens = build(name, tie_word_embeddings=tied), prompt()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_configs() == STACKS[name]
    for more in ({}, {"trust_remote_code": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **more)
        assert isinstance(loaded, RecollectForCausalLM)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied


def test_a_process_that_never_heard_of_recollect_loads_it(tmp_path: Path) -> None:
    """As lm-eval does: transformers alone, with ``trust_remote_code``."""
    build("hax").save_pretrained(tmp_path / "model")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True); print(type(m).__name__)"
    )
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "RecollectForCausalLM", done.stderr


@torch.no_grad()
def test_what_a_checkpoint_lacks_begins_as_a_fresh_layer(tmp_path: Path) -> None:
    """A HAX loaded from weights without its attention: decays are kept, planes drawn, nothing left as memory was."""
    torch.manual_seed(5)
    model = build("hax")
    state = {key: value for key, value in model.state_dict().items() if ".attention." not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    transformers_log = importlib.import_module("transformers").utils.logging
    transformers_log.set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    transformers_log.set_verbosity_warning()
    for block, own in zip(loaded.backbone.layers, model.backbone.layers, strict=True):
        assert torch.equal(block.mixer.mixer.A_log, own.mixer.mixer.A_log)
        planes = block.mixer.attention.planes
        assert torch.isfinite(planes).all()
        assert planes.std() > 0.3
        assert 0.1 < block.mixer.attention.to_qk.weight.std() < 1


def test_the_loss_has_the_layers_own_losses_in_it() -> None:
    model, tokens = build("hax").train(), prompt()
    torch.manual_seed(0)
    out = model(tokens, labels=tokens)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert out.aux["selection"] > 0
    expected = plain + model.config.aux_loss_weight * out.aux["selection"]
    torch.testing.assert_close(out.loss, expected)
    assert model.eval()(tokens, labels=tokens).aux is None


def recompute_activations(model: RecollectForCausalLM, *options: Any) -> None:
    """By the name that this release of transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(*options)


@pytest.mark.parametrize("name", STACKS)
def test_recomputing_activations_leaves_the_gradients(name: str) -> None:
    """Those of the layers' own losses too, which reentrant recomputation would lose if they came in a mapping."""
    model, tokens, found = build(name).train(), prompt(), []
    for recompute in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if recompute:
            recompute_activations(model, recompute)
        model.zero_grad()
        torch.manual_seed(0)
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, *again = found
    for gradients in again:
        assert gradients.keys() == plain.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[parameter])


def test_recomputing_is_refused_where_planes_are_redrawn() -> None:
    redrawn = HAX.Config(WIDTH, mixer=MAMBA2, patterns=(Lsh(4, n_bits=2),), d_key=4, planes="redrawn")
    model = RecollectForCausalLM(RecollectConfig.of([redrawn], VOCAB))
    with pytest.raises(ConfigError, match="planes=redrawn of layers"):
        recompute_activations(model)


@torch.no_grad()
def test_in_bfloat16_decays_and_the_residual_stay_in_float32(tmp_path: Path) -> None:
    build("mamba").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)
    states = model(prompt(), output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert states[1].dtype == torch.float32
    reference = build("mamba")(prompt()).logits
    assert (model(prompt()).logits - reference).abs().max() / reference.abs().max() < 0.05


@pytest.mark.parametrize("name", STACKS)
def test_what_stays_in_float32_is_in_the_model(name: str, tmp_path: Path) -> None:
    """Of the names that are kept, those and only those that the layers have."""
    build(name).save_pretrained(tmp_path)
    for loader in (AutoModel, AutoModelForCausalLM):
        model = loader.from_pretrained(tmp_path, dtype=torch.bfloat16)
        kept = {n for n in KEPT_IN_FP32 if any(f".{parameter}".endswith(f".{n}") for parameter in model.state_dict())}
        assert model._keep_in_fp32_modules_strict == kept != set()
        for parameter, tensor in model.named_parameters():
            assert (tensor.dtype == torch.float32) == parameter.endswith(KEPT_IN_FP32), parameter


@torch.no_grad()
def test_the_state_is_as_large_as_declared_and_does_not_grow() -> None:
    model, cache, sizes = build("hax"), None, []
    for n in (20, 60):
        cache = model(prompt(2, n), past_key_values=cache, use_cache=True).past_key_values
        sizes.append(state_bytes(cache))
    assert sizes[0] == sizes[1] == sum(layer.state_bytes(2) for layer in STACKS["hax"])


@torch.no_grad()
def test_an_empty_cache_made_without_the_config_is_filled_with_states() -> None:
    model, tokens, cache = build("mixed"), prompt(), DynamicCache()
    model(tokens[:, :-1], past_key_values=cache, use_cache=True)
    assert [type(layer) for layer in cache.layers] == [StateLayer] * model.config.num_hidden_layers
    again = model(tokens[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens).logits[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_repeated_and_forgotten() -> None:
    model, tokens = build("mixed"), prompt()
    cache = model(tokens[:, :-1], use_cache=True).past_key_values
    wanted = model(tokens).logits[:, -1:]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    order = torch.tensor([2, 0, 0])
    out = model(tokens[order, -1:], past_key_values=cache)
    torch.testing.assert_close(out.logits, wanted[order], rtol=1e-4, atol=1e-4)
    cache.batch_repeat_interleave(2)
    assert {layer.batch_size for layer in cache.layers} == {6}
    cache.batch_select_indices(torch.tensor([True, False, True, False, True, False]))
    assert {layer.batch_size for layer in cache.layers} == {3}
    cache.reset()
    assert (cache.get_seq_length(), cache.layers[0].batch_size) == (0, -1)
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits[:, -1:], wanted, rtol=1e-4, atol=1e-4)


def test_one_batch_is_learned_by_heart() -> None:
    model, tokens = build("hax").train(), prompt()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_every_layer_of_the_table_makes_a_model() -> None:
    for kind, layer in LAYERS.items():
        config = layer.Config.tiny()
        model = RecollectForCausalLM(RecollectConfig.of([config], VOCAB)).eval()
        with torch.no_grad():
            out = model(prompt(2, 5), use_cache=True)
            one = model(prompt(2, 1), past_key_values=out.past_key_values)
        assert torch.isfinite(one.logits).all(), kind


def test_wrong_inputs_are_told_of() -> None:
    model = build("mamba2")
    of_attention = DynamicCache()
    of_attention.update(torch.zeros(3, 1, 4, 2), torch.zeros(3, 1, 4, 2), 0)
    of_more_layers = model(prompt(), use_cache=True).past_key_values
    of_more_layers.layers.append(StateLayer())
    for cache in (of_attention, of_more_layers):
        with pytest.raises(ConfigError, match="DynamicCache"):
            model(prompt(), past_key_values=cache)
    with pytest.raises(ConfigError, match="different d_model"):
        RecollectConfig.of([MAMBA2, Mamba2.Config(32)], VOCAB)
    with pytest.raises(Exception, match="unknown key 'd_stat'"):
        RecollectConfig(layers=[{"kind": "mamba2", "d_model": 8, "d_stat": 4}])
    with pytest.raises(ConfigError, match="its model alone"):
        StateLayer().update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ConfigError, match="cannot be cropped"):
        StateLayer().crop(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(prompt())
