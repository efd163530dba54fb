"""Every command and its arguments. Parsing imports neither torch nor anything of ours that does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, Union, cast

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, subcommand

from recollect.cli.data_arguments import DATA, ENVS, Data, Envs, NestedCommand
from recollect.cli.lm_arguments import LM, Lm, LmCommand

Overrides: TypeAlias = Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")]
Where: TypeAlias = Annotated[Positional[Path], arg(metavar="DIR")]
Out: TypeAlias = Annotated[Path | None, arg(metavar="PATH")]
Folder: TypeAlias = Annotated[Path, arg(metavar="DIR")]
Names: TypeAlias = Annotated[tuple[str, ...], arg(metavar="NAME[,NAME ...]")]
Sizes: TypeAlias = Annotated[tuple[str, ...], arg(metavar="N[,N ...]|A..B")]
OneWay: TypeAlias = FlagCreatePairsOff[bool]
ParallelWay: TypeAlias = Literal["off", "ddp", "fsdp"]
Parts: TypeAlias = Annotated[int, arg(metavar="N")]
DataWorkers: TypeAlias = Annotated[int, arg(metavar="N")]
CompileWay: TypeAlias = Literal["off", "default", "graphs"]
RecipeName: TypeAlias = Annotated[Positional[str], arg(metavar="RECIPE")]


@dataclass(frozen=True)
class List:
    """Arguments of ``recollect list``."""

    what: Annotated[
        Positional[Literal["all", "layers", "tasks", "envs", "recipes"]],
        arg(metavar="{layers,tasks,envs,recipes}"),
    ] = "all"
    """What to list; everything by name when left out."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Train:
    """Arguments of ``recollect train``."""

    recipe: RecipeName
    """A recipe of `recollect list recipes`, or package.module:function."""
    row: str
    """Which row of the recipe to train."""
    overrides: Overrides = ()
    """Settings to change, by dotted key: train.lr=1e-3 train.steps=500."""
    group: Annotated[str | None, arg(metavar="GROUP")] = None
    """Needed only where two groups have a row of that name."""
    seed: int = 0
    """Decides initialisation, data and sampling."""
    out: Out = None
    """The run's directory. Default: runs/RECIPE/GROUP/ROW/seedN."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    data_workers: DataWorkers = 0
    """Processes that make the next batches ahead; 0: none. Changes no number, and may differ when resuming."""
    compile: CompileWay = "off"
    """default: torch.compile. graphs: with CUDA graphs. What it computes differs by rounding."""
    parallel: ParallelWay = "off"
    """ddp or fsdp: share the run with the processes that torchrun started. May differ when resuming."""
    accumulate: Parts = 1
    """Parts in which each process computes its rows of a batch, one after the other."""
    recompute: bool = False
    """Compute layers again for their gradients instead of keeping what they computed."""


@dataclass(frozen=True)
class Resume:
    """Arguments of ``recollect resume``."""

    directory: Where
    """A run's directory: one that holds config.json."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    data_workers: DataWorkers = 0
    """Processes that make the next batches ahead; 0: none. Changes no number, and may differ when resuming."""
    compile: CompileWay = "off"
    """default: torch.compile. graphs: with CUDA graphs. What it computes differs by rounding."""
    parallel: ParallelWay = "off"
    """ddp or fsdp: share the run with the processes that torchrun started. May differ when resuming."""
    accumulate: Parts = 1
    """Parts in which each process computes its rows of a batch, one after the other."""
    recompute: bool = False
    """Compute layers again for their gradients instead of keeping what they computed."""


@dataclass(frozen=True)
class Eval:
    """Arguments of ``recollect eval``."""

    directory: Where
    """A run's directory."""
    best: bool = False
    """Take the weights of the best validation; default: those that the run was tested with (train.select)."""
    json: bool = False
    """Print JSON instead of a table."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Imagine:
    """Arguments of ``recollect imagine``."""

    directory: Where
    """The directory of a world model's run."""
    out: Out = None
    """Where the strips go. Default: DIR/imagined."""
    episodes: int = 4
    """How many episodes to imagine."""
    seed: int = 0
    """Decides which episodes, and what is sampled."""


@dataclass(frozen=True)
class FaceOff:
    """Arguments of ``recollect faceoff``."""

    recipe: RecipeName
    """A recipe of `recollect list recipes`, or package.module:function."""
    overrides: Overrides = ()
    """Settings to change in every run, by dotted key: train.steps=500."""
    out: Out = None
    """Where the runs and the report go. Default: runs/RECIPE."""
    seeds: Annotated[tuple[int, ...], arg(metavar="N [N ...]")] = ()
    """Train every row once per seed. Default: the recipe's own."""
    lrs: Annotated[tuple[float, ...], arg(metavar="LR [LR ...]")] = ()
    """Train every row at each of these learning rates too; a row is reported at the one that validates best."""
    workers: Annotated[int | None, arg(metavar="N")] = None
    """Run N at a time, each in a process of its own with one thread. Default: one after the other in this process."""
    ray: Annotated[str | None, arg(metavar="[ADDRESS]")] = None
    """Run on a Ray cluster, one CPU (with --device cuda also one GPU) each: auto, local or host:port. Without an
    address: RAY_ADDRESS where it is set, else the cluster of this machine, else a new one. All nodes must see --out."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Report:
    """Arguments of ``recollect report``."""

    directory: Where
    """A face-off's directory: one that holds faceoff.json."""
    publish: Annotated[Path | None, arg(metavar="PROJECT")] = None
    """Also write results/NAME.json and docs/NAME.png below PROJECT and fill the result blocks of its Markdown files."""


@dataclass(frozen=True)
class Bench:
    """Arguments of ``recollect bench``: those of what is measured."""

    what: Annotated[
        Positional[Literal["layers", "attention", "decode", "worldmodel", "explain"]],
        arg(metavar="{layers,attention,decode,worldmodel,explain}"),
    ]
    """What to measure; each has options of its own."""


@dataclass(frozen=True)
class _Measuring:
    out: Folder = Path("runs/bench")
    """The folder of NAME.json and NAME.png. The same command measures only what is missing there."""
    seconds: float = 0.5
    """How long to repeat each measurement; at least three times, but once what takes longer than 10 s."""
    budget_seconds: float = 60.0
    """A case that is expected to take longer is skipped, and says so."""
    fresh: OneWay = False
    """Forget what the folder holds of this bench and start over."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class BenchLayers(_Measuring):
    """Arguments of ``recollect bench layers``."""

    layers: Names = ()
    """Names of `recollect list layers`, or attention-full. Default: all."""
    lengths: Sizes = ("256..131072",)
    """Sequence lengths: numbers, or A..B for doubling from A to B."""
    d_model: int = 256
    """Width of every layer."""
    batch: int = 8
    """Sequences side by side."""
    peers: bool = True
    """Also measure what could be taken instead, at the same widths."""


@dataclass(frozen=True)
class BenchAttention(_Measuring):
    """Arguments of ``recollect bench attention``."""

    lengths: Sizes = ("256..131072",)
    """Sequence lengths: numbers, or A..B for doubling from A to B."""
    heads: int = 4
    """Heads."""
    d_head: int = 32
    """Width of the queries, keys and values of a head."""
    batch: int = 1
    """Sequences side by side."""
    peers: bool = True
    """Also measure PyTorch's full attention."""


@dataclass(frozen=True)
class BenchDecode(_Measuring):
    """Arguments of ``recollect bench decode``."""

    layers: Names = ()
    """Names of `recollect list layers`, or attention-full. Default: all."""
    seen: Sizes = ("1024", "16384", "131072")
    """How many tokens came before: numbers, or A..B for doubling from A to B."""
    d_model: int = 256
    """Width of every layer."""


@dataclass(frozen=True)
class BenchWorldmodel(_Measuring):
    """Arguments of ``recollect bench worldmodel``."""

    presets: Names = ()
    """World models such as rssm, tssm, s4wm, s5wm; tssm-full is tssm that sees the whole context. Default: all."""
    lengths: Sizes = ("250", "500", "1000", "2000", "4000")
    """Frames of an episode, and of the context before imagining: numbers, or A..B for doubling from A to B."""
    observation: Literal["tiles", "pixels"] = "tiles"
    """5 x 5 tile codes, or pictures; random ones."""
    image_size: int = 64
    """Pixels along a side of the pictures: 40 or 64."""
    d_model: int = 256
    """Width of every world model."""
    batch: int = 8
    """Episodes side by side, in training and in imagination."""


@dataclass(frozen=True)
class BenchExplain:
    """Arguments of ``recollect bench explain``."""

    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the tensors."""
    length: int = 8192
    """Positions of a sequence."""


Measurement: TypeAlias = BenchLayers | BenchAttention | BenchDecode | BenchWorldmodel
Command: TypeAlias = (
    List
    | Train
    | Resume
    | Eval
    | Imagine
    | FaceOff
    | Report
    | Bench
    | Measurement
    | BenchExplain
    | Data
    | Envs
    | NestedCommand
    | Lm
    | LmCommand
)

_DESCRIPTIONS: dict[str, tuple[type[Command], str, str]] = {
    "list": (
        List,
        "Show the layers, tasks, environments or recipes there are.",
        "recollect list\nrecollect list layers --json",
    ),
    "train": (
        Train,
        "Train one row of a recipe. The same command resumes a stopped run and leaves a finished one alone.",
        "recollect train demo --row mamba2 --group recall\n"
        "recollect train demo --row gru --group world --seed 1 train.steps=500 train.lr=1e-3\n"
        "recollect train demo --row mamba2 --group recall --device cuda --data-workers 4 --compile graphs\n"
        "recollect train demo --row mamba2 --group recall train.eval_every=100 train.select=best",
    ),
    "resume": (
        Resume,
        "Start or continue the run that a directory's config.json describes.",
        "recollect resume runs/demo/recall/mamba2/seed0\n"
        "recollect resume runs/demo/recall/mamba2/seed0 --data-workers 2",
    ),
    "eval": (
        Eval,
        "Score a trained run again and print its metrics.",
        "recollect eval runs/demo/recall/mamba2/seed0\nrecollect eval runs/demo/world/gru/seed0 --best --json",
    ),
    "imagine": (
        Imagine,
        "Let a trained world model imagine, and write what it saw and what was true as strips of frames.",
        "recollect imagine runs/demo/world/mamba2/seed0 --episodes 4 --out strips",
    ),
    "faceoff": (
        FaceOff,
        "Train every row of a recipe, then write one report. The same command goes on where it was; seeds and learning "
        "rates may be added.",
        "recollect faceoff demo --out runs/demo\n"
        "recollect faceoff demo --seeds 0 1 2 --workers 4 train.steps=2000\n"
        "recollect faceoff demo --lrs 1e-3 3e-3 --seeds 0 1 2\n"
        "recollect faceoff demo --ray auto --out /shared/runs/demo",
    ),
    "report": (
        Report,
        "Write the report of a face-off again, finished or not, and print its tables.",
        "recollect report runs/demo",
    ),
    "bench": (
        Bench,
        "Measure speed, memory and state on this machine, beside what could be taken instead: of the layers, of sparse "
        "attention alone, of decoding after a long past, of world models. Options: recollect bench WHAT --help.",
        "recollect bench layers --layers gru,mamba2 --lengths 256..4096\n"
        "recollect bench attention --help\n"
        "recollect bench decode --help\n"
        "recollect bench worldmodel --help\n"
        "recollect bench explain",
    ),
    "data": (
        Data,
        "Make, check, show, import and export stores of episodes. Options: recollect data WHAT --help.",
        "recollect data make distracting-memory-100 --episodes 1000 --out data/dm100\n"
        "recollect data check data/dm100\n"
        "recollect data show data/dm100 --episode 3 --out episode.gif\n"
        "recollect data import --help\n"
        "recollect data export --help",
    ),
    "envs": (
        Envs,
        "Play an environment. Options: recollect envs play --help. What there is: recollect list envs.",
        "recollect envs play distracting-memory-100\nrecollect envs play distracting-memory-100 --script",
    ),
    "lm": (
        Lm,
        "Language models: convert public Mamba checkpoints, add sparse attention, train, ask, let write. Options: "
        "recollect lm WHAT --help.",
        "recollect lm random --out tiny\n"
        "recollect lm convert tiny --out tiny-hax --hax k=64\n"
        "recollect lm corpus --out corpus.jsonl\n"
        "recollect lm tokenize corpus.jsonl --out data/corpus\n"
        "recollect lm train --data data/corpus --model tiny-hax --out runs/lm\n"
        "recollect lm eval runs/lm/model --suite tiny --lengths 512 1024\n"
        'recollect lm generate runs/lm/model --prompt "In Paris"',
    ),
}

_BENCHES: dict[str, tuple[type[Measurement | BenchExplain], str, str]] = {
    "layers": (
        BenchLayers,
        "Tokens per second, memory, state, parameters and accuracy of every layer by length, and of its peers.",
        "recollect bench layers\n"
        "recollect bench layers --layers mamba2,hax --lengths 256..16384 --d-model 128 --threads 1\n"
        "recollect bench layers --lengths 1024 --no-peers --budget-seconds 20 --out runs/quick",
    ),
    "attention": (
        BenchAttention,
        "Time and memory of sparse attention alone, forward and backward, by length, against full attention.",
        "recollect bench attention\nrecollect bench attention --heads 8 --d-head 64 --lengths 1024..65536 --threads 1",
    ),
    "decode": (
        BenchDecode,
        "Time of one more token and bytes of state after a short and a long past.",
        "recollect bench decode\nrecollect bench decode --layers mamba2 hax attention-full --seen 1024..16384",
    ),
    "worldmodel": (
        BenchWorldmodel,
        "Training and imagination speed, memory and state of every world model by the length of its episodes.",
        "recollect bench worldmodel\n"
        "recollect bench worldmodel --presets rssm,tssm,s5wm --lengths 1000 --threads 1 --budget-seconds 120\n"
        "recollect bench worldmodel --observation pixels --image-size 40 --batch 4 --device cuda --out runs/pixels",
    ),
    "explain": (
        BenchExplain,
        "Which execution every operation would take on a device, and why; measures nothing. Also: recollect bench "
        "--explain.",
        "recollect bench explain\nrecollect bench explain --device cuda --dtype bfloat16 --length 131072",
    ),
}

_NESTED: dict[str, dict[str, tuple[Any, str, str]]] = {
    "bench": {**_BENCHES},
    "data": {**DATA},
    "envs": {**ENVS},
    "lm": {**LM},
}

_ADDRESS = re.compile(r"auto|local|ray://.+|[^/]+:\d+")
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")


def parse(argv: Sequence[str]) -> Command:
    """The command that ``argv`` spells. Prints help and exits 0, or an explanation and exits 2, as is usual."""
    words, assignments = list(argv), ()
    chosen = words[0] if words and words[0] in _DESCRIPTIONS else None
    if chosen in ("train", "faceoff") or words[:2] in (["data", "make"], ["envs", "play"], ["lm", "train"]):
        # Taken out first, so that they may stand anywhere: also after options that take several values.
        assignments = tuple(word for word in words if _ASSIGNMENT.match(word))
        words = [word for word in words if not _ASSIGNMENT.match(word)]
        words = [each for i, word in enumerate(words) for each in _with_address(word, words[i + 1 : i + 2])]
    if words[:2] == ["bench", "--explain"]:
        words[1] = "explain"
    if chosen in _NESTED and words[1:] and words[1] in _NESTED[chosen]:
        kind, text, examples = _NESTED[chosen][words[1]]
        command = _parsed(kind, f"recollect {chosen} {words[1]}", text + _indented(examples), words[2:])
        return replace(command, overrides=assignments) if assignments else command
    commands = [
        Annotated[kind, subcommand(name, description=text + _indented(examples) if chosen else text)]
        for name, (kind, text, examples) in _DESCRIPTIONS.items()
    ]
    command = _parsed(
        cast(Any, Union[tuple(commands)]),  # noqa: UP007 the members are known only here
        "recollect",
        "Sequence models that remember. Examples: recollect COMMAND --help. Version: recollect --version.",
        words,
        tyro.conf.FlagCreatePairsOff,
    )
    return replace(command, overrides=assignments) if assignments else command


def _with_address(word: str, following: Sequence[str]) -> list[str]:
    """``--ray`` may stand alone; then an empty address is filled in."""
    alone = word == "--ray" and not (following and _ADDRESS.fullmatch(following[0]))
    return [word, ""] if alone else [word]


def _parsed(kind: Any, prog: str, description: str, words: Sequence[str], *config: Any) -> Any:
    return tyro.cli(kind, prog=prog, description=description, args=words, config=config)


def _indented(examples: str) -> str:
    return "".join(["\n\nExamples:", *(f"\n    {line}" for line in examples.splitlines())])
