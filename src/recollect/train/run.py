"""Configs of training: one run, and a face-off of many. Importing this module imports neither torch nor any model."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recollect.core.config import Config, override
from recollect.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from recollect.train.problem import Problem

FAMILIES = ("recall", "world", "language")
"""What a group asks, by the kind of its problem: a recall task, a world model's dreams, or held out text."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""What a group may be called: one folder's name, and safe in a page's addresses."""


@dataclass(frozen=True)
class TrainConfig(Config, kind="train"):
    """How the parameters are fitted: AdamW with decoupled weight decay, linear warm-up, then cosine or constant.

    The rate of 1-based step n is ``lr * n / warmup_steps`` while n < warmup_steps; then, with the cosine,
    ``lr * (r + (1 - r) * (1 + cos(pi * t)) / 2)`` where r = ``min_lr_ratio`` and t runs from 0 to 1 at the last step.
    Decay spares parameters of fewer than two axes and those marked ``_no_weight_decay``; ``_lr_scale`` on a parameter
    multiplies its rate.
    """

    steps: int
    lr: float = 1e-3
    warmup_steps: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip: float = 1.0
    """Largest L2 norm of all gradients together; 0 turns clipping off."""
    ema: float = 0.0
    """Decay per step of an average of the parameters, used for evaluation; 0 turns it off."""
    autocast: Literal["off", "bf16"] = "off"
    log_every: int = 50
    eval_every: int = 0
    """Steps between validations while training, the last step always among them; 0: none, only the final test."""
    select: Literal["last", "best"] = "last"
    """Which weights are tested at the end: the last ones, or those of the best validation."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    time_limit_s: float | None = None
    """Wall seconds of training, over all resumptions, after which the run stops and is scored as it stands."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "eval_every", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name, value in (("ema", self.ema), ("betas.0", self.betas[0]), ("betas.1", self.betas[1])):
            if not 0 <= value < 1:
                raise ConfigError(f"train.{name} must be in [0, 1), got {value}")
        if not self.lr > 0 or not self.eps > 0:
            raise ConfigError(f"train.lr and train.eps must be positive, got {self.lr} and {self.eps}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"train.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        if self.autocast not in ("off", "bf16"):
            raise ConfigError(
                f"train.autocast must be 'off' (float32) or 'bf16', got {self.autocast!r}; float16 is not supported"
            )
        if self.select not in ("last", "best"):
            raise ConfigError(f"train.select must be 'last' or 'best', got {self.select!r}")
        if self.select == "best" and not self.eval_every:
            raise ConfigError(
                "train.select=best needs validations to choose from: give train.eval_every=N before it, N at least 1"
            )
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ConfigError(f"train.time_limit_s must be positive or null, got {self.time_limit_s}")


@dataclass(frozen=True)
class ProblemConfig(Config):
    """Base of the configs that describe what is trained; see ``recollect.train.problem.Problem``."""

    @abstractmethod
    def build(self) -> Problem:
        """The problem this config describes."""


@dataclass(frozen=True)
class RunConfig(Config, kind="run"):
    """Everything that decides the outcome of one run, and nothing else."""

    recipe: str
    group: str
    """Rows of one group are compared: one task or environment. ``group_family`` says which kind of comparison."""
    row: str
    seed: int
    problem: ProblemConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if not PLAIN_NAME.fullmatch(self.group):
            raise ConfigError(
                f"run.group must be one folder's name, of letters, digits and . _ + - after a letter or digit, "
                f"got {self.group!r}"
            )

    @property
    def name(self) -> str:
        """``group/row/seed0``: its place below a face-off's directory."""
        return f"{self.group}/{self.row}/seed{self.seed}"


@dataclass(frozen=True)
class FaceOff(Config, kind="faceoff"):
    """Rows to compare, each trained once per seed and learning rate. A recipe is a function that returns one.

    With several rates, a row is reported at the rate with the best mean validation score over its seeds, as in
    arXiv 2507.00449; its runs must therefore be evaluated while they train.
    """

    name: str
    title: str
    runs: tuple[RunConfig, ...]
    seeds: tuple[int, ...] = (0,)
    lrs: tuple[float, ...] = ()
    """Learning rates to try on every row; empty: each row at its own ``train.lr``."""

    def __post_init__(self) -> None:
        rows = [(run.group, run.row) for run in self.runs]
        families: dict[str, str] = {}
        for run in self.runs:
            family = group_family(run.problem.kind, run.group)
            if family is None:
                raise ConfigError(
                    f"face-off '{self.name}': group '{run.group}' holds problems of kind '{run.problem.kind}', which "
                    f"does not say how to report it; call the group {' or '.join(FAMILIES)}"
                )
            if families.setdefault(run.group, family) != family:
                raise ConfigError(
                    f"face-off '{self.name}': group '{run.group}' holds both {families[run.group]} and {family} "
                    f"problems, whose rows cannot be compared; give each a group of its own"
                )
        for group, row in rows:
            if rows.count((group, row)) > 1:
                raise ConfigError(f"face-off '{self.name}': row '{row}' of group '{group}' is listed more than once")
        if not self.runs or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"face-off '{self.name}' needs at least one run and distinct seeds, got {self.seeds}")
        if not all(0 < lr < float("inf") for lr in self.lrs) or len(set(map(rate_name, self.lrs))) < len(self.lrs):
            raise ConfigError(
                f"face-off '{self.name}' needs positive learning rates that differ in six digits, got {self.lrs}"
            )
        unscored = [run.row for run in self.runs if not run.train.eval_every]
        if len(self.lrs) > 1 and unscored:
            raise ConfigError(
                f"face-off '{self.name}' chooses among {len(self.lrs)} learning rates by validation, but row "
                f"'{unscored[0]}' has train.eval_every=0 and is never validated; set train.eval_every"
            )

    def expanded(self) -> tuple[RunConfig, ...]:
        """One config per row, rate and seed: every rate of every row on the first seed, then on the next."""
        if not self.lrs:
            return tuple(replace(run, seed=seed) for seed in self.seeds for run in self.runs)
        return tuple(
            replace(run, seed=seed, train=replace(run.train, lr=lr))
            for seed in self.seeds
            for lr in self.lrs
            for run in self.runs
        )

    def place(self, run: RunConfig) -> str:
        """Where one of ``expanded`` lies: ``group/row/seed0``, with rates ``group/row/lr0.003/seed0``."""
        return f"{run.group}/{run.row}/{rate_name(run.train.lr)}/seed{run.seed}" if self.lrs else run.name

    def overridden(
        self, assignments: Iterable[str], seeds: tuple[int, ...] = (), lrs: tuple[float, ...] = ()
    ) -> FaceOff:
        """``key=value`` strings applied to every run, and other seeds and rates where any are given."""
        assignments = list(assignments)
        rates = lrs or self.lrs
        if rates and any(assignment.startswith("train.lr=") for assignment in assignments):
            tried = ", ".join(f"{lr:g}" for lr in rates)
            raise ConfigError(f"train.lr is one of the rates to try, {tried}: give --lrs instead of train.lr=")
        runs = tuple(override(run, assignments) for run in self.runs)
        return replace(self, runs=runs, seeds=seeds or self.seeds, lrs=rates)

    def pick(self, row: str, group: str | None = None) -> RunConfig:
        """The run of one row; ``group`` is needed only where two groups have a row of that name.

        Raises ConfigError naming the nearest row, or the groups to choose from.
        """
        found = [run for run in self.runs if run.row == row and group in (None, run.group)]
        if not found:
            rows = {run.row for run in self.runs if group in (None, run.group)}
            groups = dict.fromkeys(run.group for run in self.runs)
            if group is not None and group not in groups:
                raise ConfigError(
                    f"recipe '{self.name}' has no row '{row}' in group '{group}': its groups are {', '.join(groups)}"
                )
            within = f" in group '{group}'" if group else ""
            raise ConfigError(f"recipe '{self.name}' has no row '{row}'{within}{nearest(row, rows)}")
        if len(found) > 1:
            groups = " or ".join(f"--group {run.group}" for run in found)
            raise ConfigError(f"recipe '{self.name}' has row '{row}' more than once: add {groups}")
        return found[0]


def group_family(kind: str, group: str) -> str | None:
    """Which of ``FAMILIES`` a group belongs to: the kind of its problems, or, for kinds of one's own, its name.

    None where neither says.
    """
    return next((name for name in (kind, group) if name in FAMILIES), None)


def rate_name(lr: float) -> str:
    """A learning rate as a folder is called: ``lr0.003``."""
    return f"lr{lr:g}"


def default_directory(run: RunConfig) -> Path:
    """Where a run goes when no ``--out`` is given: the place it has in its recipe's face-off."""
    return Path("runs") / run.recipe.replace(":", ".") / run.name
