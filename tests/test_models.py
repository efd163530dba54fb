"""Language model, latents, and configs that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recollect.core.errors import ConfigError
from recollect.core.layer import LayerConfig
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.s5 import S5
from recollect.models import latent
from recollect.models.backbone import Backbone
from recollect.models.language_model import LanguageModel
from recollect.models.latent import LatentConfig
from recollect.models.vision import Pixels

LAYERS: dict[str, LayerConfig] = {
    "gru": GRU.Config.tiny(),
    "attention": Attention.Config.tiny(),
    "s5": S5.Config.tiny(),
    "hax": HAX.Config.tiny(),
}


def backbone(kind: str = "gru") -> Backbone.Config:
    layer = LAYERS[kind]
    return Backbone.Config.alternating(layer.d_model, (layer, layer), mlp_expand=1.0)


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
        u = torch.rand(20_000, 3, 1, generator=torch.Generator().manual_seed(0))
        drawn = latent.draw(log_p.expand(20_000, -1, -1), u)
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
