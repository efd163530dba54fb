"""The training loop. A run is a function of its config: stop it anywhere, start it again, and it ends in the same bits.

Step n reads the batch and the generator addressed by n, and the global generator is seeded by n before the loss, so
parameters, optimizer moments and the step number are all there is to keep. The same bits are promised on the same
device with the same number of threads and the same ``compile``; a ``time_limit_s`` ends a run by the clock, which no
resumption can repeat.

Device, compilation and data workers are arguments and not part of the config: they say how a run is carried out, not
which run it is, and one may be resumed under others. Workers do not change a bit; the other two change rounding, as
another machine does. ``environment.json`` records them for every start.

So are ``parallel``, ``accumulate`` and ``recompute``: the batch of a step is the run's, however many processes and
parts share it, and sums in another order are the only difference where the loss draws nothing row by row. The first
process validates, writes and reports (``docs/distributed.md``).
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recollect.core.config import fingerprint
from recollect.core.errors import ConfigError, RecollectError, RunError
from recollect.core.files import write_atomically
from recollect.core.seeding import Streams
from recollect.train import checkpoint as ckpt
from recollect.train.batches import digest, to_safetensors
from recollect.train.compilation import Compile, as_written, check_compile, compile_modules
from recollect.train.directory import RunDirectory, load_run, read_json
from recollect.train.gradients import gradients
from recollect.train.metrics import MetricsLog, finite
from recollect.train.optimizer import build_optimizer, learning_rate
from recollect.train.parallel import checkpoints
from recollect.train.parallel.model import SharedModel, full, local
from recollect.train.parallel.team import Parallel, Team, joined
from recollect.train.prefetch import Take, batches, check_workers
from recollect.train.problem import Counting, Evaluation, Problem, Share
from recollect.train.recompute import recompute_layers
from recollect.train.run import RunConfig
from recollect.train.runtime import environment, resolve_device
from recollect.train.shares import Cut
from recollect.train.stopping import StoppedError, stoppable
from recollect.train.watch import Bad, FiniteWatch

Progress = Callable[[dict[str, Any]], None]


def train(
    run: RunConfig,
    directory: Path,
    *,
    device: str = "cpu",
    data_workers: int = 0,
    compile: Compile = "off",  # noqa: A002
    parallel: Parallel = "off",
    accumulate: int = 1,
    recompute: bool = False,
    progress: Progress | None = None,
    counting: Counting | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Carry out ``run`` in ``directory``, going on from its newest checkpoint; returns what ``results.json`` holds.

    A finished run is not run again. ``data_workers`` processes make batches ahead (0: this one makes them);
    ``compile`` is "off", "default" (``torch.compile``) or "graphs" (with CUDA graphs). With ``parallel`` "ddp" or
    "fsdp" every process that torchrun started calls this with the same arguments, and gets the same results; each
    computes its rows of every batch, in ``accumulate`` parts one after the other. ``recompute`` keeps no activations
    inside the layers of a backbone. ``progress`` is called with every record of ``metrics.jsonl``, in the first
    process; ``counting`` shows how far data is that has to be made first; ``stop`` is asked after every step and every
    piece of that data, and any process may say yes. A script that uses data workers must start under
    ``if __name__ == "__main__":``, as they import it.

    Raises StoppedError when ``stop`` says yes, and RunError when the directory belongs to another config or process, a
    checkpoint is damaged, a worker dies, or the loss is no longer finite (the last good checkpoint is kept and the
    offending batch saved).
    """
    where = RunDirectory(directory)
    with joined(parallel, device) as (team, own), ExitStack() as held:
        with team.together():
            on = resolve_device(own)
            check_workers(data_workers)
            check_compile(compile, on)
            _check_parts(parallel, compile, accumulate)
            new = team.first and where.claim(run)
            if team.first:
                held.enter_context(where.lock())
        with _beginning(where, new):
            with team.together():
                results = where.finished(run) if team.first else None
                if team.first and results is None:
                    if counting is not None:
                        run.problem.build().make_data(stoppable(counting, stop, directory), data_workers)
                    carried_out = {"data_workers": data_workers, "compile": compile, "parallel": parallel}
                    carried_out |= {"processes": team.size, "accumulate": accumulate, "recompute": recompute}
                    where.record_start({**environment(on), **carried_out})
            if (results := _from_first(team, results)) is not None:
                return results
            held.enter_context(torch.random.fork_rng(devices=[on] if on.type == "cuda" else []))
            loop = _Loop(run, where, on, compile, team, recompute)
        cut = Cut(team.size * accumulate, team.rank * accumulate, accumulate)
        with batches(run, loop.problem, loop.step + 1, on, data_workers, cut) as take:
            return loop.run(take, progress or (lambda _: None), stop or (lambda: False))


@contextmanager
def _beginning(where: RunDirectory, new: bool) -> Generator[None]:
    """Around what comes before the first step: what the user can mend there leaves no new directory behind."""
    try:
        yield
    except StoppedError:
        raise
    except RecollectError:
        if new:
            where.give_up()
        raise


def _check_parts(parallel: Parallel, compile: Compile, accumulate: int) -> None:  # noqa: A002
    if accumulate < 1:
        raise ConfigError(f"--accumulate must be at least 1, got {accumulate}")
    if compile != "off" and parallel == "fsdp":
        raise ConfigError(f"--compile {compile} does not go with --parallel fsdp; use --parallel ddp or --compile off")
    if compile == "graphs" and (parallel != "off" or accumulate > 1):
        raise ConfigError("--compile graphs is for one process and --accumulate 1; use --compile default or off")


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

    def __init__(
        self,
        run: RunConfig,
        where: RunDirectory,
        device: torch.device,
        compile: Compile,  # noqa: A002
        team: Team,
        recompute: bool,
    ) -> None:
        self.run_config, self.config, self.where, self.device, self.team = run, run.train, where, device, team
        self.streams = Streams(run.seed)
        self.problem = run.problem.build()
        self.model = _initial_model(self.problem, self.streams).to(device)
        self.compile: Compile = compile
        self.shared = SharedModel(team, self.problem, self.model, device)
        with team.together():
            if recompute:
                recompute_layers(self.problem.layers(self.model))
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
        with MetricsLog(self.where.metrics, self.step) if self.team.first else nullcontext() as log:

            def record(entry: dict[str, Any]) -> None:
                if log is not None:
                    log.write(entry)
                    progress(entry)

            window = (self.step, time.monotonic())
            done = self._done()
            while not done:
                self.step += 1
                with self.team.together():
                    shares = take(self.step)
                numbers = self._advance(shares)
                # Asked once per step: under a time limit the answer may change before the step is over.
                done = self._done()
                validating = self._validation_due(done)
                logging = done or self.step % self.config.log_every == 0
                if validating or logging:
                    self._look()
                if logging:
                    numbers = self.team.means(_floats(numbers))
                    now = time.monotonic()
                    speed = (self.step - window[0]) / max(now - window[1], 1e-9)
                    window = (self.step, now)
                    record({**numbers, "step": self.step, "steps_per_s": speed, "elapsed_s": self.wall_s})
                if validating:
                    record(self._validate())
                    window = (self.step, time.monotonic())
                leaving = self.team.any(stop())
                if leaving or done or self.step % self.config.checkpoint_every == 0:
                    self._look()
                    if log is not None:
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
        limit, first = self.config.time_limit_s, self.team.first
        if self.step >= self.config.steps or limit is None:
            return self.step >= self.config.steps
        return self.team.any(first and self.step > 0 and self.wall_s >= limit)

    def _validation_due(self, done: bool) -> bool:
        """At every ``eval_every``-th step and at the last one, each once."""
        every = self.config.eval_every
        seen = self.validation["step"] if self.validation else 0
        return every > 0 and seen != self.step and (done or self.step % every == 0)

    def _advance(self, shares: list[Share]) -> dict[str, Any]:
        """One optimizer step; returns what there is to log, still on the device."""
        config, step = self.config, self.step
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, numbers = gradients(self.shared, shares, self.streams, step, config.autocast == "bf16", self.compile)
        loss = self.team.mean(loss)
        norm = full(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf))
        self.watch.note(step, loss, norm)
        if self.watch.each_step:
            self._look()
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    local(self.average[name]).lerp_(local(parameter), 1 - config.ema)
        return {**numbers, "loss": loss, "lr": rate, "grad_norm": norm}

    def _look(self) -> None:
        """Stop the run if a step since the last look was not finite. Comes before everything that is written."""
        if (bad := self.watch.first_bad()) is not None:
            with self.team.together():
                if self.team.first:
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
    def _for_scoring(self, tag: int | str = "global") -> Generator[nn.Module | None]:
        """The model in eval mode, without gradients, under averaged weights where there are any; whole in the first
        process, None in the others.
        """
        seed = self.streams.number("eval", tag)
        if self.team.kind == "fsdp":
            model = self._gathered()
            torch.manual_seed(seed)
            with torch.no_grad():
                yield model
            return
        if not self.team.first:
            yield None
            return
        own = self._copy() if self.average else {}
        self._put(self.average)
        self.model.eval()
        torch.manual_seed(seed)
        with torch.no_grad(), as_written(self.compile):
            yield self.model
        self._put(own)

    def _gathered(self) -> nn.Module | None:
        """A whole copy of the sharded model, averages in it, in the first process."""
        if (state := self.shared.whole(self.average)) is None:
            return None
        model = _initial_model(self.problem, self.streams).to(self.device)
        model.load_state_dict(state)
        return model.eval()

    def _validate(self) -> dict[str, Any]:
        """Score on validation data, and keep the weights if they are the best so far; returns what there is to log."""
        entry: dict[str, Any] = {}
        with self.team.together(), self._for_scoring(self.step) as model:
            if model is not None:
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
                entry = {"step": self.step, "split": "valid", "eval": metrics, "headline": value}
        self.best, self.validation = _from_first(self.team, [self.best, self.validation])
        return entry

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
        if self.team.kind == "fsdp":
            stored = ckpt.Stored(self.where.checkpoints, stems[-1])
            stored.verify()
            checkpoints.restore_weights(self.team, stored, self.model)
        else:
            self.model.load_state_dict(ckpt.load(self.where.checkpoints, stems[-1]).part("model"))
        self.average, self.validation = {}, self.best

    def _finish(self, record: Progress) -> dict[str, Any]:
        results: dict[str, Any] = {}
        with self.team.together():
            if self.config.select == "best":
                self._take_best()
        with self.team.together(), self._for_scoring() as model:
            if model is not None:
                results = self._results(model, self.wall_s, record)
        return _from_first(self.team, results)

    def _results(self, model: nn.Module, wall_s: float, record: Progress) -> dict[str, Any]:
        """Score the trained model and write what came of the run."""
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
        folder, whole = self.where.checkpoints, ckpt.Checkpoint(tensors, facts)
        checkpoints.save(self.team, folder, ckpt.stem_of(self.step), whole, self.config.keep_checkpoints)

    def _resume(self) -> None:
        stems = ckpt.stems(self.where.checkpoints)
        stem = self.team.from_first(stems[-1] if stems else "")
        if not stem:
            return
        with self.team.together():
            facts = self._restore(stem)
        self.step, self.earlier_s = facts["step"], facts["wall_s"]
        self.best, self.validation = facts["best"], facts["validation"]
        if kept := ckpt.stems(self.where.checkpoints, "best"):
            # It may be of a step after this checkpoint, which will be validated again: no better than itself, it stays.
            self.best = {key: ckpt.facts(self.where.checkpoints, kept[-1])[key] for key in ("step", "metric", "value")}

    def _restore(self, stem: str) -> dict[str, Any]:
        """Put a checkpoint into model, optimizer and averages; returns its facts."""
        folder = self.where.checkpoints
        try:
            if self.team.kind == "fsdp":
                stored = ckpt.Stored(folder, stem)
                stored.verify(self.team.rank, self.team.size)
                self.average = checkpoints.restore(self.team, stored, self.model, self.optimizer)
                return stored.facts
            saved = ckpt.load(folder, stem)
            self.model.load_state_dict(saved.part("model"))
            ckpt.restore_optimizer(self.optimizer, self.model, saved.part("optim"))
            self.average = {name: tensor.to(self.device) for name, tensor in saved.part("ema").items()}
            return saved.facts
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"checkpoint {folder / stem} does not fit the model that this version builds ({reason}); "
                f"choose another --out"
            ) from None

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


def _from_first(team: Team, value: Any) -> Any:
    """JSON data of the first process, in all."""
    return value if team.size == 1 else json.loads(team.from_first(json.dumps(value)))


def _floats(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in numbers.items()}
