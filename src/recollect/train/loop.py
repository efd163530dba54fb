"""The training loop. A run is a function of its config: stop it anywhere, start it again, and it ends in the same bits.

Step n reads the batch and the generator addressed by n, and the global generator is seeded by n before the loss, so
parameters, optimizer moments and the step number are all there is to keep. The same bits are promised on the same
device with the same number of threads and the same ``compile``; a ``time_limit_s`` ends a run by the clock, which no
resumption can repeat.

Device, compilation and data workers are arguments and not part of the config: they say how a run is carried out, not
which run it is, and one may be resumed under others. Workers do not change a bit; the other two change rounding, as
another machine does. ``environment.json`` records them for every start.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.core.config import fingerprint
from recollect.core.errors import RunError
from recollect.core.files import write_atomically
from recollect.core.seeding import Streams
from recollect.train import checkpoint as ckpt
from recollect.train.batches import digest, to_safetensors
from recollect.train.compilation import Compile, as_written, check_compile, compile_modules, compiled_step
from recollect.train.directory import RunDirectory, load_run, read_json
from recollect.train.metrics import MetricsLog, finite
from recollect.train.optimizer import build_optimizer, learning_rate
from recollect.train.prefetch import Take, batches, check_workers
from recollect.train.problem import Counting, Evaluation, Problem
from recollect.train.run import RunConfig
from recollect.train.runtime import environment, resolve_device
from recollect.train.watch import Bad, FiniteWatch

Progress = Callable[[dict[str, Any]], None]


class StoppedError(RunError):
    """The run was asked to stop and left a checkpoint behind; the same command goes on from it."""


def train(
    run: RunConfig,
    directory: Path,
    *,
    device: str = "cpu",
    data_workers: int = 0,
    compile: Compile = "off",  # noqa: A002
    progress: Progress | None = None,
    counting: Counting | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Carry out ``run`` in ``directory``, going on from its newest checkpoint; returns what ``results.json`` holds.

    A finished run is not run again. ``data_workers`` processes make batches ahead (0: this one makes them);
    ``compile`` is "off", "default" (``torch.compile``) or "graphs" (with CUDA graphs). ``progress`` is called with
    every record of ``metrics.jsonl``, ``counting`` shows how far data is that has to be made first; ``stop`` is asked
    after every step and every piece of that data. A script that uses data workers must start
    under ``if __name__ == "__main__":``, as they import it.

    Raises StoppedError when ``stop`` says yes, and RunError when the directory belongs to another config or process, a
    checkpoint is damaged, a worker dies, or the loss is no longer finite (the last good checkpoint is kept and the
    offending batch saved).
    """
    where = RunDirectory(directory)
    on = resolve_device(device)
    check_workers(data_workers)
    check_compile(compile, on)
    where.claim(run)
    with where.lock():
        if (results := where.finished(run)) is not None:
            return results
        if counting is not None:
            run.problem.build().make_data(_stoppable(counting, stop, directory), data_workers)
        _record_environment(where, on, {"data_workers": data_workers, "compile": compile})
        with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
            loop = _Loop(run, where, on, compile)
            with batches(run, loop.problem, loop.step + 1, on, data_workers) as take:
                return loop.run(take, progress or (lambda _: None), stop or (lambda: False))


def _stoppable(counting: Counting, stop: Callable[[], bool] | None, directory: Path) -> Counting:
    """The same, but that a count ends with StoppedError where ``stop`` says yes."""

    @contextmanager
    def counted(title: str) -> Generator[Callable[[int, int], None]]:
        with counting(title) as show:

            def ask(done: int, total: int) -> None:
                show(done, total)
                if stop is not None and stop() and done < total:
                    raise StoppedError(
                        f"stopped after {done} of {total} of the data that {directory} needs; the same command goes on"
                    )

            yield ask

    return counted


def load_trained(
    directory: Path, *, best: bool | None = None, device: str = "cpu"
) -> tuple[RunConfig, Problem, nn.Module]:
    """The config, problem and trained model (eval mode, averaged weights where the run kept them) of a directory.

    ``best`` takes the weights of the best validation instead of the last ones; None takes those the run itself is
    tested with (``train.select``). Problems and layers of one's own must have been imported. Raises RunError when there
    is no such checkpoint or it is damaged.
    """
    run = load_run(directory)
    best = run.train.select == "best" if best is None else best
    problem = run.problem.build()
    model = _initial_model(problem, Streams(run.seed)).to(resolve_device(device))
    folder = RunDirectory(directory).checkpoints
    stems = ckpt.stems(folder, "best" if best else "step")
    if best and not stems and run.train.eval_every == 0:
        raise RunError(f"{directory} has no best checkpoint: it was trained with train.eval_every=0; leave out --best")
    if not stems:
        what = "best checkpoint" if best else "checkpoint"
        raise RunError(f"{directory} has no {what} yet; train it first with: recollect resume {directory}")
    saved = ckpt.load(folder, stems[-1])
    model.load_state_dict({**saved.part("model"), **saved.part("ema")})
    return run, problem, model.eval()


def evaluate_run(directory: Path, *, best: bool | None = None, device: str = "cpu") -> Evaluation:
    """Score a trained run again, as its own final evaluation did. Raises RunError as ``load_trained`` does."""
    run, problem, model = load_trained(directory, best=best, device=device)
    streams = Streams(run.seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(streams.number("eval", "global"))
        return problem.evaluate(model, streams, final=True)


class _Loop:
    """The moving parts of one run."""

    def __init__(self, run: RunConfig, where: RunDirectory, device: torch.device, compile: Compile) -> None:  # noqa: A002
        self.run_config, self.config, self.where, self.device = run, run.train, where, device
        self.streams = Streams(run.seed)
        self.problem = run.problem.build()
        self.model = _initial_model(self.problem, self.streams).to(device)
        self.compile: Compile = compile
        compile_modules(self.problem.compiled(self.model), compile)
        self.optimizer = build_optimizer(self.model, self.config)
        self.average = self._copy() if self.config.ema else {}
        self.watch = FiniteWatch(device)
        self.step, self.earlier_s, self.best, self.validation = 0, 0.0, None, None
        self._resume()
        self.started = time.monotonic()

    best: dict[str, Any] | None
    """Step, metric and value of the best validation, whose weights are on disk."""
    validation: dict[str, Any] | None
    """Step, metric and value of the newest validation."""

    def run(self, take: Take, progress: Progress, stop: Callable[[], bool]) -> dict[str, Any]:
        """Train to the end, score, and write the results. ``take`` gives the batch of a step."""
        with MetricsLog(self.where.metrics, self.step) as log:

            def record(entry: dict[str, Any]) -> None:
                log.write(entry)
                progress(entry)

            window = (self.step, time.monotonic())
            done = self._done()
            while not done:
                self.step += 1
                numbers = self._advance(take(self.step))
                # Asked once per step: under a time limit the answer may change before the step is over.
                done = self._done()
                validating = self._validation_due(done)
                logging = done or self.step % self.config.log_every == 0
                if validating or logging:
                    self._look()
                if logging:
                    numbers = _floats(numbers)
                    now = time.monotonic()
                    speed = (self.step - window[0]) / max(now - window[1], 1e-9)
                    window = (self.step, now)
                    record({**numbers, "step": self.step, "steps_per_s": speed, "elapsed_s": self.wall_s})
                if validating:
                    record(self._validate())
                    window = (self.step, time.monotonic())
                leaving = stop()
                if leaving or done or self.step % self.config.checkpoint_every == 0:
                    self._look()
                    log.sync()
                    self._save()
                    window = (self.step, time.monotonic())
                if leaving and not done:
                    raise StoppedError(
                        f"stopped at step {self.step} of {self.where.path}; the same command resumes there"
                    )
            if self._validation_due(done):
                # A time limit that had passed before this start: its last step was saved before it was known to be it.
                record(self._validate())
                self._save()
            return self._finish(record)

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run so far, over all resumptions."""
        return self.earlier_s + time.monotonic() - self.started

    def _done(self) -> bool:
        limit = self.config.time_limit_s
        return self.step >= self.config.steps or (limit is not None and self.step > 0 and self.wall_s >= limit)

    def _validation_due(self, done: bool) -> bool:
        """At every ``eval_every``-th step and at the last one, each once."""
        every = self.config.eval_every
        seen = self.validation["step"] if self.validation else 0
        return every > 0 and seen != self.step and (done or self.step % every == 0)

    def _advance(self, batch: Any) -> dict[str, Any]:
        """One optimizer step; returns what there is to log, still on the device."""
        config, step = self.config, self.step
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.manual_seed(self.streams.number("sample", "global", step))
        generator = self.streams.torch("sample", step, device=str(self.device))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with compiled_step(self.compile):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.autocast == "bf16"):
                loss, numbers = self.problem.loss(self.model, batch, generator)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        self.watch.note(step, loss.detach(), norm)
        if self.watch.each_step:
            self._look()
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - config.ema)
        return {**numbers, "loss": loss, "lr": rate, "grad_norm": norm}

    def _look(self) -> None:
        """Stop the run if a step since the last look was not finite. Comes before everything that is written."""
        if (bad := self.watch.first_bad()) is not None:
            raise self._broken(bad)

    def _broken(self, bad: Bad) -> RunError:
        # Made again: several batches may have come after it.
        batch = self.problem.batch(bad.step, self.streams, torch.device("cpu"))
        path = self.where.path / f"bad_batch-{bad.step:08d}.safetensors"
        write_atomically(path, to_safetensors(batch))
        kept = ckpt.stems(self.where.checkpoints)
        last = f"the checkpoint of step {ckpt.step_of(kept[-1])} is kept" if kept else "no checkpoint was due before it"
        what = f"loss is {bad.loss}"
        if math.isfinite(bad.loss):
            what = f"loss is {bad.loss:.4g} but the gradient norm is {bad.grad_norm}"
        return RunError(
            f"{what} at step {bad.step} of {self.where.path} (batch {digest(batch)}, saved as {path.name}); {last}; "
            f"try a smaller train.lr or train.clip with another --out"
        )

    @contextmanager
    def _for_scoring(self, tag: int | str = "global") -> Generator[nn.Module]:
        """The model in eval mode, without gradients, under averaged weights where there are any."""
        own = self._copy() if self.average else {}
        self._put(self.average)
        self.model.eval()
        torch.manual_seed(self.streams.number("eval", tag))
        with torch.no_grad(), as_written(self.compile):
            yield self.model
        self._put(own)

    def _validate(self) -> dict[str, Any]:
        """Score on validation data, and keep the weights if they are the best so far; returns what there is to log."""
        with self._for_scoring(self.step) as model:
            metrics = self.problem.evaluate(model, self.streams, final=False).metrics
            value = metrics.get(self.problem.headline)
            facts: dict[str, Any] = finite({"step": self.step, "metric": self.problem.headline, "value": value})
            self.validation = facts
            if facts["value"] is not None and self._improves(facts["value"]):
                self.best = facts
                weights = ckpt.Checkpoint(ckpt.prefixed("model", model.state_dict()), facts)
                # Under a name of its own: until it is whole, the one before it stays.
                ckpt.save(self.where.checkpoints, ckpt.stem_of(self.step, "best"), weights)
                ckpt.prune(self.where.checkpoints, 1, "best")
        return {"step": self.step, "split": "valid", "eval": metrics, "headline": value}

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        return value > self.best["value"] if self.problem.higher_is_better else value < self.best["value"]

    def _take_best(self) -> None:
        """Put the weights of the best validation in the place of the last ones."""
        stems = ckpt.stems(self.where.checkpoints, "best")
        if self.best is None or not stems:
            raise RunError(
                f"{self.where.path} has no weights of a best validation: none gave a finite '{self.problem.headline}', "
                f"or the file is gone; train again with another --out, or there with train.select=last"
            )
        self.model.load_state_dict(ckpt.load(self.where.checkpoints, stems[-1]).part("model"))
        self.average, self.validation = {}, self.best

    def _finish(self, record: Progress) -> dict[str, Any]:
        wall_s = self.wall_s
        if self.config.select == "best":
            self._take_best()
        with self._for_scoring() as model:
            scored = self.problem.evaluate(model, self.streams, final=True)
            described = self.problem.describe(model)
        headline = scored.metrics.get(self.problem.headline)
        record({"step": self.step, "split": "test", "eval": scored.metrics, "headline": headline})
        if scored.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **scored.arrays)
            write_atomically(self.where.arrays, buffer.getvalue())
        started = read_json(self.where.environment)
        results: dict[str, Any] = finite(
            {
                **described,
                "recipe": self.run_config.recipe,
                "group": self.run_config.group,
                "row": self.run_config.row,
                "seed": self.run_config.seed,
                "metrics": scored.metrics,
                "headline": self.problem.headline,
                "validation": self.validation,
                "details": scored.details,
                "commit": started["commit"],
                "device": started["device"],
                "wall_s": wall_s,
                "steps": self.step,
                "fingerprint": fingerprint(self.run_config),
            }
        )
        write_atomically(self.where.results, json.dumps(results, indent=2).encode())
        return results

    def _save(self) -> None:
        tensors = {
            **ckpt.prefixed("model", self.model.state_dict()),
            **ckpt.prefixed("ema", self.average),
            **ckpt.prefixed("optim", ckpt.optimizer_tensors(self.optimizer, self.model)),
        }
        facts = {
            "step": self.step,
            "wall_s": self.wall_s,
            "best": self.best,
            "validation": self.validation,
            "fingerprint": fingerprint(self.run_config),
        }
        ckpt.save(self.where.checkpoints, ckpt.stem_of(self.step), ckpt.Checkpoint(tensors, facts))
        ckpt.prune(self.where.checkpoints, self.config.keep_checkpoints)

    def _resume(self) -> None:
        stems = ckpt.stems(self.where.checkpoints)
        if not stems:
            return
        saved = ckpt.load(self.where.checkpoints, stems[-1])
        try:
            self.model.load_state_dict(saved.part("model"))
            ckpt.restore_optimizer(self.optimizer, self.model, saved.part("optim"))
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"checkpoint {self.where.checkpoints / stems[-1]} does not fit the model that this version builds "
                f"({reason}); choose another --out"
            ) from None
        self.average = {name: tensor.to(self.device) for name, tensor in saved.part("ema").items()}
        self.step, self.earlier_s = saved.facts["step"], saved.facts["wall_s"]
        self.best, self.validation = saved.facts["best"], saved.facts["validation"]
        if kept := ckpt.stems(self.where.checkpoints, "best"):
            # It may be of a step after this checkpoint, which will be validated again: no better than itself, it stays.
            self.best = {key: ckpt.facts(self.where.checkpoints, kept[-1])[key] for key in ("step", "metric", "value")}

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _initial_model(problem: Problem, streams: Streams) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.number("init"))
        return problem.build_model()


def _record_environment(where: RunDirectory, device: torch.device, carried_out: dict[str, Any]) -> None:
    """Describe this start in ``environment.json``; the starts it resumes move to its list ``earlier``."""
    earlier: list[Any] = []
    if where.environment.exists():
        last = read_json(where.environment)
        earlier = [*last.pop("earlier"), last]
    facts = {**environment(device), **carried_out, "earlier": earlier}
    write_atomically(where.environment, json.dumps(facts, indent=2).encode())


def _floats(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in numbers.items()}
