"""Training language models on text: new ones, or public checkpoints with attention beside their layers.

The model is ``recollect.hf.RecollectForCausalLM`` (extra ``lm``); nothing here imports transformers before it is built.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from recollect.core.config import Config, fingerprint
from recollect.core.errors import ConfigError, nearest
from recollect.core.files import locked, write_atomically
from recollect.core.layer import LayerConfig
from recollect.core.seeding import Streams
from recollect.eval.long_context import evaluate_long, perplexity_by_position
from recollect.layers import LAYERS
from recollect.layers.hax import HAX
from recollect.models.beside import Beside
from recollect.text.made import MadeCorpus
from recollect.text.rows import LongRows, PackedBatch, PackedRows
from recollect.text.store import TokenStore, open_store
from recollect.text.suite import load_suite
from recollect.text.tokenizer import load_tokenizer
from recollect.train.directory import read_json
from recollect.train.loop import load_trained, train
from recollect.train.problem import Counting, Evaluation, Problem
from recollect.train.run import ProblemConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from recollect.hf import RecollectForCausalLM

Trained = Literal["all", "attention"]
BRANCH = (".mixer.attention.", ".mixer.gate")
"""Parameters that a HAX has beyond its mixer's."""


@dataclass(frozen=True)
class SuiteQuestions(Config, kind="suite-questions"):
    """What a trained model is asked at the end (``recollect.eval.long_context``); tasks empty: all of the suite."""

    suite: str = "tiny"
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    n: int = 10
    """Prompts of each task, length and depth."""


@dataclass(frozen=True)
class LanguageConfig(ProblemConfig, kind="language"):
    """A model, its text, and how it is tested."""

    data: str | MadeCorpus
    """Folder of a token store (``recollect lm tokenize``) that holds documents out for validation; or made text."""
    model: str | RunConfig | None = None
    """The model to go on from: its folder, or the run that trains it; None: a new one of ``layers``."""
    beside: Beside | None = None
    """Sparse attention to put beside every layer of that model first."""
    layers: tuple[LayerConfig, ...] = ()
    vocab_size: int | None = None
    """Of a new model; None: the tokenizer's, rounded up to a multiple of 8."""
    trains: Trained = "all"
    """Every parameter, or those of the sparse attention beside the layers alone."""
    row_length: int = 2048
    batch_size: int = 8
    """Rows per step, over all processes."""
    min_tokens: int = 0
    """Shorter documents are not trained on."""
    aux_weight: float = 0.1
    """Of the layers' own losses, such as the ranking loss of key selection."""
    embedding_std: float = 0.02
    valid_rows: int = 16
    """Rows of held out documents that validations read."""
    lengths: tuple[int, ...] = ()
    """At the end: nats per token by position over held out documents at least so long."""
    long_rows: int = 8
    """Documents of each such length."""
    long_data: str | MadeCorpus | None = None
    """Where they are held out; None: in ``data``."""
    questions: SuiteQuestions | None = None
    """At the end: tasks of a long-context suite."""

    def __post_init__(self) -> None:
        for name in ("row_length", "batch_size", "valid_rows", "long_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"language.{name} must be at least 1, got {getattr(self, name)}")
        if self.trains not in get_args(Trained):
            raise ConfigError(f"language.trains must be one of {', '.join(get_args(Trained))}, got {self.trains!r}")
        if (self.model is None) == (not self.layers):
            raise ConfigError("language: give either model, a folder to go on from, or layers, of a new model")
        if self.model is None and self.beside is not None:
            raise ConfigError("language.beside is for a model to go on from; a new one has hax among its layers")
        if self.model is not None and self.vocab_size is not None:
            raise ConfigError("language.vocab_size is for a new model; the one to go on from has its own")

    def build(self) -> Language:
        return Language(self)


class TextBatch(NamedTuple):
    """Packed rows (B, L); see ``recollect.text.rows.PackedBatch``."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    reset: Tensor


class Language(Problem):
    """Next-token cross-entropy on packed documents; scored in nats per token on documents held out.

    Raises DataError where store or model are missing or damaged, ConfigError where their vocabularies differ.
    """

    headline = "loss"

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self._train: dict[int, PackedRows] = {}
        self._valid: PackedRows | None = None
        if config.questions is not None:
            load_suite(config.questions.suite, config.questions.tasks)
        if not isinstance(config.data, MadeCorpus):
            self._check()

    def _check(self) -> None:
        """Refuse what cannot be trained before anything is written."""
        c, vocab_size = self.config, self.config.vocab_size
        if isinstance(c.model, str):
            from recollect.hf.loading import read_config

            vocab_size = read_config(Path(c.model)).vocab_size
        if vocab_size is not None and self.store.vocab_size > vocab_size:
            raise ConfigError(
                f"{self.store.path} was made with tokenizer '{self.store.tokenizer_name}', whose ids go up to "
                f"{self.store.vocab_size}, but the model's to {vocab_size}; use the model's own tokenizer"
            )

    @cached_property
    def store(self) -> TokenStore:
        """The text, made if it is to be and not there yet."""
        return _store(self.config.data)

    def make_data(self, counting: Counting, workers: int = 0) -> None:
        """The text, and the model to go on from where a run is to train it: that run goes on if it was stopped."""
        del workers
        for data in (self.config.data, self.config.long_data):
            if isinstance(data, MadeCorpus):
                data.store(counting)
        if isinstance(self.config.model, RunConfig):
            pretrained(self.config.model, counting)

    def build_model(self) -> RecollectForCausalLM:
        """Raises ConfigError where there is nothing to train."""
        c = self.config
        if c.model is not None:
            from recollect.hf.convert import joined
            from recollect.hf.loading import load_model

            folder = pretrained(c.model) if isinstance(c.model, RunConfig) else Path(c.model)
            model = load_model(folder, torch.float32)
            if c.beside is not None:
                model = joined(model, c.beside, torch.initial_seed() % 2**31)
        else:
            from recollect.hf import RecollectConfig, RecollectForCausalLM

            config = RecollectConfig.of(
                c.layers,
                c.vocab_size or -(-self.store.vocab_size // 8) * 8,
                initializer_range=c.embedding_std,
                **{f"{name}_token_id": self.store.eos_id for name in ("bos", "eos", "pad")},
            )
            model = RecollectForCausalLM(config)
        model.config.aux_loss_weight = c.aux_weight
        if c.trains == "attention":
            names = [name for name, _ in model.named_parameters() if any(part in name for part in BRANCH)]
            if not names:
                raise ConfigError("language.trains=attention: no layer of the model has sparse attention beside it")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name in names)
        return model

    def compiled(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule("backbone")]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [block.get_submodule("mixer") for block in model.get_submodule("backbone.layers").children()]

    def batch(self, step: int, streams: Streams, device: torch.device) -> TextBatch:
        """Rows (step - 1) B .. step B - 1 of an order that the run's seed decides."""
        seed = streams.number("data", "train")
        if seed not in self._train:
            c = self.config
            documents = self.store.split("train")
            self._train[seed] = PackedRows(self.store, c.row_length, seed, documents=documents, min_length=c.min_tokens)
        return _on(self._train[seed].at_step(step, self.config.batch_size), device)

    def loss(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Deterministic given the batch and torch's own generator: ``generator`` is not used."""
        del generator
        assert isinstance(batch, TextBatch)
        loss: Any = model.get_submodule("").loss
        return loss(batch.tokens, batch.labels, batch.mask, batch.reset)

    def evaluate(self, model: nn.Module, streams: Streams, *, final: bool) -> Evaluation:
        loss, accuracy = self._held_out(model)
        metrics = {"loss": loss, "perplexity": float(np.exp(min(loss, 50.0))), "accuracy": accuracy}
        details: dict[str, Any] = {}
        if not final:
            return Evaluation(metrics, details)
        c = self.config
        by_length: dict[str, Any] = {}
        long_store = self.store if c.long_data is None else _store(c.long_data)
        for length in c.lengths:
            found = by_length[str(length)] = perplexity_by_position(
                model, long_rows(long_store, length, c.long_rows, _device(model)), block=max(1, length // 8)
            )
            # The last quarter of the row: what the model makes of all the context before it.
            late = [row for row in found["linear"] if row["from"] >= 3 * length // 4]
            metrics[f"loss_{length}"] = sum(row["nats"] * row["n"] for row in late) / sum(row["n"] for row in late)
        if c.lengths:
            details["by_position"] = by_length
        if c.questions is not None:
            q = c.questions
            asked = evaluate_long(
                model,
                load_tokenizer(self.store.tokenizer_name),
                load_suite(q.suite, q.tasks),
                lengths=q.lengths,
                depths=q.depths,
                n=q.n,
                seed=streams.number("eval", "suite") % 2**31,
            )
            details["suite"] = asked
            for row in asked["averages"]:
                metrics[f"{row['task']}_{row['length']}"] = row["found"]
        return Evaluation(metrics, details)

    def _held_out(self, model: nn.Module) -> tuple[float, float]:
        """Nats per token and the share of tokens foretold rightly, over the validation rows."""
        c = self.config
        if self._valid is None:
            self._valid = PackedRows(self.store, c.row_length, documents=self.store.split("valid"), shuffle=False)
        n_rows = min(c.valid_rows, len(self._valid))
        device = _device(model)
        summed, right, counted = 0.0, 0.0, 0
        for first in range(0, n_rows, c.batch_size):
            batch = _on(self._valid.rows(np.arange(first, min(first + c.batch_size, n_rows))), device)
            own: Any = model
            _, numbers = own.loss(*batch)
            n = int(batch.mask.sum())
            summed, right, counted = (
                summed + float(numbers["cross_entropy"]) * n,
                right + float(numbers["accuracy"]) * n,
                counted + n,
            )
        return summed / counted, right / counted

    def describe(self, model: nn.Module) -> dict[str, Any]:
        config: Any = model.config
        layers: tuple[LayerConfig, ...] = config.layer_configs()
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "trained_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "state_bytes": sum(layer.state_bytes(1, seen=self.config.row_length) for layer in layers),
            "tokens": _facts(self.store),
        }


def long_rows(store: TokenStore, length: int, n: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The first ``length`` tokens of up to ``n`` documents that a store holds out, a row each, all of them counted."""
    rows = LongRows(store, length, documents=store.split("valid"))
    batches = [torch.from_numpy(rows.rows([i]).tokens).to(device) for i in range(min(n, len(rows)))]
    return [(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in batches]


def _store(data: str | MadeCorpus) -> TokenStore:
    return data.store() if isinstance(data, MadeCorpus) else open_store(data)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _facts(store: TokenStore) -> dict[str, Any]:
    return {"documents": store.n_documents, "tokens": store.n_tokens, "tokenizer": store.tokenizer_name}


def _on(batch: PackedBatch, device: torch.device) -> TextBatch:
    arrays = (batch.tokens, batch.labels, batch.mask, batch.reset)
    return TextBatch(*(torch.from_numpy(array).to(device) for array in arrays))


RECIPE = "recollect.train.language:language_run"
"""By which runs that no face-off made find this module again."""


def language_run(
    data: str,
    *,
    model: str | None = None,
    layers: str = "4*mamba2",
    d_model: int = 256,
    trains: Trained = "all",
    steps: int = 1000,
    lr: float = 3e-4,
    row_length: int = 2048,
    batch_size: int = 8,
    min_tokens: int = 0,
    autocast: Literal["off", "bf16"] = "off",
    seed: int = 0,
) -> RunConfig:
    """One run: on the text of a store, of a new model of ``layers`` (``parse_layers``) or going on from ``model``.

    Warm-up over a fiftieth of the steps, then a cosine down to a thirtieth of the rate, as the paper's continual
    pre-training (arXiv 2507.00449, appendix D.2); weights of the last step, ten validations.
    """
    problem = LanguageConfig(
        data,
        model,
        layers=() if model else parse_layers(layers, d_model),
        trains=trains,
        row_length=row_length,
        batch_size=batch_size,
        min_tokens=min_tokens,
    )
    every = max(1, steps // 10)
    fitted = TrainConfig(
        steps,
        lr,
        warmup_steps=steps // 50,
        min_lr_ratio=1 / 30,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        autocast=autocast,
        log_every=max(1, min(50, every)),
        eval_every=every,
        checkpoint_every=every,
    )
    return RunConfig(RECIPE, "language", "new" if model is None else Path(model).name or "model", seed, problem, fitted)


def parse_layers(text: str, d_model: int) -> tuple[LayerConfig, ...]:
    """``2*mamba2+hax+mlp``: kinds of ``LAYERS`` at their defaults for a width. ConfigError for anything else."""
    layers: list[LayerConfig] = []
    for part in text.replace(" ", "").split("+"):
        count, star, kind = part.rpartition("*")
        if (star and not (count.isdigit() and int(count))) or kind not in LAYERS:
            raise ConfigError(f"--layers {text}: '{part}' is not N*KIND{nearest(kind, LAYERS)}")
        layers += [_of_width(kind, d_model)] * (int(count) if star else 1)
    return tuple(layers)


def _of_width(kind: str, d_model: int) -> LayerConfig:
    if kind == "hax":
        return HAX.Config.recommended(d_model)
    return LAYERS[kind].Config(d_model)


def pretrained(
    run: RunConfig,
    counting: Counting | None = None,
    *,
    device: str = "cpu",
    stop: Callable[[], bool] | None = None,
) -> Path:
    """The folder of the model that ``run`` trains, once for all runs that go on from it, below RECOLLECT_DATA.

    A training that was stopped goes on where it was. Raises as ``train.loop.train`` does.
    """
    directory = Path(os.environ.get("RECOLLECT_DATA", "runs/data")) / f"model-{fingerprint(run)}"
    out = directory / "model"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.parent / f"{directory.name}.lock", wait=True):
        if not out.exists():
            with nullcontext() if counting is None else counting(f"{directory}: steps of pretraining") as show:

                def told(record: dict[str, Any]) -> None:
                    if show is not None:
                        show(record["step"], run.train.steps)

                train(run, directory, device=device, progress=told, counting=counting, stop=stop)
            save_model(directory, out)
    return out


def save_model(directory: Path, out: Path | None = None) -> Path:
    """Write a finished run's model, with its tokenizer, to ``out`` (default: the folder ``model`` of the run).

    Raises RunError where there is no checkpoint, ConfigError where the run trained no language model.
    """
    from recollect.hf import RecollectForCausalLM
    from recollect.hf.convert import making
    from recollect.hf.loading import quiet

    _, problem, model = load_trained(directory)
    if not isinstance(problem, Language) or not isinstance(model, RecollectForCausalLM):
        raise ConfigError(f"{directory} holds no language model")
    out = out or directory / "model"
    if out.exists():
        shutil.rmtree(out)
    with making(out) as partial, quiet():
        model.save_pretrained(partial)
        load_tokenizer(problem.store.tokenizer_name).save(partial)
    return out


def position_losses(
    model: Any,
    data: Path,
    lengths: Sequence[int],
    out: Path,
    counting: Counting | None = None,
    stop: Callable[[], bool] | None = None,
    rows: int = 16,
) -> dict[str, Any]:
    """Nats per token by position over the documents that a store holds out, for each length that some of them have.

    By length as ``perplexity_by_position`` gives it; written to ``out``, where what is there already is kept.
    """
    store = open_store(data)
    held_out = store.split("valid")
    known: dict[str, Any] = read_json(out) if out.exists() else {}
    for length in lengths:
        if str(length) in known or not (store.lengths[held_out] >= length).any():
            continue
        known[str(length)] = perplexity_by_position(
            model, long_rows(store, length, rows, _device(model)), counting=counting, stop=stop
        )
        write_atomically(out, json.dumps(known, indent=1).encode())
    return known
