"""Arguments of the commands under ``recollect lm``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from tyro.conf import FlagCreatePairsOff, Positional, arg

Overrides: TypeAlias = Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")]
Model: TypeAlias = Annotated[Positional[str], arg(metavar="MODEL")]
Folder: TypeAlias = Annotated[Path, arg(metavar="DIR")]
Numbers: TypeAlias = Annotated[tuple[int, ...], arg(metavar="N [N ...]")]
OneWay: TypeAlias = FlagCreatePairsOff[bool]

COMMANDS = ("demo", "random", "convert", "export", "corpus", "tokenize", "train", "eval", "generate")


@dataclass(frozen=True)
class Lm:
    """Arguments of ``recollect lm``: those of what is done."""

    what: Annotated[Positional[Literal[COMMANDS]], arg(metavar="{" + ",".join(COMMANDS) + "}")]  # pyright: ignore[reportInvalidTypeForm] a literal tuple
    """What to do; each has options of its own."""


@dataclass(frozen=True)
class LmDemo:
    """Arguments of ``recollect lm demo``."""

    out: Folder = Path("runs/lm-demo")
    """Where everything goes."""
    steps: int = 600
    """Training steps: some four minutes on two cores."""
    documents: Annotated[int, arg(metavar="N")] = 1500
    """Documents of self-made text."""


@dataclass(frozen=True)
class LmRandom:
    """Arguments of ``recollect lm random``."""

    out: Folder
    """The checkpoint's folder."""
    family: Literal["mamba", "mamba2"] = "mamba2"
    """Which model."""
    layout: Literal["transformers", "state-spaces"] = "transformers"
    """How the files are laid out."""
    shape: Literal["tiny", "small", "130m"] = "tiny"
    """Its size; 130m is that of the public models."""
    tokenizer: str = "bytes"
    """bytes, a folder, a tokenizer.json or a name on the hub; saved with it."""
    seed: int = 0
    """Decides the weights."""


@dataclass(frozen=True)
class LmConvert:
    """Arguments of ``recollect lm convert``."""

    source: Annotated[Positional[str], arg(metavar="SRC")]
    """A public checkpoint: a folder, or a name on the hub."""
    out: Folder
    """The model's folder."""
    hax: Annotated[tuple[str, ...] | None, arg(metavar="[k=N] [pattern=NAME] [gate=X] [planes=fixed|redrawn]")] = None
    """Put sparse attention beside every layer. Alone: 128 keys, hashed and selected, with a gate of 0 that leaves the
    outputs as they are. Patterns: D, SW, SW+D, A, LSH, KS, HAX."""
    dtype: Literal["kept", "float32", "bfloat16"] = "kept"
    """What the weights are stored in."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """Save this tokenizer with the model instead of what lies beside the weights."""
    seed: int = 0
    """Decides what the checkpoint does not have."""


@dataclass(frozen=True)
class LmExport:
    """Arguments of ``recollect lm export``."""

    source: Annotated[Positional[Path], arg(metavar="DIR")]
    """A model of ours."""
    out: Folder
    """The folder in the transformers layout."""


@dataclass(frozen=True)
class LmCorpus:
    """Arguments of ``recollect lm corpus``."""

    out: Annotated[Path, arg(metavar="FILE.jsonl")]
    """Where the text goes, a document a line."""
    documents: Annotated[int, arg(metavar="N")] = 2000
    """How many."""
    lengths: Annotated[tuple[int, int], arg(metavar="SHORTEST LONGEST")] = (512, 4096)
    """Of documents, in bytes."""
    prose: float = 0.5
    """The share that is plain prose; the rest are solved tasks."""
    suite: str = "tiny"
    """The suite whose tasks are solved in it."""
    seed: int = 0
    """Decides the text."""


@dataclass(frozen=True)
class LmTokenize:
    """Arguments of ``recollect lm tokenize``."""

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE [SOURCE ...]")]
    """Files (.txt, .md, .jsonl, .parquet), folders of them, or datasets:NAME[:CONFIG]:SPLIT."""
    out: Folder
    """The token store's folder."""
    tokenizer: str = "bytes"
    """bytes, a folder, a tokenizer.json or a name on the hub."""
    eos: Annotated[str | None, arg(metavar="TOKEN")] = None
    """The token that ends documents, where the tokenizer has none."""
    field: str = "text"
    """Which field or column holds the text."""
    split_on: Annotated[str | None, arg(metavar="blank-lines|TEXT")] = None
    """Cut plain text into documents there. Default: a file is a document."""
    min_tokens: int = 0
    """Leave shorter documents out."""
    valid_share: float = 0.05
    """Share of the documents held out for validation."""
    seed: int = 0
    """Decides which."""
    workers: Annotated[int, arg(metavar="N")] = 0
    """Processes that tokenise; 0: this one. Changes no byte."""


@dataclass(frozen=True)
class LmTrain:
    """Arguments of ``recollect lm train``."""

    data: Folder
    """A token store with documents held out."""
    out: Folder
    """The run's directory; the trained model goes into its folder model."""
    model: Annotated[Path | None, arg(metavar="DIR")] = None
    """A model of ours to go on from. Default: a new one of --layers."""
    overrides: Overrides = ()
    """Settings of the run to change: train.lr=1e-4 problem.aux_weight=0."""
    layers: Annotated[str, arg(metavar="N*KIND[+N*KIND ...]")] = "4*mamba2"
    """Layers of a new model, in order: kinds of `recollect list layers`; mlp is one."""
    d_model: int = 256
    """Width of a new model."""
    trains: Literal["all", "attention"] = "all"
    """Every parameter, or those of the attention beside the layers alone."""
    steps: int = 1000
    """Optimizer steps."""
    lr: float = 3e-4
    """The highest rate; it is warmed up to over a fiftieth of the steps, and falls along a cosine to a thirtieth."""
    row_length: int = 2048
    """Tokens of a row; documents are packed into it, with resets between them."""
    batch_size: int = 8
    """Rows of a step, over all processes."""
    min_tokens: int = 0
    """Train on documents at least so long."""
    autocast: Literal["off", "bf16"] = "off"
    """Compute in bfloat16 where that is safe."""
    seed: int = 0
    """Decides initialisation and the order of the text."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    data_workers: Annotated[int, arg(metavar="N")] = 0
    """Processes that make the next batches ahead."""
    compile: Literal["off", "default", "graphs"] = "off"
    """Compile the layers with torch.compile; "graphs" also records CUDA graphs."""
    parallel: Literal["off", "ddp", "fsdp"] = "off"
    """ddp or fsdp: share the run with the processes that torchrun started."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Parts in which each process computes its rows of a batch, one after the other."""
    recompute: bool = False
    """Compute layers again for their gradients instead of keeping what they computed."""


@dataclass(frozen=True)
class LmEval:
    """Arguments of ``recollect lm eval``."""

    model: Model
    """A model of ours, or any causal language model that transformers reads: a folder or a name on the hub."""
    suite: str = "long"
    """Which tasks: long, or tiny for small models."""
    tasks: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")] = ()
    """Only these tasks of it."""
    lengths: Numbers = ()
    """Tokens of prompt and answer. Default: the suite's own."""
    depths: Annotated[tuple[float, ...], arg(metavar="X [X ...]")] = ()
    """Where needles lie, 0 at the beginning and 1 at the end. Default: the suite's own."""
    n: int = 20
    """Prompts of each task, length and depth."""
    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also measure nats per token by position on the documents that this token store holds out."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """Default: the model's own."""
    out: Folder = Path("runs/long")
    """Where the record and the heat maps go. The same command measures only what is missing there."""
    seed: int = 0
    """Decides the prompts."""
    fresh: OneWay = False
    """Forget what the folder holds and start over."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class LmGenerate:
    """Arguments of ``recollect lm generate``."""

    model: Model
    """A model of ours: its folder."""
    prompt: str
    """The text to go on from; - reads it from standard input."""
    n: int = 200
    """Most tokens to write."""
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share."""
    seed: int = 0
    """Decides what is drawn."""
    tokenizer: Annotated[str | None, arg(metavar="NAME")] = None
    """Default: the model's own."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""


LmCommand: TypeAlias = LmDemo | LmRandom | LmConvert | LmExport | LmCorpus | LmTokenize | LmTrain | LmEval | LmGenerate

LM: dict[str, tuple[type[LmCommand], str, str]] = {
    "demo": (
        LmDemo,
        "All in a row on a CPU: a random checkpoint in the public layout, attention beside its layers, self-made "
        "text, some minutes of training, questions, and a continuation. The same command goes on where it was.",
        "recollect lm demo\nrecollect lm demo --steps 100 --out runs/quick",
    ),
    "random": (
        LmRandom,
        "Write a checkpoint of random weights in a public layout, to try the rest with.",
        "recollect lm random --out tiny\nrecollect lm random --family mamba --layout state-spaces --out tiny-mamba",
    ),
    "convert": (
        LmConvert,
        "Read a public Mamba or Mamba-2 checkpoint as a model of ours, with sparse attention beside its layers or not.",
        "recollect lm convert state-spaces/mamba2-130m --out mamba2-130m --tokenizer EleutherAI/gpt-neox-20b\n"
        "recollect lm convert tiny --out tiny-hax --hax k=64\n"
        "recollect lm convert tiny --out tiny-window --hax k=64 pattern=SW",
    ),
    "export": (
        LmExport,
        "Write a model of ours in the transformers layout, without its attention.",
        "recollect lm export runs/lm/model --out mamba2-again",
    ),
    "corpus": (
        LmCorpus,
        "Write self-made text: prose with facts that come back, and solved tasks of a long-context suite.",
        "recollect lm corpus --documents 2000 --out corpus.jsonl",
    ),
    "tokenize": (
        LmTokenize,
        "Turn text into a token store. A finished store is left alone.",
        "recollect lm tokenize corpus.jsonl --out data/corpus\n"
        "recollect lm tokenize books --tokenizer EleutherAI/gpt-neox-20b --min-tokens 2048 --out data/books",
    ),
    "train": (
        LmTrain,
        "Train a model on a token store. The same command resumes; under torchrun it runs on several processes.",
        "recollect lm train --data data/corpus --layers 4*mamba2 --d-model 128 --steps 2000 --out runs/lm\n"
        "recollect lm train --data data/corpus --model tiny-hax --trains attention --out runs/lm-hax\n"
        "recollect lm train --data data/books --model tiny-hax --autocast bf16 --device cuda --out runs/books",
    ),
    "eval": (
        LmEval,
        "Ask a model the tasks of a long-context suite, and measure its nats per token by position.",
        "recollect lm eval runs/lm/model --suite tiny --lengths 512 1024 2048 --data data/corpus --out runs/lm/long\n"
        "recollect lm eval mamba2-130m --tasks needle joint-recall --lengths 2048 4096 --n 10",
    ),
    "generate": (
        LmGenerate,
        "Go on with a text, token by token, and say how large the state is.",
        'recollect lm generate runs/lm/model --prompt "In Paris, the code for apple is" --n 50\n'
        "recollect lm generate runs/lm/model --prompt - --temperature 0.8 --top-p 0.95 < story.txt",
    ),
}
