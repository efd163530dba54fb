"""How keys and queries find one another by hash: buckets, probes, what teaches the maps, and who explores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.layers.sparse import SparseAttention
from recollect.ops.hashing import (
    argmax_buckets,
    draw_planes,
    hash_buckets,
    hash_loss,
    plane_code,
    probed_buckets,
    read_buckets,
    soft_code,
)
from recollect.ops.patterns import (
    Full,
    KeySelection,
    Lsh,
    Window,
)
from recollect.ops.selection import selection_divergence
from recollect.ops.sparse_attention import Buckets, key_sets_reference, sparse_attention_reference
from recollect.ops.teacher import attend_fully, teach
from small_attention import double, gradients, sparse

RULES = ("sign", "argmax")
HAX_PATTERNS = (Lsh(4, n_bits=2), KeySelection(4))


def test_the_argmax_bucket_is_the_nearest_direction() -> None:
    directions = torch.eye(4, dtype=torch.float64)[None, :, None]  # one head, one round, column c is axis c
    x = torch.tensor([[0.1, 3.0, 0.2, 1.0], [-5.0, -1.0, -0.5, -2.0]], dtype=torch.float64)
    assert argmax_buckets(x[None, :, None], directions).flatten().tolist() == [1, 2]


@pytest.mark.parametrize("rule", RULES)
def test_a_bucket_depends_on_direction_alone(rule: Any) -> None:
    lsh = Lsh(4, n_bits=3, n_rounds=2, rule=rule)
    planes = draw_planes(8, 2, lsh.n_rounds, lsh.n_planes).double()
    x = double(3, 50, 2, 8)
    buckets = hash_buckets(x, planes, rule)
    assert buckets.shape == (3, 50, 2, 2)
    assert buckets.min() >= 0
    assert lsh.n_buckets // 2 < int(buckets.max()) < lsh.n_buckets, "all buckets are in use"
    assert torch.equal(hash_buckets(7.5 * x, planes, rule), buckets)
    near = (hash_buckets(x + 0.1 * double(3, 50, 2, 8, seed=1), planes, rule) == buckets).double().mean()
    far = (hash_buckets(double(3, 50, 2, 8, seed=2), planes, rule) == buckets).double().mean()
    assert near > 0.7
    assert far < 0.3


@pytest.mark.parametrize("rule", RULES)
def test_rounds_and_rules_reach_the_attention(rule: Any) -> None:
    """The layer reads the keys of the written-out definition, over several rounds, under either rule."""
    lsh = Lsh(8, n_bits=2, n_rounds=4, rule=rule)
    layer = sparse(patterns=(lsh,), project=False, n_heads=2).double().eval()
    assert layer.planes.shape == (2, 4, 4, 2 if rule == "sign" else 4)
    x = double(2, 70, 8)
    q, k = layer.to_qk(x).unflatten(-1, (2, 2, 4)).unbind(2)
    buckets = Buckets(hash_buckets(q, layer.planes, rule), hash_buckets(k, layer.planes, rule))
    wanted, sets = sparse_attention_reference(q, k, x.unflatten(-1, (2, 4)), (lsh,), buckets=buckets)
    torch.testing.assert_close(layer(x).y, wanted.flatten(-2), rtol=0, atol=1e-12)
    assert sets.sum(-1).max() <= 8
    one = Buckets(buckets.q[..., :1], buckets.k[..., :1])
    assert sets.sum() > key_sets_reference(q, (replace(lsh, n_keys=2, n_rounds=1),), buckets=one).sum()


def test_probed_rounds_read_the_nearest_buckets_in_order() -> None:
    """Against every bucket's distance, written out: the sum of |projection| over the bits in which it differs."""
    code = double(5, 40, 2, 4)
    bits = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
    differs = bits != (code > 0)[..., None, :]
    distance = (code.abs()[..., None, :] * differs).sum(-1)
    for n in (1, 2, 3, 5):
        assert torch.equal(probed_buckets(code, "sign", n), distance.argsort(-1)[..., :n])
    assert torch.equal(probed_buckets(code, "sign", 2)[..., 0], read_buckets(code, "sign"))
    assert torch.equal(probed_buckets(code, "argmax", 3), code.argsort(-1, descending=True)[..., :3])


@pytest.mark.parametrize("rule", RULES)
def test_a_probed_layer_stores_a_key_once_and_looks_twice(rule: Any) -> None:
    lsh = Lsh(8, n_bits=3, n_rounds=2, rule=rule, rounds="probed")
    layer = sparse(patterns=(lsh,), project=False, n_heads=2, planes="projected").double().eval()
    x = double(2, 70, 8)
    q_code, k_code = layer.to_hash(x).unflatten(-1, (2, 2, 1, lsh.n_planes)).unbind(2)
    lies = read_buckets(k_code, rule)
    buckets = Buckets(probed_buckets(q_code[..., 0, :], rule, 2), torch.cat([lies, lies], -1))
    q, k = layer.to_qk(x).unflatten(-1, (2, 2, 4)).unbind(2)
    wanted, sets = sparse_attention_reference(q, k, x.unflatten(-1, (2, 4)), (lsh,), buckets=buckets)
    torch.testing.assert_close(layer(x).y, wanted.flatten(-2), rtol=0, atol=1e-12)
    own = Buckets(buckets.q[..., :1], buckets.k[..., :1])
    assert sets.sum() > key_sets_reference(q, (replace(lsh, n_keys=4, n_rounds=1),), buckets=own).sum()


def matching_pairs(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Key j and query n + j share 6 of 24 features; in 9 others the keys, in the last 9 the queries hold noise.

    Attention sees the shared features only, as noise meets zeros in the product; random planes see all of them.
    """
    shared = 2.5 * F.normalize(double(1, n, 1, 6, seed=seed), dim=-1)
    noise, other, zeros = double(1, n, 1, 9, seed=seed + 1), double(1, n, 1, 9, seed=seed + 2), torch.zeros(1, n, 1, 9)
    asking, asked = torch.cat([shared, zeros, noise], -1), torch.cat([shared, other, zeros], -1)
    return torch.cat([torch.zeros_like(asking), asking], 1), torch.cat([asked, torch.zeros_like(asked)], 1)


def plane_loss(
    q: Tensor, k: Tensor, planes: Tensor, rule: Any, *, n: int, scale: float, reset: Tensor | None = None
) -> Tensor:
    """The hash loss of codes made by planes, for buckets of four keys."""
    taught = teach(q, k, n=n, reset=reset, scale=scale)
    return hash_loss(taught, 2 * plane_code(q, planes), 2 * plane_code(k, planes), rule, n_keys=4)


def collisions(q: Tensor, k: Tensor, planes: Tensor, rule: Any) -> tuple[float, float]:
    """How often a query shares a bucket with its own key, and with any key."""
    half = q.shape[1] // 2
    query, key = hash_buckets(q[:, half:], planes, rule), hash_buckets(k[:, :half], planes, rule)
    return (query == key).double().mean().item(), (query[:, :, None] == key[:, None]).double().mean().item()


@pytest.mark.parametrize("rule", RULES)
def test_the_hash_loss_prefers_planes_that_put_matching_pairs_together(rule: Any) -> None:
    q, k = matching_pairs()
    planes = 3 * draw_planes(24, 1, 1, 4, torch.Generator().manual_seed(5)).double()
    seeing, blind = planes.clone(), planes.clone()
    seeing[:, 6:] = 0
    blind[:, :6] = 0
    losses = [plane_loss(q, k, p, rule, n=120, scale=4.0).item() for p in (seeing, planes, blind)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[0] < losses[2] - 0.3


@pytest.mark.parametrize("rule", RULES)
def test_learned_planes_bring_matching_pairs_together(rule: Any) -> None:
    """New pairs at every step, and scored on pairs never seen: what is learned is where they agree."""
    q, k = matching_pairs()
    planes = draw_planes(24, 1, 1, 4 if rule == "sign" else 16, torch.Generator().manual_seed(1)).double()
    before, _ = collisions(q, k, planes, rule)
    planes.requires_grad_()
    optimizer = torch.optim.SGD([planes], lr=1.0, momentum=0.9)
    for step in range(200):
        optimizer.zero_grad()
        plane_loss(*matching_pairs(seed=10 + 3 * step), planes, rule, n=120, scale=4.0).backward()
        optimizer.step()
    after, by_chance = collisions(q, k, planes, rule)
    assert before < 0.3
    assert after > 0.75
    assert by_chance < 0.15, "not because everything shares one bucket"


@pytest.mark.parametrize("rule", RULES)
def test_losses_do_not_look_across_resets(rule: Any) -> None:
    q, k, score = double(2, 40, 2, 6), double(2, 40, 2, 6, seed=1), double(2, 40, 2, seed=2)
    planes = draw_planes(6, 2, 2, 3).double()
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[:, 25] = True

    def hashed(part: slice, r: Tensor | None = None) -> Tensor:
        return plane_loss(q[:, part], k[:, part], planes, rule, n=40, scale=1.0, reset=r)

    def selected(part: slice, r: Tensor | None = None) -> Tensor:
        return selection_divergence(q[:, part], k[:, part], score[:, part], n=40, scale=1.0, reset=r)

    for loss in (hashed, selected):
        apart = (25 * loss(slice(0, 25)) + 15 * loss(slice(25, 40))) / 40
        torch.testing.assert_close(loss(slice(0, 40), reset), apart)
        assert (loss(slice(0, 40)) - apart).abs() > 1e-3


def test_the_hash_loss_weighs_a_query_by_how_far_it_is_from_indifference() -> None:
    """A first key, which sees itself alone, and queries that want the average ask nothing of the hash."""
    code = double(1, 30, 1, 1, 3).requires_grad_()
    indifferent = teach(torch.zeros(1, 30, 1, 4).double(), double(1, 30, 1, 4), n=30, reset=None, scale=1.0)
    assert hash_loss(indifferent, code, code, "sign", n_keys=2).abs() < 1e-12
    alone = torch.ones(1, 30, dtype=torch.bool)
    single = teach(double(1, 30, 1, 4), double(1, 30, 1, 4), n=30, reset=alone, scale=1.0)
    assert hash_loss(single, code, code, "sign", n_keys=2) == 0
    sharp = teach(9 * double(1, 30, 1, 4), double(1, 30, 1, 4), n=30, reset=None, scale=1.0)
    assert hash_loss(sharp, code, code, "sign", n_keys=2) > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_soft_codes_forget_the_scale_but_not_the_threshold(rule: Any) -> None:
    code = double(2, 50, 1, 2, 3) + 0.5
    soft = soft_code(code, rule)
    torch.testing.assert_close(soft_code(40 * code, rule), soft)
    assert torch.equal(soft > 0, code > 0)
    assert torch.equal(read_buckets(soft, rule), read_buckets(code, rule))
    spread = (soft - soft.mean((0, 1) if rule == "sign" else None, keepdim=True)).std()
    assert spread == pytest.approx({"sign": 2.0, "argmax": 3.0}[rule], rel=0.15)
    assert soft_code(torch.zeros(1, 5, 1, 1, 2), rule).isfinite().all()


def _reaches(layer: SparseAttention, x: Tensor) -> bool:
    """Whether the hash's loss has a gradient for the layer's input."""
    (gradient,) = torch.autograd.grad(layer(x).aux["hash"], x, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def test_a_hash_of_its_own_is_trained_by_its_loss_alone() -> None:
    layer = sparse(patterns=HAX_PATTERNS, planes="projected", explore=5)
    by_hash = gradients(layer, lambda out: out.aux["hash"])
    assert {name for name, moved in by_hash.items() if moved} == {"to_hash"}
    by_model = gradients(layer, lambda out: out.y.square().sum())
    assert not by_model["to_hash"]
    assert by_model["to_qk"]
    x = double(2, 30, 8)
    heard = x.clone().requires_grad_()
    assert not _reaches(layer.double().train(), heard), "what the mixer learns is not the hash's to bend"
    q_code, k_code = layer.double().to_hash(x).unflatten(-1, (2, 1, 1, 2)).unbind(2)
    inputs = layer.eval().attention_inputs(x)
    assert inputs.buckets is not None
    for code, bucket in ((q_code, inputs.buckets.q), (k_code, inputs.buckets.k)):
        bits = code[..., 0, 0, :] > 0
        assert torch.equal(bits[..., 0] + 2 * bits[..., 1], bucket[..., 0, 0])


# Exploring


def test_explorers_read_everything_and_the_others_their_own_keys() -> None:
    layer = sparse(patterns=(Window(3),), project=False, explore=6).double()
    x, reset = double(2, 40, 8), torch.zeros(2, 40, dtype=torch.bool)
    reset[1, 17] = True
    own = layer.eval()(x, reset=reset).y
    full = sparse(patterns=(Full(),), project=False).double().eval()
    full.load_state_dict(layer.state_dict())
    everything = full(x, reset=reset).y
    torch.manual_seed(3)
    explored = layer.train()(x, reset=reset).y
    at = (explored != own).any(-1).any(0).nonzero()[:, 0]
    assert 4 <= len(at) <= 6, "the first positions see no more than a window"
    torch.testing.assert_close(explored[:, at], everything[:, at], rtol=0, atol=1e-12)
    rest = [i for i in range(40) if i not in at.tolist()]
    assert torch.equal(explored[:, rest], own[:, rest])
    assert not torch.equal(layer(x, reset=reset).y, explored), "drawn anew"
    layer.dense = True
    torch.testing.assert_close(layer(x, reset=reset).y, everything, rtol=0, atol=1e-12)


def test_explorers_teach_keys_that_no_set_admits() -> None:
    """Through the loss of an explorer a key that its window leaves out gets a gradient; without one it gets none."""
    for explore in (0, 40):
        layer = sparse(patterns=(Window(2),), project=False, explore=explore).double().train()
        x = double(1, 40, 8).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x).y[:, 30].sum(), x)
        assert bool(gradient[:, :20].abs().amax()) == bool(explore)
    taught = attend_fully(double(1, 9, 1, 4), double(1, 9, 1, 4, seed=1), torch.tensor([2, 8]), reset=None, scale=1.0)
    torch.testing.assert_close(taught.attention_BHnL.sum(-1), torch.ones(1, 1, 2).double())
    assert not taught.attention_BHnL[:, :, 0, 3:].any()
