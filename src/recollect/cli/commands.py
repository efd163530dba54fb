"""What each command does: one call into the library and a few lines of print."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recollect.cli import arguments, data_arguments, lm_arguments
from recollect.core.errors import RecollectError
from recollect.train.directory import RunDirectory, load_run, read_json
from recollect.train.run import RunConfig, default_directory


def execute(command: arguments.Command) -> int:
    """Carry out a parsed command; returns the exit code."""
    match command:
        case arguments.List():
            return _list(command)
        case arguments.Train():
            return _train(command)
        case arguments.Resume():
            return carry_out(_run_of(command.directory), command.directory, command)
        case arguments.Eval():
            return _eval(command)
        case arguments.Imagine():
            return _imagine(command)
        case arguments.FaceOff():
            return _faceoff(command)
        case arguments.Report():
            return _report(command.directory, command.publish)
        case arguments.Bench() | data_arguments.Data() | data_arguments.Envs() | lm_arguments.Lm():
            raise AssertionError("parsed as what it does")
        case data_arguments.EnvsPlay():
            from recollect.cli.play import play

            return play(command)
        case (
            arguments.BenchLayers() | arguments.BenchAttention() | arguments.BenchDecode() | arguments.BenchWorldmodel()
        ):
            from recollect.cli.bench import bench

            return bench(command)
        case arguments.BenchExplain():
            from recollect.cli.bench import explain

            return explain(command)
        case (
            lm_arguments.LmDemo()
            | lm_arguments.LmRandom()
            | lm_arguments.LmConvert()
            | lm_arguments.LmExport()
            | lm_arguments.LmCorpus()
            | lm_arguments.LmTokenize()
            | lm_arguments.LmTrain()
            | lm_arguments.LmEval()
            | lm_arguments.LmGenerate()
        ):
            from recollect.cli.lm import lm

            return lm(command)
        case _:
            from recollect.cli.data import data

            return data(command)


def _list(command: arguments.List) -> int:
    from recollect.cli.listing import SECTIONS, rows_of

    names = list(SECTIONS) if command.what == "all" else [command.what]
    found = {name: rows_of(name) for name in names}
    if command.json:
        print(json.dumps(found if command.what == "all" else found[command.what], indent=2))
        return 0
    for name, rows in found.items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for column in rows[0] if rows else ["name"]:
            table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column == "name")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row.values()))
        Console().print(table, "")
    return 0


def _train(command: arguments.Train) -> int:
    from dataclasses import replace

    from recollect.core.config import override
    from recollect.recipes import load_recipe

    run = replace(load_recipe(command.recipe).pick(command.row, command.group), seed=command.seed)
    run = override(run, command.overrides)
    return carry_out(run, command.out or default_directory(run), command)


def carry_out(
    run: RunConfig, directory: Path, command: arguments.Train | arguments.Resume | lm_arguments.LmTrain
) -> int:
    """Train a run where it is to be, as the command says, and print what comes of it."""
    from recollect.cli.progress import counting
    from recollect.train.loop import train
    from recollect.train.runtime import is_first_process, stop_on_signals

    with stop_on_signals() as stop:
        results = train(
            run,
            directory,
            device=command.device,
            data_workers=command.data_workers,
            compile=command.compile,
            parallel=command.parallel,
            accumulate=command.accumulate,
            recompute=command.recompute,
            progress=_print_record,
            counting=counting,
            stop=stop,
        )
    if is_first_process():
        print(f"{directory}: finished after {results['steps']} steps, {results['wall_s']:.0f} s of training")
        _print_metrics(results["metrics"])
    return 0


def _eval(command: arguments.Eval) -> int:
    from recollect.train.loop import evaluate_run
    from recollect.train.metrics import finite

    _run_of(command.directory)
    metrics = finite(evaluate_run(command.directory, best=command.best or None, device=command.device).metrics)
    if command.json:
        print(json.dumps(metrics, indent=2))
    else:
        _print_metrics(metrics)
    return 0


def _imagine(command: arguments.Imagine) -> int:
    _run_of(command.directory)
    from recollect.train.world import imagine_run

    out = command.out or command.directory / "imagined"
    written = imagine_run(command.directory, out, episodes=command.episodes, seed=command.seed)
    print(f"wrote {written}")
    return 0


def _faceoff(command: arguments.FaceOff) -> int:
    from recollect.cli.progress import counting, display
    from recollect.recipes import load_recipe
    from recollect.train.sweep import make_data, run_faceoff

    faceoff = load_recipe(command.recipe).overridden(command.overrides, command.seeds, command.lrs)
    directory = command.out or Path("runs") / command.recipe.replace(":", ".")
    # A terminated face-off leaves as an interrupted one does: what runs writes a checkpoint and ends first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if command.ray is None:
        make_data(faceoff, directory, counting, command.workers or 0)
    with display(faceoff.title) as show:
        jobs = run_faceoff(
            faceoff, directory, workers=command.workers, ray=command.ray, device=command.device, display=show
        )
    failed = [job for job in jobs if job.status == "failed"]
    if len(failed) < len(jobs):
        try:
            _report(directory)
        except RecollectError as error:
            print(
                f"recollect: {error}; the runs are safe: afterwards run: recollect report {directory}", file=sys.stderr
            )
    for job in failed:
        log = f" (log: {job.log})" if job.log.exists() else ""
        print(f"recollect: {job.name} failed: {job.error}{log}", file=sys.stderr)
    return 1 if failed else 0


def _report(directory: Path, project: Path | None = None) -> int:
    from recollect.eval.report.rates import undecided
    from recollect.eval.report.write import terminal_table, write_report

    Console().print(terminal_table(directory))
    for line in undecided(directory):
        print(line)
    print(f"report: {write_report(directory)}")
    if project is not None:
        from recollect.eval.report.publish import publish

        for path in publish(directory, project):
            print(f"published: {path}")
    return 0


def _run_of(directory: Path) -> RunConfig:
    """The config of a run's directory, with the module that defines it imported through its recipe."""
    from recollect.recipes import import_recipe

    data = read_json(RunDirectory(directory).config)
    import_recipe(str(data.get("recipe")))
    return load_run(directory)


def _print_record(record: dict[str, Any]) -> None:
    flat = {**record, **{f"eval {name}": value for name, value in record.get("eval", {}).items()}}
    shown = {name: value for name, value in flat.items() if name not in ("eval", "headline", "step")}
    print(f"step {record['step']}", *(f"{name} {_cell(value)}" for name, value in shown.items()), sep="  ", flush=True)


def _print_metrics(metrics: dict[str, float | None]) -> None:
    for name, value in metrics.items():
        print(f"  {name:<28} {_cell(value)}")


def _cell(value: object) -> str:
    """One value for a table; nested configs as ``lsh(n_keys=32 n_bits=8)``, several joined by ``+``."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4g}"
        case {"kind": kind, **rest}:
            return f"{kind}({_cell(rest)})"
        case dict():
            return " ".join(f"{key}={_cell(item)}" for key, item in value.items())
        case [dict(), *_]:
            return "+".join(map(_cell, value))
        case list():
            return ",".join(map(_cell, value))
        case _:
            return str(value)
