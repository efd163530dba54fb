"""Arguments of the commands under ``recollect data`` and ``recollect envs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from tyro.conf import FlagCreatePairsOff, Positional, arg

Overrides: TypeAlias = Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")]
Where: TypeAlias = Annotated[Positional[Path], arg(metavar="DIR")]
Folder: TypeAlias = Annotated[Path, arg(metavar="DIR")]
EnvName: TypeAlias = Annotated[Positional[str], arg(metavar="ENV")]
OneWay: TypeAlias = FlagCreatePairsOff[bool]
Split: TypeAlias = Literal["train", "valid", "test"]
Count: TypeAlias = Annotated[int | None, arg(metavar="N")]


@dataclass(frozen=True)
class Data:
    """Arguments of ``recollect data``: those of what is done."""

    what: Annotated[
        Positional[Literal["make", "check", "show", "import", "export"]], arg(metavar="{make,check,show,import,export}")
    ]
    """What to do; each has options of its own."""


@dataclass(frozen=True)
class DataMake:
    """Arguments of ``recollect data make``."""

    env: EnvName
    """An environment of `recollect list envs`."""
    out: Folder
    """The store's folder; with several splits, one folder of each below it."""
    episodes: Annotated[tuple[int, ...], arg(metavar="N [N ...]")]
    """How many episodes; one number for every split."""
    overrides: Overrides = ()
    """Settings of the environment to change: width=50."""
    split: Annotated[tuple[Split, ...], arg(metavar="{train,valid,test} [...]")] = ("train",)
    """Which episodes: splits of one seed share none."""
    seed: int = 0
    """Decides the episodes."""
    workers: Count = None
    """Processes that make episodes; 0: this one. Default: one for every CPU. Changes no byte."""
    ray: Annotated[str | None, arg(metavar="[ADDRESS]")] = None
    """Make them on a Ray cluster instead: auto, local or host:port; alone: Ray's own rule. Only this node writes."""


@dataclass(frozen=True)
class DataCheck:
    """Arguments of ``recollect data check``."""

    directory: Where
    """A store, or a folder of stores."""
    mend: OneWay = False
    """Make damaged blocks again, in place; not for imported episodes."""


@dataclass(frozen=True)
class DataShow:
    """Arguments of ``recollect data show``."""

    directory: Where
    """A store."""
    episode: int = 0
    """Which episode."""
    out: Annotated[Path | None, arg(metavar="FILE.png|FILE.gif")] = None
    """A strip of frames, or a film of all of them. Default: NAME-episodeI.png in this folder."""
    frames: int = 40
    """How many frames a strip has."""
    fps: float = 10.0
    """How fast a film runs."""


@dataclass(frozen=True)
class DataImport:
    """Arguments of ``recollect data import``."""

    source: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """A folder of Memory Maze's published .npz trajectories."""
    out: Folder
    """The store's folder."""
    split: Split = "train"
    """What the store calls itself."""
    workers: Count = None
    """Processes that unpack; 0: this one. Default: one for every CPU. Changes no byte."""


@dataclass(frozen=True)
class DataExport:
    """Arguments of ``recollect data export``."""

    directory: Where
    """A store."""
    to: Literal["minari"]
    """The format."""
    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """The new dataset's folder, named NAME-v0: load_dataset finds it with MINARI_DATASETS_PATH set to the one above."""


@dataclass(frozen=True)
class Envs:
    """Arguments of ``recollect envs``: those of what is done."""

    what: Annotated[Positional[Literal["play"]], arg(metavar="{play}")]
    """What to do; each has options of its own."""


@dataclass(frozen=True)
class EnvsPlay:
    """Arguments of ``recollect envs play``."""

    env: EnvName
    """An environment of `recollect list envs`."""
    overrides: Overrides = ()
    """Settings of the environment to change: width=50."""
    seed: int = 0
    """Decides the first episode."""
    script: OneWay = False
    """Watch the scripted policy instead of playing."""
    window: OneWay = False
    """Play in a window instead of the terminal (extra `play`)."""
    fps: float = 8.0
    """How fast the scripted policy walks."""


DataCommand: TypeAlias = DataMake | DataCheck | DataShow | DataImport | DataExport
NestedCommand: TypeAlias = DataCommand | EnvsPlay

DATA: dict[str, tuple[type[NestedCommand], str, str]] = {
    "make": (
        DataMake,
        "Write scripted episodes of an environment. The same command goes on after it was stopped or killed, and the "
        "same seed gives the same bytes whatever the number of workers.",
        "recollect data make distracting-memory-100 --episodes 10000 --out data/dm100\n"
        "recollect data make distracting-memory-100 width=50 --episodes 900 50 50 --split train valid test --out data\n"
        "recollect data make memory-maze-9x9 --episodes 100 --workers 8 --out data/maze\n"
        "recollect data make distracting-memory-400 --episodes 100000 --ray auto --out data/dm400",
    ),
    "check": (
        DataCheck,
        "Read every byte of a store and say which episodes are damaged or impossible. Exit code 2 where there are any.",
        "recollect data check data/dm100\nrecollect data check data/dm100 --mend",
    ),
    "show": (
        DataShow,
        "Draw an episode with its actions and rewards, split into context and query.",
        "recollect data show data/dm100\nrecollect data show data/dm100 --episode 3 --out episode.gif --fps 20",
    ),
    "import": (
        DataImport,
        "Read Memory Maze's published trajectories into a store. The same command goes on after it was stopped.",
        "recollect data import memory-maze-9x9/train --out data/maze9\n"
        "recollect data import memory-maze-9x9/eval --split test --out data/maze9-test",
    ),
    "export": (
        DataExport,
        "Write a store in another format.",
        "recollect data export data/dm100 --to minari datasets/distracting-memory-100-v0",
    ),
}

ENVS: dict[str, tuple[type[NestedCommand], str, str]] = {
    "play": (
        EnvsPlay,
        "Play an environment with the keys, or watch its scripted policy. The keys are shown below the picture.",
        "recollect envs play distracting-memory-100 width=20\n"
        "recollect envs play distracting-memory-100 --script --fps 20\n"
        "recollect envs play memory-maze-9x9 --window",
    ),
}
