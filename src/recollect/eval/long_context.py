"""What a language model finds again in a long text: scores by task, length and depth, and perplexity by position.

The tasks are those of ``recollect.text.suite``: ours, and their scores comparable with no other suite's. Two scores for
each, on the very same prompts:

- *found*: the share of answers in the greedy continuation, letter by letter and as whole words;
- *nll* and *exact*: the mean of -log p of the answers' own tokens with the completion given so far (teacher-forced),
  and the share of prompts with every one of these tokens the most probable one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import recollect
from recollect.core.config import differences, to_dict
from recollect.core.errors import ConfigError, RunError
from recollect.core.files import write_atomically
from recollect.eval.long_models import CHUNK, LongModel, as_long_model, at_rest
from recollect.text.suite import Prompt, Suite, load_suite, prompt_of
from recollect.text.suite.base import TooShortError
from recollect.train.problem import Counting
from recollect.train.runtime import git_state
from recollect.train.stopping import StoppedError

SCHEMA = 1

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]

PROBE = "In Paris, the code for apple is 4821. éü\n"
"""What a tokenizer is recognised by that has no fingerprint."""

SCORES = ("found", "nll", "exact")


class Tokenizer(Protocol):
    """What is asked of a tokenizer: those of ``recollect.text.tokenizer`` have it."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Case(NamedTuple):
    """One cell of the heat map."""

    task: str
    length: int
    depth: float | None

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.task} at {self.length:,}" + ("" if self.depth is None else f", depth {self.depth:g}")


@dataclass(frozen=True)
class _Asked:
    """A prompt as tokens."""

    prompt: Prompt
    ids: list[int]
    answer: list[int]
    """The whole completion."""
    counts: list[bool]
    """Which of its tokens belong to an answer."""


def evaluate_long(
    model: Any,
    tokenizer: Tokenizer,
    suite: Suite | str,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    n: int = 20,
    seed: int = 0,
    slack: int = 8,
    batch_tokens: int = 16_384,
    name: str = "model",
    out: Path | None = None,
    fresh: bool = False,
    counting: Counting | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Ask ``n`` prompts of every task, length and depth, and return the scores as JSON data.

    ``model`` is a ``LanguageModel``, a causal language model of transformers, or anything with the methods of
    ``LongModel``. Prompt, answer and ``slack`` further tokens together are at most ``length`` tokens; the continuation
    is read up to that slack or the end token. A case is the same prompts whatever else is asked, so models and runs can
    be compared prompt by prompt. As many prompts are read at once as make ``batch_tokens``. Tasks that do not fit a
    length are left out of it, with the reason in the row.

    With ``out`` every finished case is written there, and the same call goes on with what is missing; other lengths,
    depths and tasks may join later. ``counting`` shows how far it is, in tokens; ``stop`` is asked after every batch.

    Raises StoppedError when ``stop`` says yes; RunError when ``out`` holds results of another model, tokenizer, seed or
    task (unless ``fresh``); ConfigError for sizes that cannot be meant.
    """
    suite = load_suite(suite) if isinstance(suite, str) else suite
    reader = as_long_model(model)
    lengths = tuple(suite.lengths if lengths is None else lengths)
    depths = tuple(suite.depths if depths is None else depths)
    _check(lengths, depths, n, slack, batch_tokens)
    head = {
        "schema": SCHEMA,
        "name": name,
        "weights": weights_digest(model),
        "tokenizer": _tokenizer_digest(tokenizer),
        "seed": seed,
        "n": n,
        "slack": slack,
        "tasks": {task: to_dict(config) for task, config in suite.tasks.items()},
    }
    record = _Record(head, out, fresh)
    cases = [
        Case(task, length, depth)
        for length in sorted(set(lengths))
        for task, config in suite.tasks.items()
        for depth in (sorted(set(depths)) if config.build().has_depth else (None,))
    ]
    commit = git_state(Path(recollect.__file__).parent)["commit"]
    todo = [case for case in cases if case not in record.rows]
    total, done = sum(case.length for case in cases) * n, sum(case.length for case in cases if case in record.rows) * n

    def stopping() -> None:
        if stop is not None and stop():
            finished = sum(case in record.rows for case in cases)
            where = "" if out is None else f" of {out}; the same command goes on"
            raise StoppedError(f"stopped after {finished} of {len(cases)} cases{where}")

    with at_rest(reader), nullcontext(_silent) if counting is None else counting(f"{name}: tokens read") as show:
        show(done, total)
        for case in todo:
            with record.kept():
                started = time.perf_counter()
                try:
                    depth = 0.5 if case.depth is None else case.depth
                    config = suite.tasks[case.task]
                    prompts = [
                        prompt_of(case.task, config, seed, case.length, depth, i, tokenizer, reserve=slack)
                        for i in range(n)
                    ]
                except TooShortError as error:
                    record.put(case, {"status": "left out", "why": str(error)})
                else:

                    def shown(k: int, before: int = done, length: int = case.length) -> None:
                        show(before + k * length, total)
                        if k < n:
                            stopping()

                    scores = _case_scores(reader, tokenizer, prompts, slack, batch_tokens, shown)
                    seconds = round(time.perf_counter() - started, 3)
                    record.put(case, {"status": "measured", **scores, "seconds": seconds, "commit": commit})
            done += case.length * n
            show(done, total)
            if case is not todo[-1]:
                stopping()
    return record.result(list(suite.tasks))


def _check(lengths: Sequence[int], depths: Sequence[float], n: int, slack: int, batch_tokens: int) -> None:
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"long context: lengths must be positive, got {list(lengths)}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"long context: depths must lie in [0, 1], got {list(depths)}")
    if n < 1 or slack < 0 or batch_tokens < 1:
        raise ConfigError(
            f"long context: n {n} and batch_tokens {batch_tokens} must be at least 1, slack {slack} at least 0"
        )


def _case_scores(
    model: LongModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    slack: int,
    batch_tokens: int,
    shown: Callable[[int], None],
) -> Row:
    """Means and standard errors over the prompts of one case."""
    asked = [_asked(prompt, tokenizer) for prompt in prompts]
    size = max(1, batch_tokens // max(len(each.ids) for each in asked))
    scores: list[tuple[float, float, float]] = []
    for start in range(0, len(asked), size):
        scores += _batch_scores(model, tokenizer, asked[start : start + size], slack)
        shown(len(scores))
    columns = dict(zip(SCORES, np.array(scores, dtype=np.float64).T, strict=True))
    row: Row = {"n": len(prompts), "tokens": float(np.mean([len(each.ids) + len(each.answer) for each in asked]))}
    for name, values in columns.items():
        row[name] = float(values.mean())
        row[f"{name}_se"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    for name in ("chance", "guesser"):
        known = [value for prompt in prompts if (value := getattr(prompt, name)) is not None]
        row[name] = float(np.mean(known)) if len(known) == len(prompts) else None
    return row


def _asked(prompt: Prompt, tokenizer: Tokenizer) -> _Asked:
    answer = list(tokenizer.encode(prompt.completion))
    counts = [False] * len(answer)
    for start, end in prompt.answer_spans:
        # The space before a word is part of its first token in most vocabularies, and a token of its own in bytes.
        before = list(tokenizer.encode(prompt.completion[:start]))
        if before != answer[: len(before)]:
            before = tokenizer.encode(prompt.completion[: start - 1])
        last = len(tokenizer.encode(prompt.completion[:end]))
        counts[len(before) : last] = [True] * (last - len(before))
    return _Asked(prompt, list(tokenizer.encode(prompt.text)), answer, counts)


def _batch_scores(
    model: LongModel, tokenizer: Tokenizer, asked: Sequence[_Asked], slack: int
) -> list[tuple[float, float, float]]:
    """(found, nll, exact) of every prompt."""
    fill = tokenizer.eos_id
    longest, n_answer = max(len(each.ids) for each in asked), max(len(each.answer) for each in asked)
    prompt = torch.full((len(asked), longest), fill, dtype=torch.int64)
    answers = torch.full((len(asked), n_answer), fill, dtype=torch.int64)
    real, counts = torch.zeros(prompt.shape, dtype=torch.bool), torch.zeros(answers.shape, dtype=torch.bool)
    for i, each in enumerate(asked):
        prompt[i, longest - len(each.ids) :] = torch.tensor(each.ids)
        real[i, longest - len(each.ids) :] = True
        answers[i, : len(each.answer)] = torch.tensor(each.answer)
        counts[i, : len(each.counts)] = torch.tensor(each.counts)
    continued = model.generate(prompt, n_answer + slack, real)
    logits = model.forced(prompt, answers, real).float().cpu()
    nll = -logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    nll = torch.where(counts, nll, 0.0).sum(1) / counts.sum(1)
    exact = ((logits.argmax(-1) == answers) | ~counts).all(1)
    found = [
        each.prompt.found(_read(tokenizer, ids[: len(each.answer) + slack]))
        for each, ids in zip(asked, continued.tolist(), strict=True)
    ]
    return list(zip(found, nll.tolist(), exact.float().tolist(), strict=True))


def _read(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text up to the end token."""
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[:end])


def weights_digest(model: Any) -> str:
    """Twelve digits that tell checkpoints of one model apart: names, shapes and first values of its parameters."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        few = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + few)
    return digest.hexdigest()[:12]


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    fingerprint = getattr(tokenizer, "fingerprint", None) or json.dumps(list(tokenizer.encode(PROBE)))
    return hashlib.sha256(f"{fingerprint}{tokenizer.eos_id}".encode()).hexdigest()[:12]


def _silent(done: int, total: int) -> None:
    del done, total


class _Record:
    """What was measured so far, in the file ``out`` if there is one."""

    def __init__(self, head: dict[str, Any], out: Path | None, fresh: bool) -> None:
        self.head: dict[str, Any] = json.loads(json.dumps(head))
        self.out = out
        self.rows: dict[Case, Row] = {}
        if out is not None and out.exists() and not fresh:
            self._read(out)

    def _read(self, out: Path) -> None:
        try:
            data: dict[str, Any] = json.loads(out.read_text())
            tasks: dict[str, Any] = data["tasks"]
            rows = {Case(row["task"], row["length"], row["depth"]): row for row in data["rows"]}
            old = {key: data[key] for key in self.head if key != "tasks"}
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"'{out}' is no record of a long-context evaluation; give another file, or fresh") from None
        both = {name: task for name, task in self.head["tasks"].items() if name in tasks}
        changed = differences(
            {**old, "tasks": {name: tasks[name] for name in both}},
            {**{key: self.head[key] for key in old}, "tasks": both},
        )
        if changed and rows:
            raise RunError(
                f"'{out}' holds results of something else ({'; '.join(changed)}); give another file, or fresh"
            )
        self.rows = rows
        self.head["tasks"] = {**tasks, **self.head["tasks"]}

    @contextmanager
    def kept(self) -> Generator[None]:
        """Write the file when what is inside went well."""
        yield
        if self.out is not None:
            write_atomically(self.out, (json.dumps(self.result(list(self.head["tasks"])), indent=1) + "\n").encode())

    def put(self, case: Case, row: Row) -> None:
        self.rows[case] = {**case._asdict(), **row}

    def result(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON data, rows in the order of the tasks, then length and depth."""
        place = {name: i for i, name in enumerate(tasks)}
        order = sorted(self.rows, key=lambda c: (place.get(c.task, len(place)), c.task, c.length, c.depth or 0.0))
        rows = [self.rows[case] for case in order]
        return {**self.head, "averages": averages(rows), "rows": rows}


def averages(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Scores by task and length, depths weighing alike; and of ``all`` tasks, each weighing alike, where every task
    that is measured anywhere is measured.
    """
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "measured":
            cells.setdefault((row["task"], row["length"]), []).append(row)
    found: list[Row] = [{"task": task, "length": length, **_means(cell)} for (task, length), cell in cells.items()]
    tasks = {row["task"] for row in found}
    for length in sorted({row["length"] for row in found}):
        there = [row for row in found if row["length"] == length]
        if len(there) == len(tasks) > 1:
            found.append({"task": "all", "length": length, **_means(there)})
    return found


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in SCORES}


@torch.no_grad()
def perplexity_by_position(
    model: Any,
    rows: Iterable[tuple[Tensor, Tensor]],
    block: int = 256,
    *,
    chunk: int = CHUNK,
    counting: Counting | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Mean -log p in nats per token, by how many tokens of its row stand before it.

    ``rows`` yields (tokens (B, L) int64, mask (B, L) bool): a row is one text from its beginning, and a token counts
    where the mask is true. A row's first token is not foretold and never counts. Bins: ``linear``, of ``block``
    positions each, and ``geometric``, of positions 1, 2-3, 4-7, ...; each tells its first position, the one after its
    last, nats, the standard error over rows, and how many tokens it holds; empty ones are left out. At most ``chunk``
    positions' logits exist at a time. Raises StoppedError when ``stop``, asked after every batch, says yes.
    """
    if block < 1 or chunk < 1:
        raise ConfigError(f"perplexity by position: block {block} and chunk {chunk} must be at least 1")
    reader = as_long_model(model)
    nats: list[Floats] = []
    with at_rest(reader), nullcontext(_silent) if counting is None else counting("perplexity: batches") as show:
        total = len(rows) if isinstance(rows, Sized) else 0
        for done, (tokens, mask) in enumerate(rows):
            if stop is not None and stop():
                raise StoppedError(f"perplexity by position was stopped after {done} batches")
            if tokens.shape != mask.shape or tokens.shape[1] < 2:
                raise ConfigError(
                    f"perplexity by position: tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must be of one "
                    "shape, two tokens or more"
                )
            found = reader.nll(tokens, chunk).double().cpu().numpy()
            nats += list(np.where(mask[:, 1:].cpu().numpy(), found, np.nan))
            if total:
                show(done + 1, total)
    longest = max((len(row) for row in nats), default=0)
    table = np.full((len(nats), longest), np.nan)
    for i, row in enumerate(nats):
        table[i, : len(row)] = row
    n_tokens = int(np.isfinite(table).sum())
    if not n_tokens:
        raise ConfigError("perplexity by position: no token counts; the rows or their masks are empty")
    mean = float(np.nansum(table) / n_tokens)
    return {
        "block": block,
        "n_rows": len(nats),
        "n_tokens": n_tokens,
        "nats": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "linear": _bins(table, [0, *range(block, longest + 1, block), longest + 1]),
        "geometric": _bins(table, [1 << e for e in range((longest + 1).bit_length() + 1)]),
    }


def _bins(table: Floats, edges: Sequence[int]) -> list[Row]:
    """Means over bins of columns; column p - 1 is the token with p before it."""
    bins: list[Row] = []
    for start, end in pairwise(edges):
        part = table[:, max(start, 1) - 1 : end - 1]
        counts, sums = np.isfinite(part).sum(1), np.nansum(part, 1)
        n = int(counts.sum())
        if n:
            mean = float(sums.sum() / n)
            # Tokens of a row are not independent: the error is that of a ratio of sums over rows.
            n_rows = int((counts > 0).sum())
            spread = float(np.square(sums - mean * counts).sum())
            error = math.sqrt(spread * n_rows / (n_rows - 1)) / n if n_rows > 1 else None
            bins.append({"from": max(start, 1), "to": end, "nats": mean, "se": error, "n": n})
    return bins
