"""The training loop. A run is a function of its config: stop it anywhere, start it again, and it ends in the same bits.

Step n reads the batch and the generator addressed by n, and the global generator is seeded by n before the loss, so
parameters, optimizer moments and the step number are all there is to keep. The same bits are promised on the same
device with the same number of threads; a ``time_limit_s`` ends a run by the clock, which no resumption can repeat.
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
from recollect.train.directory import RunDirectory, load_run, read_json
from recollect.train.metrics import MetricsLog, finite
from recollect.train.problem import Evaluation, Problem
from recollect.train.run import RunConfig, TrainConfig
from recollect.train.runtime import environment, resolve_device

Progress = Callable[[dict[str, Any]], None]


class StoppedError(RunError):
    """The run was asked to stop and left a checkpoint behind; the same command goes on from it."""


def train(
    run: RunConfig,
    directory: Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Carry out ``run`` in ``directory``, going on from its newest checkpoint; returns what ``results.json`` holds.

    A finished run is not run again. ``progress`` is called with every record of ``metrics.jsonl``; ``stop`` is asked
    after every step. Raises StoppedError when it says yes, and RunError when the directory belongs to another config or
    process, a checkpoint is damaged, or the loss is no longer finite (the last good checkpoint is kept and the
    offending batch saved).
    """
    where = RunDirectory(directory)
    on = resolve_device(device)
    where.claim(run)
    with where.lock():
        if (results := where.finished(run)) is not None:
            return results
        _record_environment(where, on)
        with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []):
            return _Loop(run, where, on).run(progress or (lambda _: None), stop or (lambda: False))


def load_trained(directory: Path, *, best: bool = False, device: str = "cpu") -> tuple[RunConfig, Problem, nn.Module]:
    """The config, problem and trained model (eval mode, averaged weights where the run kept them) of a directory.

    ``best`` takes the checkpoint of the best evaluation instead of the last one. The module that defines the run's
    problem must have been imported. Raises RunError when there is no such checkpoint or it is damaged.
    """
    run = load_run(directory)
    problem = run.problem.build()
    model = _initial_model(problem, Streams(run.seed)).to(resolve_device(device))
    folder = RunDirectory(directory).checkpoints
    stems = ["best"] if best and (folder / "best.json").exists() else ckpt.stems(folder)
    if best and stems != ["best"]:
        raise RunError(f"{directory} has no best checkpoint: it was trained with train.eval_every=0; leave out --best")
    if not stems:
        raise RunError(f"{directory} has no checkpoint yet; train it first with: recollect resume {directory}")
    saved = ckpt.load(folder, stems[-1])
    model.load_state_dict({**saved.part("model"), **saved.part("ema")})
    return run, problem, model.eval()


def evaluate_run(directory: Path, *, best: bool = False, device: str = "cpu") -> Evaluation:
    """Score a trained run again, as its own final evaluation did. Raises RunError as ``load_trained`` does."""
    run, problem, model = load_trained(directory, best=best, device=device)
    streams = Streams(run.seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(streams.number("eval", "global"))
        return problem.evaluate(model, streams, final=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of 1-based ``step``; the equation is in ``TrainConfig``."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per (weight decay, rate scale); each group carries its ``scale``."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
            key = (0.0 if spared else config.weight_decay, float(getattr(parameter, "_lr_scale", 1.0)))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "scale": scale} for (decay, scale), ps in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_floating_point() for ps in groups.values() for p in ps),
    )


class _Loop:
    """The moving parts of one run."""

    def __init__(self, run: RunConfig, where: RunDirectory, device: torch.device) -> None:
        self.run_config, self.config, self.where, self.device = run, run.train, where, device
        self.streams = Streams(run.seed)
        self.problem = run.problem.build()
        self.model = _initial_model(self.problem, self.streams).to(device)
        self.optimizer = build_optimizer(self.model, self.config)
        self.average = self._copy() if self.config.ema else {}
        self.step, self.earlier_s, self.best = 0, 0.0, None
        self._resume()
        self.started = time.monotonic()

    best: float | None

    def run(self, progress: Progress, stop: Callable[[], bool]) -> dict[str, Any]:
        """Train to the end, score, and write the results."""
        with MetricsLog(self.where.metrics, self.step) as log:

            def record(entry: dict[str, Any]) -> None:
                log.write(entry)
                progress(entry)

            window = (self.step, time.monotonic())
            done = self._done()
            while not done:
                self.step += 1
                numbers = self._advance()
                # Asked once per step: under a time limit the answer may change before the step is over.
                done = self._done()
                if done or self.step % self.config.log_every == 0:
                    now = time.monotonic()
                    speed = (self.step - window[0]) / max(now - window[1], 1e-9)
                    window = (self.step, now)
                    record({**_floats(numbers), "step": self.step, "steps_per_s": speed, "elapsed_s": self.wall_s})
                if self.config.eval_every and self.step % self.config.eval_every == 0 and not done:
                    record(self._score_midway())
                    window = (self.step, time.monotonic())
                leaving = stop()
                if leaving or done or self.step % self.config.checkpoint_every == 0:
                    log.sync()
                    self._save()
                    window = (self.step, time.monotonic())
                if leaving and not done:
                    raise StoppedError(
                        f"stopped at step {self.step} of {self.where.path}; the same command resumes there"
                    )
            return self._finish(record)

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run so far, over all resumptions."""
        return self.earlier_s + time.monotonic() - self.started

    def _done(self) -> bool:
        limit = self.config.time_limit_s
        return self.step >= self.config.steps or (limit is not None and self.step > 0 and self.wall_s >= limit)

    def _advance(self) -> dict[str, Any]:
        """One optimizer step; returns what there is to log."""
        config, step = self.config, self.step
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = self.problem.batch(step, self.streams, self.device)
        torch.manual_seed(self.streams.number("sample", "global", step))
        generator = self.streams.torch("sample", step, device=str(self.device))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.autocast == "bf16"):
            loss, numbers = self.problem.loss(self.model, batch, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        if not math.isfinite(float(loss.detach() + norm)):
            raise self._broken(batch, float(loss.detach()), float(norm))
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter, 1 - config.ema)
        return {**numbers, "loss": loss, "lr": rate, "grad_norm": norm}

    def _broken(self, batch: Any, loss: float, norm: float) -> RunError:
        path = self.where.path / f"bad_batch-{self.step:08d}.safetensors"
        write_atomically(path, to_safetensors(batch))
        kept = ckpt.stems(self.where.checkpoints)
        last = f"the checkpoint of step {ckpt.step_of(kept[-1])} is kept" if kept else "no checkpoint was due before it"
        what = f"loss is {loss}" if not math.isfinite(loss) else f"loss is {loss:.4g} but the gradient norm is {norm}"
        return RunError(
            f"{what} at step {self.step} of {self.where.path} (batch {digest(batch)}, saved as {path.name}); {last}; "
            f"try a smaller train.lr or train.clip with another --out"
        )

    @contextmanager
    def _for_scoring(self, tag: int | str = "global") -> Generator[nn.Module]:
        """The model in eval mode, without gradients, under averaged weights where there are any."""
        own = self._copy() if self.average else {}
        self._put(self.average)
        self.model.eval()
        torch.manual_seed(self.streams.number("eval", tag))
        with torch.no_grad():
            yield self.model
        self._put(own)

    def _score_midway(self) -> dict[str, Any]:
        with self._for_scoring(self.step) as model:
            metrics = self.problem.evaluate(model, self.streams, final=False).metrics
            value = metrics.get(self.problem.headline)
            if value is not None and math.isfinite(value) and self._improves(value):
                self.best = value
                facts = {"step": self.step, "metric": self.problem.headline, "value": value}
                weights = ckpt.Checkpoint(ckpt.prefixed("model", model.state_dict()), facts)
                ckpt.save(self.where.checkpoints, "best", weights)
        return {"step": self.step, "eval": metrics, "headline": value}

    def _improves(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.problem.higher_is_better else value < self.best)

    def _finish(self, record: Progress) -> dict[str, Any]:
        wall_s = self.wall_s
        with self._for_scoring() as model:
            scored = self.problem.evaluate(model, self.streams, final=True)
            described = self.problem.describe(model)
        record({"step": self.step, "eval": scored.metrics, "headline": scored.metrics.get(self.problem.headline)})
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
        self.step, self.earlier_s, self.best = saved.facts["step"], saved.facts["wall_s"], saved.facts["best"]

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


def _record_environment(where: RunDirectory, device: torch.device) -> None:
    """Describe this start in ``environment.json``; the starts it resumes move to its list ``earlier``."""
    earlier: list[Any] = []
    if where.environment.exists():
        last = read_json(where.environment)
        earlier = [*last.pop("earlier"), last]
    write_atomically(where.environment, json.dumps({**environment(device), "earlier": earlier}, indent=2).encode())


def _floats(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in numbers.items()}
