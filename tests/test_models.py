"""Backbones' models: language model, latents, vision, world model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.core.state import index_batch
from recollect.envs import DistractingMemory
from recollect.envs.tiles import N_FLOOR_CODES, render
from recollect.eval.imagination import dream
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.models import latent
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.models.latent import LatentConfig
from recollect.models.vision import Pixels, Tiles, VisionConfig
from recollect.models.world_model import Batch, WorldModel

LAYERS: dict[str, LayerConfig] = {
    "gru": GRU.Config.tiny(),
    "attention": Attention.Config.tiny(),
    "s5": S5.Config.tiny(),
    "hax": HAX.Config.tiny(),
}


def backbone(kind: str = "gru") -> Backbone.Config:
    layer = LAYERS[kind]
    return Backbone.Config.alternating(layer.d_model, (layer, layer), mlp_expand=1.0)


def world_model(kind: str = "gru", vision: VisionConfig | None = None, **changes: Any) -> WorldModel:
    torch.manual_seed(0)
    config = WorldModel.Config(
        n_actions=3,
        backbone=backbone(kind),
        vision=vision or Tiles(n_codes=N_FLOOR_CODES, hidden=32),
        latent=LatentConfig(groups=4, classes=8),
        hidden=32,
        **changes,
    )
    return WorldModel(config).double()


def episodes(n: int = 2, *, pixels: bool = False, seed: int = 0) -> Batch:
    made = DistractingMemory.Config(width=11).generate(np.random.default_rng(seed), n)
    action = np.eye(3)[made["action"]] * ~made["is_first"][..., None]
    seen = render(made["tiles"]) if pixels else made["tiles"]
    fields = (seen, action, made["reward"].astype(np.float64), made["is_first"])
    return Batch(*(torch.from_numpy(f) for f in fields))


def cut(batch: Batch, begin: int, stop: int) -> Batch:
    return Batch(*(field[:, begin:stop] for field in batch))


class TestLanguageModel:
    def test_steps_give_the_logits_of_the_parallel_form(self) -> None:
        torch.manual_seed(0)
        model = LanguageModel(LanguageModel.Config(17, backbone("hax"))).double().eval()
        tokens = torch.randint(17, (2, 30))
        wanted, _ = model(tokens)
        state = model.backbone.init_state(2)
        for t, token in enumerate(tokens.unbind(1)):
            logits, state = model.step(token, state)
            torch.testing.assert_close(logits, wanted[:, t], rtol=0, atol=1e-10)

    def test_generation_continues_with_the_most_probable_token(self) -> None:
        torch.manual_seed(0)
        model = LanguageModel(LanguageModel.Config(17, backbone("hax"))).double().eval()
        prompt = torch.randint(17, (2, 9))
        written = model.generate(prompt, 6)
        assert torch.equal(written[:, :9], prompt)
        for t in range(9, 15):
            logits, _ = model(written[:, :t])
            assert torch.equal(written[:, t], logits[:, -1].argmax(-1))
        one = model.generate(prompt, 6, temperature=1.0, generator=torch.Generator().manual_seed(3))
        two = model.generate(prompt, 6, temperature=1.0, generator=torch.Generator().manual_seed(3))
        assert torch.equal(one, two)
        assert not torch.equal(one, written)

    def test_loss_reads_the_mask_and_nothing_else(self) -> None:
        torch.manual_seed(0)
        model = LanguageModel(LanguageModel.Config(17, backbone(), aux_weight=0.0)).double()
        tokens, labels = torch.randint(17, (2, 20)), torch.randint(17, (2, 20))
        mask = torch.rand(2, 20) < 0.3
        loss, metrics = model.loss(tokens, labels, mask)
        logits, _ = model(tokens)
        by_hand = -torch.log_softmax(logits, -1)[mask].gather(-1, labels[mask][:, None]).mean()
        torch.testing.assert_close(loss, by_hand)
        torch.testing.assert_close(metrics["cross_entropy"], by_hand.detach())
        changed, _ = model.loss(tokens, torch.where(mask, labels, 0), mask)
        assert changed == loss

    def test_layers_own_losses_are_weighted_in(self) -> None:
        torch.manual_seed(0)
        tokens, labels, mask = torch.randint(17, (2, 20)), torch.randint(17, (2, 20)), torch.ones(2, 20).bool()
        model = LanguageModel(LanguageModel.Config(17, backbone("hax"), aux_weight=0.5)).train()
        loss, metrics = model.loss(tokens, labels, mask)
        torch.testing.assert_close(loss.detach(), metrics["cross_entropy"] + 0.5 * metrics["selection"])
        loss.backward()
        # A loss of score differences has no gradient for the scorer's last bias.
        scorers = [p.grad for name, p in model.named_parameters() if "scorer" in name and name.endswith("weight")]
        assert len(scorers) == 6
        assert all(g is not None and g.abs().sum() > 1e-4 for g in scorers)


class TestLatent:
    config = LatentConfig(groups=3, classes=5, unimix=0.1)

    def test_unimix_bounds_every_probability_from_below(self) -> None:
        p = latent.log_probabilities(torch.randn(4, 15) * 50, self.config).exp()
        assert p.min() >= 0.1 / 5 * 0.999
        torch.testing.assert_close(p.sum(-1), torch.ones(4, 3))

    def test_samples_follow_the_probabilities_and_gradients_are_straight_through(self) -> None:
        logits = torch.tensor([[2.0, 0.0, -1.0, 0.5, 0.0] * 3]).requires_grad_()
        log_p = latent.log_probabilities(logits, self.config)
        drawn = latent.sample(log_p.expand(20_000, -1, -1), torch.Generator().manual_seed(0))
        assert set(drawn.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
        frequency = drawn.detach().unflatten(-1, (3, 5)).mean(0)
        torch.testing.assert_close(frequency, log_p.exp()[0].detach(), rtol=0, atol=0.015)
        weight = torch.randn(15)
        (through,) = torch.autograd.grad((drawn[0] * weight).sum(), logits, retain_graph=True)
        (direct,) = torch.autograd.grad((log_p.exp().flatten() * weight).sum(), logits)
        torch.testing.assert_close(through, direct)

    def test_kl_is_zero_for_equals_and_balanced_as_written(self) -> None:
        log_q = latent.log_probabilities(torch.randn(7, 15), self.config).requires_grad_()
        log_p = latent.log_probabilities(torch.randn(7, 15), self.config).requires_grad_()
        assert latent.kl_divergence(log_q, log_q).abs().max() < 1e-6
        kl = latent.kl_divergence(log_q, log_p)
        torch.testing.assert_close(latent.balanced_kl(log_q, log_p, 0.8, 0.0), kl)
        assert (latent.balanced_kl(log_q, log_p, 0.8, 1e3) == 1e3).all()
        to_q, to_p = torch.autograd.grad(latent.balanced_kl(log_q, log_p, 0.8, 0.0).sum(), (log_q, log_p))
        whole_q, whole_p = torch.autograd.grad(kl.sum(), (log_q, log_p))
        torch.testing.assert_close(to_p, 0.8 * whole_p)
        torch.testing.assert_close(to_q, 0.2 * whole_q)

    def test_impossible_sizes_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="classes >= 2"):
            LatentConfig(groups=2, classes=1)


VISIONS: dict[str, VisionConfig] = {
    "tiles": Tiles(n_codes=N_FLOOR_CODES, hidden=16),
    "pixels": Pixels(size=40, depth=4),
}


@pytest.mark.parametrize("name", VISIONS)
def test_decoders_return_observations_and_score_the_truth_best(name: str) -> None:
    vision = VISIONS[name]
    batch = episodes(pixels=name == "pixels")
    frames = batch.observation.flatten(0, 1)[:6]
    encoder, features = vision.encoder()
    assert encoder(frames).shape == (6, features)
    decoder = vision.decoder(10)
    prediction = decoder(torch.randn(6, 10))
    seen = decoder.observation(prediction)
    assert seen.shape == frames.shape
    assert seen.dtype == frames.dtype
    assert decoder.loss(prediction, frames).shape == (6,)
    assert (decoder.loss(prediction, seen) <= decoder.loss(prediction, frames)).all()


def test_pixel_loss_is_the_squared_error_summed_over_a_frame() -> None:
    decoder = Pixels(size=40, depth=4).decoder(10)
    prediction = torch.zeros(1, 40, 40, 3)
    truth = torch.full((1, 40, 40, 3), 51, dtype=torch.uint8)
    torch.testing.assert_close(decoder.loss(prediction, truth), torch.tensor([4800 * 0.04]))


@pytest.mark.parametrize("kind", LAYERS)
class TestWorldModel:
    def test_observing_in_parallel_equals_filtering_frame_by_frame(self, kind: str) -> None:
        model, batch = world_model(kind).eval(), episodes()
        whole = model.observe(batch)
        state, parts = model.init_state(2), []
        for t in range(batch.reward.shape[1]):
            seen = model.observe(cut(batch, t, t + 1), state)
            state = seen.state
            parts.append(seen)
        for name in ("h", "z", "log_q", "log_p"):
            stepped = torch.cat([getattr(p, name) for p in parts], 1)
            torch.testing.assert_close(stepped, getattr(whole, name), rtol=0, atol=1e-10)
        torch.testing.assert_close(state.h, whole.state.h, rtol=0, atol=1e-10)

    def test_episodes_packed_in_one_row_do_not_see_each_other(self, kind: str) -> None:
        model, batch = world_model(kind).eval(), episodes()
        packed = Batch(*(torch.cat([field[:1], field[1:]], 1) for field in batch))
        torch.testing.assert_close(
            model.observe(packed).h.view_as(model.observe(batch).h), model.observe(batch).h, rtol=0, atol=1e-10
        )

    def test_imagination_reads_no_future_frame(self, kind: str) -> None:
        """Frames after the context are corrupted; the dream does not change in a single bit."""
        model, batch = world_model(kind).float().eval(), episodes()
        context = DistractingMemory.Config(width=11).context_length
        batch = Batch(batch.observation, batch.action.float(), batch.reward.float(), batch.is_first)
        spoiled = batch.observation.clone()
        spoiled[:, context:] = N_FLOOR_CODES - 1 - spoiled[:, context:]
        clean = dream(model, batch, context, torch.Generator().manual_seed(0))
        other = dream(model, batch._replace(observation=spoiled), context, torch.Generator().manual_seed(0))
        # The dream samples after the whole episode was inferred, so both consume the same random numbers.
        assert np.array_equal(clean.imagined, other.imagined)
        assert np.array_equal(clean.reward_imagined, other.reward_imagined)
        assert not np.array_equal(clean.truth, other.truth)

    def test_imagining_with_the_posterior_mode_equals_observing(self, kind: str) -> None:
        """With a prior that equals the posterior, single steps and parallel observation are the same computation."""
        model, batch = world_model(kind).eval(), episodes()
        whole = model.observe(batch)
        state = model.observe(cut(batch, 0, 10)).state
        for t in range(10, 20):
            ahead = model.imagine(state, batch.action[:, t : t + 1])
            torch.testing.assert_close(ahead.h[:, 0], whole.h[:, t], rtol=0, atol=1e-10)
            state = ahead.state._replace(z=whole.z[:, t])

    def test_many_samples_of_one_context(self, kind: str) -> None:
        model, batch = world_model(kind).eval(), episodes()
        state = model.observe(batch).state
        many = index_batch(state, torch.tensor([0, 0, 1]))
        ahead = model.imagine(many, batch.action[[0, 0, 1], :5])
        assert torch.equal(ahead.h[0], ahead.h[1])
        assert not torch.equal(ahead.h[0], ahead.h[2])
        sampled = model.imagine(many, batch.action[[0, 0, 1], :5], generator=torch.Generator().manual_seed(0))
        assert not torch.equal(sampled.z[0], sampled.z[1])


def test_first_steps_carry_no_loss() -> None:
    model, batch = world_model(reward_weight=1.0), episodes()
    spoiled = batch.reward.clone()
    spoiled[:, 0] = 1.0
    one, _ = model.loss(batch, torch.Generator().manual_seed(0))
    two, _ = model.loss(batch._replace(reward=spoiled), torch.Generator().manual_seed(0))
    assert one == two
    spoiled[:, 1] = 1.0
    three, _ = model.loss(batch._replace(reward=spoiled), torch.Generator().manual_seed(0))
    assert three != one


def test_a_policy_dreams_and_needs_a_horizon() -> None:
    model, batch = world_model().eval(), episodes()
    state = model.observe(batch).state

    def forward_only(h: Tensor, z: Tensor) -> Tensor:
        assert h.shape == (2, 8)
        assert z.shape == (2, 32)
        return torch.tensor([[0.0, 0.0, 1.0]] * 2, dtype=h.dtype)

    ahead = model.imagine(state, forward_only, 4)
    assert ahead.observation.shape == (2, 4, 5, 5)
    assert (ahead.actions[..., 2] == 1).all()
    with pytest.raises(ConfigError, match="needs a horizon"):
        model.imagine(state, forward_only)


def test_one_episode_can_be_learned_by_heart() -> None:
    """Overfitting one batch drives the image loss down and gets the reward right: every part reaches the model."""
    model, batch = world_model("s5", kl_weight=0.1, reward_weight=10.0).float().train(), episodes(2, seed=1)
    batch = Batch(batch.observation, batch.action.float(), batch.reward.float(), batch.is_first)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = last = torch.inf
    for step in range(300):
        loss, metrics = model.loss(batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = metrics["image"].item() if step == 0 else first
        last = metrics["image"].item()
    assert first > 40
    assert last < first / 10
    seen = model.observe(batch)
    assert torch.equal(model.reward(seen.h, seen.z)[:, -1] > 0.5, batch.reward[:, -1] > 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Backbone.Config(8), "layers is empty"),
        (lambda: Backbone.Config(8, layers=(GRU.Config(6),)), r"layers.0.d_model 6 must equal d_model 8"),
        (lambda: HAX.Config(8, mixer=GRU.Config(6)), "mixer.d_model 6 must equal d_model 8"),
        (lambda: HAX.Config(8, mixer=Attention.Config.tiny()), "use arrangement=sequence"),
        (lambda: HAX.Config(8, mixer=Mamba2.Config.tiny(), patterns=()), "at least one pattern"),
        (lambda: HAX.Config(8, mixer=Mamba2.Config.tiny(), n_heads=3), "not divisible by n_heads 3"),
        (lambda: Attention.Config(10, n_heads=3), "d_model 10 is not divisible by n_heads 3"),
        (lambda: Attention.Config(6, n_heads=2), "even head width"),
        (lambda: Attention.Config(8, window=0), "window must be at least 1"),
        (lambda: Pixels(size=50), "use 40 or 64"),
    ],
)
def test_configs_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
