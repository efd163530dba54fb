"""Queries and keys made of moments: what they are, and that with ``follow`` attention goes on as it went before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.layers.moments import Moments
from recollect.layers.sparse import SparseAttention
from recollect.ops.patterns import Full, KeySelection, Lsh
from small_attention import double, sparse


def repeated(length: int = 30, again: int = 12, d: int = 8) -> Tensor:
    """One walk through random inputs, whose last ``again`` steps repeat those from the fifth on."""
    x = double(1, length, d, seed=1)
    return torch.cat([x, x[:, 5 : 5 + again]], 1)


def test_a_moment_sums_the_last_inputs_and_a_key_is_made_of_the_one_before() -> None:
    moments, x = Moments(2, span=3, follow=True).double(), double(1, 6, 2)
    asks, tells, _ = moments(x, None, None)
    w = moments.weight
    torch.testing.assert_close(asks[:, 4], w[:, 2] * x[:, 4] + w[:, 1] * x[:, 3] + w[:, 0] * x[:, 2])
    torch.testing.assert_close(tells[:, 1:], asks[:, :-1])
    assert not tells[:, 0].any()
    same, also, past = Moments(2, span=1, follow=False)(x, None, None)
    assert same is x
    assert also is x
    assert nbytes(past) == 0


def test_what_all_inputs_share_is_not_in_a_moment() -> None:
    moments, x = Moments(3, span=4, follow=False).double(), double(1, 9, 3)
    shared = double(3, seed=1)
    plain, shifted = (moments(inputs, None, None)[0] for inputs in (x, x + shared))
    torch.testing.assert_close(shifted[:, 3:], plain[:, 3:])
    assert not torch.allclose(shifted[:, :3], plain[:, :3]), "a segment's beginning still shows"


def test_nothing_before_a_reset_is_in_a_moment() -> None:
    moments, x = Moments(2, span=3, follow=True).double(), double(1, 7, 2)
    reset = torch.zeros(1, 7, dtype=torch.bool)
    reset[:, 4] = True
    for seen, fresh in zip(moments(x, None, reset)[:2], moments(x[:, 4:], None, None)[:2], strict=True):
        torch.testing.assert_close(seen[:, 4:], fresh)


@pytest.mark.parametrize("pattern", [Full(), Lsh(8, n_bits=4)])
def test_what_followed_a_moment_like_this_is_read_without_training(pattern: Full | Lsh) -> None:
    """The values are the inputs: those of the repetition are foretold by an induction head that nobody trained."""
    torch.manual_seed(0)
    layer = SparseAttention(
        SparseAttention.Config(
            8,
            d_key=32,
            patterns=(pattern,),
            project=False,
            qk="shared",
            normalise="l2",
            scale=200.0,
            span=2,
            follow=True,
        )
    ).double()
    x = repeated()
    read = layer(x).y
    # Two steps into the repetition the moment is that of the first time; what stands next is x itself at the next step.
    torch.testing.assert_close(read[:, 32:-1], x[:, 33:], atol=0.05, rtol=0)
    without = sparse(patterns=(pattern,), d_key=32, project=False, qk="shared", normalise="l2", scale=200.0).double()
    torch.testing.assert_close(without(x).y[:, 32:-1], x[:, 32:-1], atol=0.05, rtol=0)


def test_a_hash_of_its_own_hashes_a_key_by_the_moment_before() -> None:
    """A bucket holds one key: with the value of the step after the last time the same was met."""
    torch.manual_seed(0)
    lsh = Lsh(1, n_bits=12)
    layer = sparse(patterns=(lsh,), planes="projected", project=False, qk="shared", follow=True).double()
    half = layer.to_hash.weight.shape[0] // 2
    with torch.no_grad():  # queries and keys are hashed alike
        layer.to_hash.weight[half:] = layer.to_hash.weight[:half]
        layer.to_hash.bias[half:] = layer.to_hash.bias[:half]
    x = repeated()
    torch.testing.assert_close(layer.eval()(x).y[:, 30:-1], x[:, 6:17])


def test_states_count_the_inputs_they_carry() -> None:
    plain = sparse(patterns=(KeySelection(3),))
    looking = sparse(patterns=(KeySelection(3),), span=5, follow=True)
    more = looking.config.state_bytes(2) - plain.config.state_bytes(2)
    assert more == nbytes(looking.init_state(2)) - nbytes(plain.init_state(2)) == 2 * (4 + 1) * 8 * 4


@pytest.mark.parametrize("changes", [{"span": 4}, {"follow": True}])
def test_a_mixers_own_queries_and_keys_are_taken_as_they_are(changes: dict[str, int | bool]) -> None:
    mixer = Mamba2.Config.tiny()
    with pytest.raises(ConfigError, match="leave out span and follow"):
        HAX.Config(8, mixer=mixer, patterns=(KeySelection(3),), d_key=mixer.dual, qk="dual", **changes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="span must be at least 1"):
        sparse(patterns=(KeySelection(3),), span=0)


def test_a_sketch_stays_as_it_was_drawn_and_lets_gradients_through() -> None:
    layer = sparse(patterns=(Full(),), qk="sketch", span=3, follow=True, normalise="l2", learn_scale=True).double()
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"to_qk.weight", "moments.weight"}
    x = double(2, 12, 8).requires_grad_()
    layer(x).y[:, -1].square().sum().backward()
    assert layer.log_scale.grad is not None
    assert x.grad is not None
    assert x.grad[:, 2].abs().sum() > 0
    assert "to_qk.weight" in layer.state_dict(), "it is saved with the rest"


def test_what_a_mixer_writes_is_read_under_keys_of_its_activations() -> None:
    """With a query sharp enough, a repetition reads dt u of what followed: the values that the scan itself adds up."""
    torch.manual_seed(0)
    mixer = Mamba2.Config(8, d_state=4, d_head=4)
    options = {"qk": "shared", "normalise": "l2", "scale": 500.0, "span": 2, "follow": True}
    config = HAX.Config(8, mixer=mixer, patterns=(Full(),), d_key=32, written=True, **options)  # pyright: ignore[reportArgumentType]
    layer = HAX(config).double().eval()
    given: list[Tensor] = []
    layer.attention.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    read: list[Tensor] = []
    layer.attention.register_forward_hook(lambda _, __, out: read.append(out.y))
    layer(repeated())
    inner = mixer.inner
    assert given[0].shape[-1] == 2 * inner
    written, activations = given[0].split(inner, -1)
    assert not torch.allclose(written, activations)
    # The convolution looks three inputs back, the moment one more: after five steps of the repetition all is alike.
    torch.testing.assert_close(read[0][:, 35:-1], written[:, 36:], atol=0.02, rtol=0)
