"""The demonstration: which backbone remembers? Minutes on two CPU cores, both halves of the question.

*Recall*: joint recall of small tables with a small state, as in ``recipes.recall``. Equal width, depth and training for
all rows but the one at twice the width; the hybrids differ from ``mamba2`` by an attention branch and nothing else.

*World*: Distracting Memory with a short hallway, two colours and few distractors, seen as tile codes. Rows differ in
the layers of the backbone only.
"""

from __future__ import annotations

from dataclasses import replace

from recollect.core.layer import LayerConfig
from recollect.envs import DistractingMemory
from recollect.layers.attention import Attention
from recollect.layers.gru import GRU
from recollect.layers.hax import HAX
from recollect.layers.s5 import S5
from recollect.models.backbone import Backbone
from recollect.models.latent import LatentConfig
from recollect.models.s4wm import S4WM
from recollect.ops.patterns import KeySelection, Lsh
from recollect.recipes.recall import small
from recollect.tasks import JointRecall
from recollect.train.curriculum import Stage
from recollect.train.recall import RecallConfig
from recollect.train.run import FaceOff, RunConfig, TrainConfig
from recollect.train.world import WorldConfig


def demo() -> FaceOff:
    """Six recall rows and four world rows, three seeds each: about a quarter of an hour on two cores."""
    title = "Joint recall and a memory world, in minutes on a CPU"
    return FaceOff("demo", title, (*recall_rows(), *world_rows()), seeds=(0, 1, 2))


def demo_smoke() -> FaceOff:
    """The demonstration's every row with a few steps on tiny sizes: the code path, not the numbers."""

    def shrink(run: RunConfig) -> RunConfig:
        problem = run.problem
        if isinstance(problem, RecallConfig):
            task = JointRecall.Config(n_contexts=(1, 2), n_keys=(2, 3), n_values=8)
            stages = (Stage(until_step=3, sizes=((1, 2), (2, 2)), ramp=True),)
            problem = replace(problem, task=task, batch_size=4, valid_samples=4, test_samples=4, curriculum=stages)
        elif isinstance(problem, WorldConfig):
            env = DistractingMemory.Config(width=11)
            problem = replace(problem, env=env, batch_size=2, n_episodes=16, n_valid=4, n_test=8)
        train = replace(run.train, steps=6, warmup_steps=2, log_every=2, eval_every=3, checkpoint_every=3)
        return replace(run, problem=problem, train=train)

    whole = demo()
    return replace(whole, name="demo-smoke", runs=tuple(shrink(run) for run in whole.runs), seeds=(0,))


def recall_rows() -> tuple[RunConfig, ...]:
    """``mamba2`` alone, twice as wide, and joined by each kind of attention, on tables of 2..5 contexts x 2..5 keys.

    The rows of the recall lab at its smallest scale; ``hax-published`` is the paper's layer, ``hax`` ours.
    """
    names = ("mamba2", "mamba2-2x", "mamba2+window", "mamba2+hax-published", "mamba2+hax", "mamba2+full")
    return small(5, steps=1600).runs("demo", names)


def world_rows() -> tuple[RunConfig, ...]:
    """A world model on each backbone, in a hallway 12 tiles wide: 23 frames seen, 7 imagined."""
    env = DistractingMemory.Config(width=12, p_distractor=0.2, n_colours=2)
    train = TrainConfig(steps=1200, lr=6e-3, warmup_steps=50, log_every=20, eval_every=200, checkpoint_every=300)

    def row(name: str, layer: LayerConfig) -> RunConfig:
        backbone = Backbone.Config.alternating(64, (layer, layer), mlp_expand=2.0)
        latent = LatentConfig(groups=16, classes=16)
        dynamics = S4WM.Config(backbone, latent=latent)
        problem = WorldConfig(env, dynamics, reward_weight=30.0)
        return RunConfig("demo", "world", name, 0, problem, train)

    s5 = S5.Config(64, d_state=64)
    # A small gate: at first the branch adds little, and the world model learns as fast as with its mixer alone.
    hax = HAX.Config(64, mixer=s5, patterns=(Lsh(8, n_bits=2), KeySelection(8)), d_key=16, gate_init=0.1)
    return (
        row("gru", GRU.Config(64)),
        row("attention", Attention.Config(64, n_heads=4, window=64)),
        row("s5", s5),
        row("hax", hax),
    )
