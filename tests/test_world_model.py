"""World models: what they see, that every dynamics observes and imagines alike, and what their loss counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError, DataError
from recollect.core.state import index_batch, nbytes
from recollect.envs import DistractingMemory
from recollect.envs.tiles import N_FLOOR_CODES, render
from recollect.eval.imagination import dream
from recollect.models.dense import dense, init_weights
from recollect.models.in_chunks import in_chunks
from recollect.models.vision import Pixels, Tiles, VisionConfig
from recollect.models.world_model import Batch, WorldModel
from small_worlds import DYNAMICS


def world_model(kind: str = "gru", vision: VisionConfig | None = None, **changes: Any) -> WorldModel:
    torch.manual_seed(0)
    vision = vision or Tiles(n_codes=N_FLOOR_CODES, hidden=32)
    model = WorldModel(WorldModel.Config(3, DYNAMICS[kind], vision, hidden=32, **changes)).double()
    for head in (model.reward_head, model.continue_head):
        init_weights(head[-1])  # else both say 1/2 of everything
    return model


def episodes(n: int = 2, *, pixels: bool = False, seed: int = 0) -> Batch:
    made = DistractingMemory.Config(width=11).generate(np.random.default_rng(seed), n)
    action = np.eye(3)[made["action"]] * ~made["is_first"][..., None]
    seen = render(made["tiles"]) if pixels else made["tiles"]
    fields = (seen, action, made["reward"].astype(np.float64), made["is_first"], made["is_terminal"])
    return Batch(*(torch.from_numpy(f) for f in fields))


def cut(batch: Batch, begin: int, stop: int) -> Batch:
    return Batch(*(part[:, begin:stop] for part in batch.tensors))


def single(batch: Batch) -> Batch:
    return batch._replace(action=batch.action.float(), reward=batch.reward.float())


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


def test_tiles_are_encoded_as_one_hot_codes() -> None:
    vision = Tiles(rows=2, columns=3, n_codes=4, hidden=8)
    encoder, _ = vision.encoder()
    codes = torch.randint(0, 4, (5, 2, 3), dtype=torch.uint8)
    linear, *rest = encoder.get_submodule("net").children()
    expected = linear(torch.nn.functional.one_hot(codes.long(), 4).flatten(1).float())
    for module in rest:
        expected = module(expected)
    torch.testing.assert_close(encoder(codes), expected)


def test_pixel_loss_is_the_squared_error_summed_over_a_frame() -> None:
    decoder = Pixels(size=40, depth=4).decoder(10)
    prediction = torch.zeros(1, 40, 40, 3)
    truth = torch.full((1, 40, 40, 3), 51, dtype=torch.uint8)
    torch.testing.assert_close(decoder.loss(prediction, truth), torch.tensor([4800 * 0.04]))


@pytest.mark.parametrize("kind", DYNAMICS)
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
        packed = Batch(*(torch.cat([part[:1], part[1:]], 1) for part in batch.tensors))
        torch.testing.assert_close(
            model.observe(packed).h.view_as(model.observe(batch).h), model.observe(batch).h, rtol=0, atol=1e-10
        )

    def test_imagination_reads_no_future_frame(self, kind: str) -> None:
        """Frames after the context are corrupted; the dream does not change in a single bit."""
        model, batch = world_model(kind).float().eval(), episodes()
        context = DistractingMemory.Config(width=11).context_length
        batch = single(batch)
        spoiled = batch.observation.clone()
        spoiled[:, context:] = N_FLOOR_CODES - 1 - spoiled[:, context:]
        clean = dream(model, batch, context, torch.Generator().manual_seed(0))
        other = dream(model, batch._replace(observation=spoiled), context, torch.Generator().manual_seed(0))
        # The dream samples after the whole episode was inferred, so both consume the same random numbers.
        assert np.array_equal(clean.imagined, other.imagined)
        assert np.array_equal(clean.scores.reward_imagined, other.scores.reward_imagined)
        assert not np.array_equal(clean.truth_pictures, other.truth_pictures)

    def test_surprise_is_what_the_loss_pays_for(self, kind: str) -> None:
        model, batch = world_model(kind).eval(), episodes()
        context = DistractingMemory.Config(width=11).context_length
        scores = dream(model, batch, context, torch.Generator().manual_seed(0)).scores
        _, parts = model.loss(batch, torch.Generator().manual_seed(0))
        assert scores.surprise.shape == scores.reconstruction.shape
        assert scores.surprise.mean() == pytest.approx(float(parts["kl"]))

    def test_the_mean_of_all_dreams_is_judged_by_two(self, kind: str) -> None:
        model, batch = world_model(kind).float().eval(), single(episodes())
        context = DistractingMemory.Config(width=11).context_length
        alone = dream(model, batch, context, torch.Generator().manual_seed(0))
        assert alone.scores.expectation.shape == (2, 0)
        assert "expectation_mse" not in alone.scores.errors(1)
        pictures, found = [], []
        generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
        for i in range(40):
            one = dream(model, batch, context, *generators)
            pictures.append(one.imagined_pictures / 255.0)
            found.append(one.scores.expectation)
            assert i or np.array_equal(one.imagined, alone.imagined), "the first dream is the same"
        truth = alone.truth_pictures / 255.0
        mean = np.mean(pictures, 0)
        spread = np.square(np.array(pictures) - mean).sum((2 + 1, 4, 5)).sum(0) / 39
        exact = np.square(mean - truth).sum((2, 3, 4)) - spread / 40
        assert spread.mean() > 100, "its dreams differ"
        error = np.std(found, 0).mean() / 40**0.5
        assert abs((np.mean(found, 0) - exact).mean()) < 4 * error < 0.2 * exact.mean()

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


def test_the_error_of_pictures_weighs_what_it_is_told_to() -> None:
    batch = episodes()
    losses = [world_model(image_weight=w).loss(batch, torch.Generator().manual_seed(0)) for w in (1.0, 5.0)]
    (one, parts), (five, same) = losses
    torch.testing.assert_close(five - one, 4 * parts["image"])
    assert parts["image"] == same["image"], "what is reported is the error itself"


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


@pytest.mark.parametrize("kind", ["s5", "rssm"])
def test_one_episode_can_be_learned_by_heart(kind: str) -> None:
    """Overfitting one batch drives the image loss down and gets the reward right: every part reaches the model."""
    model, batch = world_model(kind, kl_weight=0.1, reward_weight=10.0).float().train(), episodes(2, seed=1)
    batch = single(batch)
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
    assert torch.equal(model.goes_on(seen.h, seen.z)[:, -1] < 0.5, batch.is_terminal[:, -1])


@pytest.mark.parametrize("kind", ["chunked", "rssm-chunked"])
def test_chunks_cut_gradients_and_nothing_else(kind: str) -> None:
    """With chunks of 7 steps, nothing of step 7 or later reaches tokens before it; without them, it does."""
    whole = {"chunked": "gru", "rssm-chunked": "rssm"}[kind]
    batch = episodes()

    def reach(name: str) -> tuple[Tensor, Tensor]:
        model = world_model(name)
        action = batch.action.clone().requires_grad_()
        seen = model.observe(batch._replace(action=action))
        (gradient,) = torch.autograd.grad(seen.h[:, 7:].sum(), action)
        return seen.h, gradient.abs().sum((0, 2))

    h, cut_off = reach(kind)
    uncut, reaching = reach(whole)
    torch.testing.assert_close(h, uncut, rtol=0, atol=1e-12)
    assert (cut_off[:7] == 0).all()
    assert (cut_off[7:] > 0).all()
    assert (reaching[1:7] > 0).all()


@pytest.mark.parametrize("kind", DYNAMICS)
def test_a_state_holds_what_is_declared(kind: str) -> None:
    model, batch = world_model(kind).float(), single(episodes())
    state = model.observe(batch).state
    held = nbytes(state.inner) + nbytes(state.z)
    assert held == DYNAMICS[kind].state_bytes(2, seen=batch.reward.shape[1])


@pytest.mark.parametrize("name", VISIONS)
def test_few_frames_at_once_give_the_same_loss_and_gradients(name: str) -> None:
    batch = episodes(pixels=name == "pixels")
    found = []
    for frames_at_once in (4096, 5):
        model = world_model("s5", VISIONS[name], frames_at_once=frames_at_once)
        loss, _ = model.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        seen = model.observe(batch)
        found[-1][1].append(model.reconstruct(seen.h, seen.z).double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_chunked_rows_are_computed_again_and_not_kept() -> None:
    calls: list[int] = []

    def square(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.square()

    x = torch.arange(7.0, requires_grad=True)
    y = in_chunks(square, 3, x)
    y.sum().backward()
    assert calls == [3, 3, 1, 1, 3, 3]
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_weights_start_as_dreamers() -> None:
    """Variance 1 / mean fan, cut at two deviations of the uncut normal; heads of rewards start at zero."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 500)
    init_weights(layer)
    assert layer.weight.std().item() == pytest.approx((1 / 400) ** 0.5, rel=0.01)
    assert layer.weight.abs().max().item() <= 2 * (1 / 400) ** 0.5 / 0.8796 * 1.001
    convolution = torch.nn.Conv2d(30, 50, 4)
    init_weights(convolution)
    assert convolution.weight.std().item() == pytest.approx((1 / (16 * 40)) ** 0.5, rel=0.02)
    assert (dense(9, 8, 3, 2, out_scale=0)(torch.randn(4, 9)) == 0).all()


BAD: dict[str, tuple[Any, str]] = {
    "size": (lambda b: b._replace(observation=b.observation[..., :4]), r"made for .* shape \(5, 5\), got \(5, 4\)"),
    "actions": (lambda b: b._replace(action=b.action[..., :2]), "made for 3 actions, got actions 2 wide"),
    "codes": (lambda b: b._replace(observation=b.observation + 100), "made for tile codes below 26, got 125"),
    "floats": (lambda b: b._replace(observation=b.observation * torch.nan), "must be uint8, got torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_model_was_not_made_for_is_refused(name: str) -> None:
    spoil, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        world_model().observe(spoil(episodes()))


def test_episodes_that_end_with_their_context_are_refused() -> None:
    with pytest.raises(DataError, match=r"episodes of 27 frames are too short .* a context of 27"):
        dream(world_model(), episodes(), 27, torch.Generator())
