"""``recollect lm``: language models converted, trained, asked and let write."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from recollect.cli.lm_arguments import (
    LmCommand,
    LmConvert,
    LmCorpus,
    LmDemo,
    LmEval,
    LmExport,
    LmGenerate,
    LmRandom,
    LmTokenize,
    LmTrain,
)
from recollect.cli.progress import counting
from recollect.core.errors import ConfigError, RecollectError


def lm(command: LmCommand) -> int:
    """Carry out one of them; returns the exit code."""
    match command:
        case LmDemo():
            _demo(command)
        case LmRandom():
            _random(command)
        case LmConvert():
            _convert(command)
        case LmExport():
            from recollect.hf.convert import export

            export(command.source, command.out, print)
        case LmCorpus():
            _corpus(command)
        case LmTokenize():
            _tokenize(command)
        case LmTrain():
            _train(command)
        case LmEval():
            _eval(command)
        case LmGenerate():
            _generate(command)
    return 0


def _demo(command: LmDemo) -> None:
    from recollect.cli.arguments import parse
    from recollect.cli.commands import execute

    out = command.out

    def do(*words: object, makes: Path | None = None) -> None:
        if makes is None or not makes.exists():
            line = ["lm", *map(str, words)]
            print(f"$ recollect {shlex.join(line)}", flush=True)
            execute(parse(line))

    do("random", "--shape", "tiny", "--out", out / "public", makes=out / "public")
    do("convert", out / "public", "--out", out / "model", "--hax", "k=32", makes=out / "model")
    do("corpus", "--documents", command.documents, "--out", out / "corpus.jsonl", makes=out / "corpus.jsonl")
    do("tokenize", out / "corpus.jsonl", "--out", out / "store", makes=out / "store")
    sizes = ("--row-length", 1024, "--batch-size", 4, "--steps", command.steps, "--lr", 3e-3)
    do("train", "--data", out / "store", "--model", out / "model", *sizes, "--out", out / "run")
    tasks = ("--suite", "tiny", "--tasks", "needle-noise", "joint-recall", "--lengths", 512, 1024, "--n", 5)
    do("eval", out / "run" / "model", *tasks, "--data", out / "store", "--out", out / "long")
    do("generate", out / "run" / "model", "--prompt", "In the morning", "--n", 120)


def _random(command: LmRandom) -> None:
    from recollect.hf.random_checkpoint import write_random
    from recollect.text.tokenizer import load_tokenizer

    n = write_random(
        command.out,
        family=command.family,
        layout=command.layout,
        shape=command.shape,
        tokenizer=load_tokenizer(command.tokenizer),
        seed=command.seed,
    )
    print(f"{command.out}: {command.family} in the {command.layout} layout, {n:,} random parameters")


def _convert(command: LmConvert) -> None:
    import torch

    from recollect.hf.convert import convert, parse_hax

    convert(
        command.source,
        command.out,
        hax=None if command.hax is None else parse_hax(command.hax),
        dtype=None if command.dtype == "kept" else getattr(torch, command.dtype),
        tokenizer=command.tokenizer,
        seed=command.seed,
        say=print,
    )


def _corpus(command: LmCorpus) -> None:
    from recollect.core.files import write_atomically
    from recollect.text.suite import load_suite
    from recollect.text.suite.corpus import corpus

    lines: list[str] = []
    with counting(f"{command.out}: documents") as show:
        documents = corpus(
            command.seed,
            command.documents,
            load_suite(command.suite).tasks,
            length=command.lengths,
            prose=command.prose,
        )
        for i, document in enumerate(documents, 1):
            lines.append(json.dumps({"text": document.text, "task": document.name}, ensure_ascii=False) + "\n")
            show(i, command.documents)
    data = "".join(lines).encode()
    command.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(command.out, data)
    print(f"{command.out}: {len(lines):,} documents, {len(data):,} bytes")


def _tokenize(command: LmTokenize) -> None:
    from recollect.text.store import Progress, build_store
    from recollect.text.tokenizer import load_tokenizer
    from recollect.train.runtime import stop_on_signals

    with stop_on_signals() as stop, counting(f"{command.out}: bytes") as show:

        def told(progress: Progress) -> None:
            show(progress.done, progress.total)

        store = build_store(
            command.sources,
            command.out,
            load_tokenizer(command.tokenizer, eos=command.eos),
            field=command.field,
            split_on=command.split_on,
            min_tokens=command.min_tokens,
            valid_share=command.valid_share,
            seed=command.seed,
            workers=command.workers,
            progress=told,
            stop=stop,
        )
    skipped = "".join(f", {n:,} {why}" for why, n in store.skipped.items() if n)
    print(f"{command.out}: {store.n_documents:,} documents, {store.n_tokens:,} tokens{skipped}")


def _train(command: LmTrain) -> None:
    from recollect.cli.commands import carry_out
    from recollect.core.config import override
    from recollect.train.language import language_run, save_model
    from recollect.train.runtime import is_first_process

    run = language_run(
        str(command.data),
        model=None if command.model is None else str(command.model),
        layers=command.layers,
        d_model=command.d_model,
        trains=command.trains,
        steps=command.steps,
        lr=command.lr,
        row_length=command.row_length,
        batch_size=command.batch_size,
        min_tokens=command.min_tokens,
        autocast=command.autocast,
        seed=command.seed,
    )
    run = override(run, command.overrides)
    # What cannot be trained is told of before its directory exists.
    run.problem.build()
    carry_out(run, command.out, command)
    if is_first_process():
        print(f"model: {save_model(command.out)}")


def _eval(command: LmEval) -> None:
    from rich.console import Console

    from recollect.eval.long_context import evaluate_long
    from recollect.hf.loading import load_any
    from recollect.text.suite import load_suite
    from recollect.text.tokenizer import check_vocabulary, load_tokenizer
    from recollect.train.language import position_losses
    from recollect.train.runtime import resolve_device, stop_on_signals

    device = resolve_device(command.device)
    model: Any = load_any(command.model)
    model.to(device)
    tokenizer = load_tokenizer(command.tokenizer or command.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    name = Path(command.model).name
    suite = load_suite(command.suite, command.tasks)
    with stop_on_signals() as stop:
        asked = evaluate_long(
            model,
            tokenizer,
            suite,
            lengths=command.lengths or None,
            depths=command.depths or None,
            n=command.n,
            seed=command.seed,
            name=name,
            out=command.out / "suite.json",
            fresh=command.fresh,
            counting=counting,
            stop=stop,
        )
        positions = None
        if command.data is not None:
            lengths = command.lengths or suite.lengths
            positions = position_losses(model, command.data, lengths, command.out / "positions.json", counting, stop)
    Console().print(_scores(asked))
    _draw(command.out, name, asked, positions)


def _scores(asked: dict[str, Any]) -> Any:
    from rich.table import Table

    lengths = sorted({row["length"] for row in asked["averages"]})
    table = Table(title="answers found, %", title_justify="left", box=None, pad_edge=False)
    table.add_column("task")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    cells = {(row["task"], row["length"]): row["found"] for row in asked["averages"]}
    for task in dict.fromkeys(row["task"] for row in asked["averages"]):
        found = [cells.get((task, length)) for length in lengths]
        table.add_row(task, *("" if value is None else f"{100 * value:.1f}" for value in found))
    return table


def _draw(out: Path, name: str, asked: dict[str, Any], positions: dict[str, Any] | None) -> None:
    """The pictures, where there is matplotlib; otherwise one line that says what is missing."""
    from recollect.core.files import write_atomically
    from recollect.eval.long_pictures import draw_heat_maps, draw_positions

    try:
        pictures = {"suite.png": draw_heat_maps({name: asked})}
        if positions:
            pictures["positions.png"] = draw_positions({name: positions[max(positions, key=int)]})
    except RecollectError as error:
        print(f"no pictures: {error}")
        return
    for file, data in pictures.items():
        write_atomically(out / file, data)
        print(f"picture: {out / file}")


def _generate(command: LmGenerate) -> None:
    from recollect.hf.loading import load_model
    from recollect.hf.stream import Stream
    from recollect.text.tokenizer import check_vocabulary, load_tokenizer
    from recollect.train.runtime import resolve_device

    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    if not prompt:
        raise ConfigError("--prompt is empty; give some text to go on from")
    model = load_model(Path(command.model)).to(resolve_device(command.device)).eval()  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(command.tokenizer or command.model)
    check_vocabulary(tokenizer, model.config.vocab_size)
    written = Stream(
        model,
        tokenizer,
        prompt,
        command.n,
        temperature=command.temperature,
        top_p=command.top_p,
        seed=command.seed,
    )
    print(prompt, end="", flush=True)
    for piece in written:
        print(piece, end="", flush=True)
    print()
    print(written.summary, file=sys.stderr)
