r"""The recall lab: which memory binds a key to its context? Joint recall at three scales, the same rows at each.

``recall-micro``: six rows on small tables, minutes on two CPU cores. ``recall-mini``: every row on tables of up to
8 x 8 with small states and budgets, at which a CPU tells them apart. ``recall-published``: the paper's grid, widths and
budget (arXiv 2507.00449, table 1), for a GPU.

Within a recipe all rows share task, depth, training and budget of keys, and all but ``-2x`` the width; what differs is
the layer. A row is a mixer and, after ``+``, what its attention branch may read:

===================  =====================================================================  ===================
name                 keys of the budget k                                                   in the paper
===================  =====================================================================  ===================
``+dilated``         every n-th position, so that k of them reach over the longest sample    +D
``+window``          the k most recent                                                       +SW
``+window+dilated``  half and half                                                           +SW+D
``+sink``            the k/2 most recent and the k/2 first                                   +A
``+lsh``             the k most recent of the query's two buckets                            +LSH
``+ks``              the k that a learned score has kept                                     +KS
``+hax``             the last two, half and half                                             +HAX
``+full``            the whole past, without a budget                                        not reported
===================  =====================================================================  ===================

All attention branches start with unit queries and keys, and those that choose by content with a gate of 3, at which
attention is learned soonest; for windows, sinks and dilations 1 is better (``docs/log.md``). Where the set is learned
(``+lsh``, ``+ks``, ``+hax``) some queries of every training step read everything (``SparseOptions.explore``), and
hashes are learned and probed twice. ``+hax-published`` is the paper's layer: plain products, gate 1, a hash drawn at
random, its loss for key selection. The published protocol trains each row at three rates, takes the best on validation,
and has neither a curriculum nor a cosine::

    recollect faceoff recall-published --lrs 3e-3 1e-3 3e-4 --seeds 0 1 2 \
        train.steps=400000 train.schedule=constant problem.curriculum=[]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from recollect.core.layer import LayerConfig
from recollect.layers.attention import Attention
from recollect.layers.gated_deltanet import GatedDeltaNet
from recollect.layers.hax import HAX
from recollect.layers.mamba import Mamba
from recollect.layers.mamba2 import Mamba2
from recollect.layers.short_conv import ShortConv
from recollect.models.backbone import Backbone
from recollect.ops.patterns import Dilated, Full, KeySelection, Lsh, Pattern, Sink, Window
from recollect.tasks.joint_recall import JointRecall
from recollect.train.curriculum import Stage
from recollect.train.recall import RecallConfig
from recollect.train.run import FaceOff, RunConfig, TrainConfig

BRANCHES = ("dilated", "window", "window+dilated", "sink", "lsh", "ks", "hax", "full")
CHOOSING = ("lsh", "ks", "hax", "full")
"""Branches whose keys depend on what the query asks; what position alone decides learns worse behind a loud gate."""
MICRO_ROWS = ("mamba2", "mamba2+window", "mamba2+lsh", "mamba2+ks", "mamba2+hax", "mamba2+full")


@dataclass(frozen=True)
class Scale:
    """What the rows of one recipe share: sizes of models, budget, and training."""

    mamba_state: int
    mamba2_state: int
    """``d_state``; the delta rule's keys are as wide, which makes its state as large."""
    n_keys: int
    n_bits: int
    """Of the hash: about as many buckets as leave a few cells of the largest table in each."""
    d_key: int
    explore: int
    """Per row of a batch."""
    problem: RecallConfig
    """With a backbone that every row replaces."""
    train: TrainConfig
    dt_rank: int | None = None
    """Of Mamba."""
    d_model: int = 64

    def patterns(self, branch: str) -> tuple[Pattern, ...]:
        """The key sets of one of ``BRANCHES``."""
        k, half, length = self.n_keys, self.n_keys // 2, self.problem.task.build().max_length
        return {
            "dilated": (Dilated(k, stride=length // k),),
            "window": (Window(k),),
            "window+dilated": (Window(half), Dilated(half, stride=length // half)),
            "sink": (Window(half), Sink(half)),
            "lsh": (self.lsh(k),),
            "ks": (KeySelection(k),),
            "hax": (self.lsh(half), KeySelection(half)),
            "full": (Full(),),
        }[branch]

    def lsh(self, n_keys: int) -> Lsh:
        """Half of the keys from the query's bucket, half from the next nearest."""
        return Lsh(n_keys, n_bits=self.n_bits, n_rounds=2, rule="argmax", rounds="probed")

    def branched(self, mixer: LayerConfig, branch: str) -> HAX.Config:
        """``mixer`` joined by attention over the keys of ``branch``."""
        layer = HAX.Config(
            self.d_model,
            mixer=mixer,
            patterns=self.patterns(branch),
            d_key=self.d_key,
            normalise="l2",
            learn_scale=True,
            gate_init=3.0 if branch in CHOOSING else 1.0,
        )
        if branch in ("lsh", "hax"):
            layer = replace(layer, planes="projected")
        return replace(layer, explore=self.explore) if branch in ("lsh", "ks", "hax") else layer

    def published(self, mixer: LayerConfig) -> HAX.Config:
        """The paper's HAX, at this scale's budget and number of buckets."""
        half = self.n_keys // 2
        patterns = (Lsh(half, n_bits=self.n_bits), KeySelection(half))
        return replace(HAX.Config.published(self.d_model, mixer, self.n_keys), patterns=patterns)

    def mamba(self, d_model: int | None = None) -> Mamba.Config:
        return Mamba.Config(d_model or self.d_model, d_state=self.mamba_state, dt_rank=self.dt_rank)

    def mamba2(self, d_model: int | None = None) -> Mamba2.Config:
        width = d_model or self.d_model
        return Mamba2.Config(width, d_state=self.mamba2_state, d_head=width // 4)

    def delta(self) -> GatedDeltaNet.Config:
        """Four heads of values 32 wide: as many floats of state as Mamba-2's."""
        return GatedDeltaNet.Config(self.d_model, n_heads=4, d_head=self.mamba2_state, d_value=self.d_model // 2)

    def backbones(self) -> dict[str, tuple[LayerConfig, ...]]:
        """Every row of the lab."""
        rows: dict[str, tuple[LayerConfig, ...]] = {}
        for name, mixer in (("mamba", self.mamba()), ("mamba2", self.mamba2())):
            rows[name] = (mixer, mixer)
            for branch in BRANCHES:
                rows[f"{name}+{branch}"] = (self.branched(mixer, branch),) * 2
        rows["mamba-2x"] = (self.mamba(2 * self.d_model),) * 2
        rows["mamba2-2x"] = (self.mamba2(2 * self.d_model),) * 2
        rows["mamba2+hax-published"] = (self.published(self.mamba2()),) * 2
        delta = self.delta()
        rows["gated_deltanet"] = (delta, delta)
        rows["gated_deltanet+hax"] = (self.branched(delta, "hax"),) * 2
        window = Attention.Config(self.d_model, n_heads=4, window=self.n_keys)
        rows["samba"] = Backbone.Config.samba(self.mamba(), window, n_blocks=2).layers
        attention = Attention.Config(self.d_model, n_heads=4, window=None)
        rows["conv+attention"] = (ShortConv.Config(self.d_model), attention) * 2
        return rows

    def runs(self, recipe: str, names: Iterable[str] | None = None) -> tuple[RunConfig, ...]:
        """The runs of the named rows, or of all."""
        backbones = self.backbones()

        def run(name: str) -> RunConfig:
            layers = backbones[name]
            problem = replace(self.problem, backbone=Backbone.Config(layers[0].d_model, layers))
            return RunConfig(recipe, "recall", name, 0, problem, self.train)

        return tuple(run(name) for name in names or backbones)


def small(largest: int, steps: int) -> Scale:
    """Tables of 2..``largest`` contexts and keys, growing from 3 x 3 over half of the steps."""
    task = replace(JointRecall.Config.mini(), n_contexts=(2, largest), n_keys=(2, largest))
    stages = (Stage(until_step=steps // 2, sizes=((2, 3), (2, 3)), ramp=True),)
    return Scale(
        mamba_state=4,
        mamba2_state=4,
        n_keys=32,
        n_bits=5,
        d_key=16,
        explore=128,
        problem=RecallConfig(
            task,
            Backbone.Config.tiny(),
            batch_size=32,
            curriculum=stages,
            embedding_std=0.5,
            valid_samples=8,
            test_samples=64,
        ),
        train=TrainConfig(
            steps=steps,
            lr=4e-3,
            warmup_steps=50,
            log_every=25,
            eval_every=250,
            checkpoint_every=250,
            select="best",
        ),
    )


def recall_micro() -> FaceOff:
    """Six rows on tables of 2..5 x 2..5."""
    scale = small(5, steps=1600)
    return FaceOff("recall-micro", "Joint recall of small tables", scale.runs("recall-micro", MICRO_ROWS), seeds=(0,))


def recall_mini() -> FaceOff:
    """Every row on tables of 2..8 x 2..8: less than two hours for one seed on two cores."""
    scale = small(8, steps=1500)
    return FaceOff("recall-mini", "Joint recall of tables up to 8 x 8", scale.runs("recall-mini"), seeds=(0, 1, 2))


def recall_published() -> FaceOff:
    """Every row at the paper's sizes: 5..16 x 5..16, width 64, k = 64; a GPU's work."""
    steps = 40_000
    scale = Scale(
        mamba_state=16,
        mamba2_state=32,
        dt_rank=8,
        n_keys=64,
        n_bits=6,
        d_key=16,
        explore=256,
        problem=RecallConfig(
            replace(JointRecall.Config.published(), vocab_size=100),
            Backbone.Config.tiny(),
            batch_size=64,
            batching="packed",
            curriculum=(Stage(until_step=10_000, sizes=((2, 3), (2, 3)), ramp=True),),
            embedding_std=0.5,
            valid_samples=8,
            test_samples=100,
        ),
        train=TrainConfig(
            steps=steps, lr=2e-3, warmup_steps=500, log_every=100, eval_every=2000, checkpoint_every=500, select="best"
        ),
    )
    return FaceOff("recall-published", "Joint recall as published", scale.runs("recall-published"), seeds=(0, 1, 2))
