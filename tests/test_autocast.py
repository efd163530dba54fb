"""bfloat16 autocast: parameters and the optimizer's moments stay float32, and training goes where it goes without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recollect.layers.hax import HAX
from recollect.layers.mamba2 import Mamba2
from recollect.models.backbone import Backbone
from recollect.ops import dispatch
from recollect.ops.patterns import KeySelection, Lsh
from recollect.tasks import JointRecall
from recollect.train import checkpoint as ckpt
from recollect.train.loop import train
from recollect.train.metrics import read_metrics
from recollect.train.recall import RecallConfig
from recollect.train.run import RunConfig, TrainConfig


def test_hax_learns_the_same_in_bfloat16_with_everything_kept_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "KERNELS", "torch")  # what bfloat16 runs anyway: the same form on both sides
    mixer = Mamba2.Config(16, d_state=8, d_head=8)
    layer = HAX.Config(16, mixer=mixer, patterns=(Lsh(8, n_bits=1), KeySelection(8)), d_key=8)
    task = JointRecall.Config(n_contexts=(2, 2), n_keys=(2, 2), n_values=4)
    problem = RecallConfig(task, Backbone.Config(16, layers=(layer,)), batch_size=8, test_samples=1)
    settings = TrainConfig(steps=40, lr=1e-2, warmup_steps=5, log_every=1, checkpoint_every=40, ema=0.9)
    run = RunConfig("test", "recall", "row", 0, problem, settings)
    curves = {}
    for autocast in ("off", "bf16"):
        where = tmp_path / autocast
        train(replace(run, train=replace(settings, autocast=autocast)), where)
        curves[autocast] = np.array([r["loss"] for r in read_metrics(where / "metrics.jsonl") if "loss" in r])
        tensors = ckpt.load(where / "checkpoints", "step-00000040").tensors
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}
        assert any(name.endswith("exp_avg_sq") for name in tensors)
    full, half = curves["off"], curves["bf16"]
    assert not np.array_equal(full, half), "autocast did not reach the model"
    # Eight bits of mantissa: the first losses agree to a percent, the means of the last ones to a tenth of the way.
    np.testing.assert_allclose(half[:3], full[:3], rtol=0.02)
    fallen = full[:5].mean() - full[-10:].mean()
    assert fallen > 0.3, "this test needs a run that learns"
    assert abs(half[-10:].mean() - full[-10:].mean()) < 0.2 * fallen
