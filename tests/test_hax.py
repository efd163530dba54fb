"""HAX's choices: what each option does, what its loss prefers, and where gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.core.layer import BranchedConfig
from recollect.core.state import nbytes
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.sparse import SparseAttention
from recollect.ops.patterns import (
    Full,
    KeySelection,
    Lsh,
    Sink,
    Window,
    key_budget,
    memory_slots,
)
from recollect.ops.selection import selection_divergence
from recollect.train.recall import RecallConfig
from small_attention import double, gradients, sparse

HAX_PATTERNS = (Lsh(4, n_bits=2), KeySelection(4))


# Key selection


def used_keys(length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Every query asks along one direction, and keys lie along it by their strength."""
    strength = double(1, length, 1, seed=3)
    direction = F.normalize(double(4, seed=4), dim=0)
    return direction.expand(1, length, 1, 4), strength[..., None] * direction, strength


def test_the_divergence_is_least_at_scores_that_tell_the_attention() -> None:
    q, k, strength = used_keys()

    def loss(score: Tensor) -> float:
        return selection_divergence(q, k, score, n=40, scale=2.0).item()

    assert 0 <= loss(2 * strength) < 0.35 * loss(torch.zeros_like(strength)), "2 is the scale of the attention"
    assert loss(torch.zeros_like(strength)) < loss(-2 * strength)
    assert loss(2 * strength + 5) == pytest.approx(loss(2 * strength)), "only differences of scores are taught"


def test_the_divergence_teaches_nothing_where_attention_is_indifferent() -> None:
    """However early a key comes: the plain mean of attention would ask for a preference of the first keys."""
    score = torch.zeros(2, 50, 3, dtype=torch.float64, requires_grad=True)
    loss = selection_divergence(torch.zeros(2, 50, 3, 4).double(), double(2, 50, 3, 4), score, n=50, scale=1.0)
    (gradient,) = torch.autograd.grad(loss, score)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_the_divergence_counts_queries_after_a_key_only() -> None:
    """Queries ask for one direction in the first half and for another in the second."""
    q = torch.zeros(1, 40, 1, 2, dtype=torch.float64)
    q[:, :20, :, 0] = q[:, 20:, :, 1] = 1
    k = torch.eye(2, dtype=torch.float64)[torch.arange(40) % 2][None, :, None]
    late = torch.arange(40) >= 20
    first, second = (torch.where(late, k[0, :, 0, i], 0.0)[None, :, None] for i in (0, 1))
    losses = [selection_divergence(q, k, 3 * score, n=40, scale=3.0) for score in (first, second)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("n", [1, 5])
def test_losses_of_few_samples_and_many_segments_are_finite(n: int) -> None:
    """Most segments hold no sampled query, and some hold one position."""
    q, k, score = double(2, 30, 1, 4), double(2, 30, 1, 4, seed=1), double(2, 30, 1, seed=2).requires_grad_()
    reset = torch.rand(2, 30) < 0.5
    loss = selection_divergence(q, k, score, n=n, scale=1.0, reset=reset)
    (gradient,) = torch.autograd.grad(loss, score)
    assert loss.isfinite()
    assert loss >= 0
    assert gradient.isfinite().all()


def test_a_gate_adds_the_log_of_its_openness_to_the_logits() -> None:
    layer = sparse(patterns=(Full(), KeySelection(3)), selection="gate", project=False, scale=0.6).double().eval()
    with torch.no_grad():
        layer.scorer[-1].weight.mul_(100)
    x = double(2, 30, 8)
    q, k = layer.to_qk(x).unflatten(-1, (2, 4)).unbind(2)
    seen = F.normalize(q.cumsum(1), dim=-1)
    score = layer.scorer(torch.cat([k, seen], -1)).squeeze(-1)
    assert score.std() > 0.5
    logits = 0.6 * q @ k.mT + F.logsigmoid(score)[:, None]
    hidden = torch.ones(30, 30).triu(1).bool()
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ x
    torch.testing.assert_close(layer(x).y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("selection", ["ranking", "kl", "gate", "gate+ranking", "gate+kl"])
def test_gradients_reach_what_they_should_and_nothing_else(selection: str) -> None:
    layer = sparse(patterns=HAX_PATTERNS, planes="learned", selection=selection, learn_scale=True)
    gated = selection.startswith("gate")
    by_model = gradients(layer, lambda out: out.y.square().sum())
    model = {"to_qk", "to_v", "out", "log_scale"} | ({"scorer"} if gated else set())
    assert {name for name, moved in by_model.items() if moved} == model
    by_hash = gradients(layer, lambda out: out.aux["hash"])
    assert {name for name, moved in by_hash.items() if moved} == {"planes"}
    if selection == "gate":
        assert "selection" not in layer.train()(torch.randn(1, 9, 8).double()).aux
    else:
        by_selection = gradients(layer, lambda out: out.aux["selection"])
        assert {name for name, moved in by_selection.items() if moved} == {"scorer"}


@pytest.mark.parametrize("selection", ["gate", "kl"])
def test_a_gate_trains_queries_and_keys_through_the_scores(selection: Any) -> None:
    """Nothing is detached on its path, neither the key nor the sum of queries; the other losses detach both."""
    layer = sparse(patterns=(Full(), KeySelection(4)), selection=selection).double().eval()
    features: list[Tensor] = []
    layer.scorer.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    layer(double(1, 20, 8))
    assert features[0].requires_grad == (selection == "gate")
    if selection == "gate":
        key, queries = (half.square() @ double(4) for half in features[0].split(4, -1))
        for rows, used in (("queries", queries), ("keys", key)):
            (gradient,) = torch.autograd.grad(used.sum(), layer.to_qk.weight, retain_graph=True)
            moved = gradient.abs().amax(-1) > 0
            assert moved.tolist() == [rows == "queries"] * 4 + [rows == "keys"] * 4


def test_training_losses_are_for_training() -> None:
    layer = sparse(patterns=HAX_PATTERNS, planes="learned", selection="gate+kl")
    x = torch.randn(1, 20, 8)
    assert set(layer.train()(x).aux) == {"hash", "selection"}
    assert not layer.eval()(x).aux


# Planes


def test_redrawn_planes_change_with_training_forwards_and_never_in_eval() -> None:
    layer = sparse(patterns=HAX_PATTERNS, planes="redrawn")
    x = torch.randn(2, 30, 8)
    first = layer.eval().current_planes().clone()
    assert torch.equal(first, layer.planes)
    drawn = [first]
    for _ in range(3):
        layer.train()(x)
        drawn.append(layer.current_planes())
        layer.eval()
        assert torch.equal(layer(x).y, layer(x).y)
        assert torch.equal(layer.current_planes(), first)
    for i, one in enumerate(drawn):
        assert one.shape == first.shape
        assert not any(torch.equal(one, other) for other in drawn[:i])
    layer.train()
    _, state = layer.step(x[:, 0], layer.init_state(2))
    layer.step(x[:, 1], state)
    assert torch.equal(layer.current_planes(), drawn[-1]), "steps of one sequence share their planes"


def test_redrawn_planes_use_no_hidden_chance_and_differ_between_layers() -> None:
    layer, other = sparse(patterns=HAX_PATTERNS, planes="redrawn"), sparse(patterns=HAX_PATTERNS, planes="redrawn")
    x = torch.randn(1, 5, 8)
    before = torch.get_rng_state()
    layer.train()(x)
    other.train()(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(layer.current_planes(), other.current_planes())


def test_training_with_redrawn_planes_resumes_bit_for_bit() -> None:
    config = HAX.Config(8, mixer=GRU.Config(8), patterns=HAX_PATTERNS, d_key=4, planes="redrawn")
    batches = torch.randn(8, 2, 40, 8)

    def go_on(layer: HAX, steps: range) -> list[Tensor]:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        losses: list[Tensor] = []
        for step in steps:
            out = layer.train()(batches[step])
            loss = (out.y - 1).square().mean() + out.aux["selection"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    layer = HAX(config)
    go_on(layer, range(4))
    saved = {name: value.clone() for name, value in layer.state_dict().items()}
    whole = go_on(layer, range(4, 8))
    resumed = HAX(config)
    resumed.load_state_dict(saved)
    assert torch.equal(torch.stack(go_on(resumed, range(4, 8))), torch.stack(whole))
    layer.load_state_dict(saved)
    assert torch.equal(torch.stack(go_on(layer, range(4, 8))), torch.stack(whole)), "what it had drawn is forgotten"
    stale = HAX(config)
    stale.load_state_dict(saved | {"attention.plane_draws": torch.tensor(0)})
    assert not torch.equal(torch.stack(go_on(stale, range(4, 8))), torch.stack(whole)), "the counter matters"


# Queries and keys


def test_shared_queries_and_keys_are_one_vector() -> None:
    layer = sparse(patterns=HAX_PATTERNS, qk="shared", n_heads=2)
    assert layer.to_qk.weight.shape == (8, 8)
    assert sparse(patterns=HAX_PATTERNS, n_heads=2).to_qk.weight.shape == (16, 8)
    q, k, scale = layer._queries_and_keys(torch.randn(2, 9, 8))
    assert torch.equal(q, k)
    assert scale == 0.5
    x = double(1, 25, 8)
    seen = sparse(patterns=(Lsh(1, n_bits=8),), qk="shared", project=False).double()
    torch.testing.assert_close(seen(x).y, x, msg="with one key per bucket it is the query's own, always in its bucket")


@pytest.mark.parametrize("qk", ["separate", "shared"])
def test_normalised_queries_and_keys_have_length_one_and_their_scale(qk: Any) -> None:
    x = torch.randn(2, 9, 8)
    q, k, scale = sparse(patterns=HAX_PATTERNS, qk=qk, normalise="l2")._queries_and_keys(x)
    for vectors in (q, k):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 9, 1))
    assert scale == 10
    layer = sparse(patterns=HAX_PATTERNS, qk=qk, normalise="l2", scale=3.0, learn_scale=True)
    q, k, scale = layer._queries_and_keys(x)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((2, 9, 1), 3.0))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(2, 9, 1))
    assert scale == 1
    big, usual = layer.double()(1000 * x.double()).y, layer(x.double()).y
    torch.testing.assert_close(big, 1000 * usual, msg="only the values carry the input's size")


@pytest.mark.parametrize("selection", ["ranking", "gate"])
def test_a_learned_scale_starts_as_the_fixed_one(selection: Any) -> None:
    fixed = sparse(patterns=HAX_PATTERNS, selection=selection).double()
    learned = sparse(patterns=HAX_PATTERNS, selection=selection, learn_scale=True).double()
    learned.load_state_dict(fixed.state_dict(), strict=False)
    x = double(2, 50, 8)
    torch.testing.assert_close(learned.eval()(x).y, fixed.eval()(x).y)


def test_a_query_may_always_read_itself_if_asked() -> None:
    x = double(1, 40, 8)
    alone = sparse(patterns=(Lsh(2, n_bits=8),), project=False).double()
    assert (alone(x).y == 0).all(-1).any(), "some queries find their bucket empty"
    layer = sparse(patterns=(Lsh(2, n_bits=8),), project=False, include_self=True).double()
    y = layer(x).y
    assert not (y == 0).all(-1).any()
    torch.testing.assert_close(y[:, 0], x[:, 0])
    config = layer.config
    assert config.union == (Lsh(2, n_bits=8), Window(1))
    assert (key_budget(config.union), memory_slots(config.union)) == (3, 2 * 256 + 1)
    assert nbytes(layer.float()(x.float()).state) == config.state_bytes(1, seen=40)
    for patterns in ((Window(3), Sink(2)), (Full(),)):
        assert SparseAttention.Config(8, patterns=patterns, include_self=True).union == patterns


def test_the_declared_budget_of_a_model_counts_the_query_itself() -> None:
    from recollect.models.backbone import Backbone
    from recollect.tasks import JointRecall

    layer = SparseAttention.Config(8, patterns=(Lsh(4, n_bits=2),), include_self=True)
    problem = RecallConfig(JointRecall.Config(), Backbone.Config(8, layers=(layer, GRU.Config(8)))).build()
    assert problem.describe(problem.build_model())["key_budget"] == 5


@pytest.mark.parametrize("selection", ["kl", "gate+ranking"])
def test_half_precision_trains_and_sums_in_float32(selection: str) -> None:
    layer = sparse(
        patterns=HAX_PATTERNS, planes="learned", selection=selection, normalise="l2", learn_scale=True, qk="shared"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 40, 8))
    (out.y.float().sum() + out.aux["hash"] + out.aux["selection"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    whole = layer.to(torch.bfloat16).eval()(torch.randn(2, 40, 8, dtype=torch.bfloat16))
    assert whole.y.dtype == torch.bfloat16
    assert whole.state.query_sum.dtype == torch.float32
    assert nbytes(whole.state) == layer.config.state_bytes(2, dtype=torch.bfloat16)


# The mixer's own queries, keys and values


@torch.no_grad()
@pytest.mark.parametrize("config", [Mamba.Config(6, d_state=4), Mamba2.Config(6, d_state=4, d_head=3, n_groups=2)])
def test_what_a_core_shows_of_itself_is_what_it_computes(config: BranchedConfig) -> None:
    """Without decay and skip, it is the causal sum over its own (q . k) v: taken away again, nothing is left."""
    layer: Any = config.build().double()
    layer.A_log.fill_(-40.0)
    layer.D.zero_()
    bias = layer.dt_proj.bias if isinstance(config, Mamba.Config) else layer.dt_bias
    groups = getattr(config, "n_groups", 1)
    found: list[float] = []

    def less(_: Tensor, dual: Any) -> Tensor:
        q, k, v = (part.unflatten(-1, (groups, -1)).movedim(-2, 1) for part in dual())
        y = (q @ k.mT).tril() @ v * F.softplus(bias).mean()
        found.append(float(y.abs().max()))
        return -y.movedim(1, -2).flatten(-2)

    y = layer(torch.randn(2, 20, 6, dtype=torch.float64), branch=less).y
    assert found[0] > 1e-3
    assert y.abs().max() < 1e-9
