"""Runs as tasks of a Ray cluster (extra ``cluster``): as many at a time as the cluster has room for.

Every node must see the face-off's directory under the same path, since a run lives in its directory and nowhere else,
and must have recollect installed. A task whose process or node dies is started again by Ray, up to ``RETRIES`` times,
and goes on from its last checkpoint; an exception is not retried, it would come again.
"""

from __future__ import annotations

import importlib
import os
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from recollect.core.cluster import RETRIES, RayConnection
from recollect.core.errors import RecollectError, RunError, described
from recollect.train.directory import RunDirectory
from recollect.train.executors.base import GRACE_S, POLL_S, Job, log_traceback
from recollect.train.run import RunConfig
from recollect.train.runtime import SWEEP_COMMAND, own_command, stop_on_signals

PROBE_S = 60.0
"""How long a node may take to say whether it sees the directory."""

Outcome = tuple[Literal["finished", "failed"], str]


class Cluster:
    """Hands every job to Ray at once: one CPU each, and one GPU each on ``cuda``.

    ``address`` is that of a ``core.cluster.RayConnection``. Raises RecollectError without Ray, and at the first
    ``start`` when there is no such cluster or one of its nodes does not see the directory.
    """

    slots: int | None = None

    def __init__(self, address: str = "", device: str = "cpu") -> None:
        self._connection = RayConnection(address)
        self._ray: Any = self._connection.ray
        if device not in ("cpu", "cuda"):
            raise RecollectError(f"Ray gives every run a GPU of its own: use --device cuda, not {device}")
        self.device = device
        self._tasks: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Queue the job; it runs as soon as a node has a CPU (and a GPU) to spare."""
        if not self._connection.connected:
            self._connect(job.where.path)
        gpus = 1 if self.device == "cuda" else 0
        task = self._connection.remote(run_task, num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
        job.status = "queued"
        job.where.begun.unlink(missing_ok=True)
        self._tasks[task.remote(job.run, str(job.where.path.resolve()), self.device, own_command())] = job

    def poll(self, tick: Callable[[], None]) -> None:
        """Wait a moment for tasks that end, and read how far the others are."""
        del tick
        tasks = list(self._tasks)
        ready, _ = self._ray.wait(tasks, num_returns=len(tasks), timeout=POLL_S)
        for task in ready:
            job = self._tasks.pop(task)
            try:
                outcome: Outcome = self._ray.get(task)
            except Exception as error:
                outcome = "failed", described(error)
            job.refresh()
            job.status = outcome[0]
            if job.status == "failed":
                job.fail(outcome[1])
        for job in self._tasks.values():
            job.refresh()
            if job.status == "queued" and job.where.begun.exists():
                job.status = "running"

    def stop(self) -> None:
        """Interrupt every task, wait for the checkpoints, kill what takes longer than ``GRACE_S``, and leave Ray."""
        if not self._connection.connected:
            return
        tasks = list(self._tasks)
        for task in tasks:
            self._ray.cancel(task, force=False)
        if tasks:
            _, late = self._ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_S)
            for task in late:
                self._ray.cancel(task, force=True)
        for job in self._tasks.values():
            job.status = "waiting"
        self._tasks = {}
        self._connection.leave()

    def _connect(self, directory: Path) -> None:
        self._connection.connect()
        if self.device == "cuda" and not self._ray.cluster_resources().get("GPU"):
            raise RecollectError("the Ray cluster has no GPU; use --device cpu")
        self._probe(directory)

    def _probe(self, directory: Path) -> None:
        """Ask every node for a file that was written just now; a node without it would fail run after run."""
        token = directory / f".seen-{uuid.uuid4().hex}"
        nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in self._ray.nodes() if node["Alive"]}
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        token.touch()
        try:
            asked = {
                self._connection.remote(sees, num_cpus=0, scheduling_strategy=affinity(node, soft=False)).remote(
                    str(token.resolve())
                ): host
                for node, host in nodes.items()
            }
            self._ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_S)
            for answer, host in asked.items():
                try:
                    seen = self._ray.get(answer, timeout=0)
                except Exception as error:
                    raise RecollectError(f"Ray node {host} cannot run recollect: {described(error)}") from None
                if not seen:
                    raise RecollectError(unseen(host, directory.resolve()))
        finally:
            token.unlink(missing_ok=True)


def unseen(host: str, directory: Path) -> str:
    """What is wrong with a node without the directory, and how to mend it."""
    return (
        f"Ray node {host} does not see {directory}: every node needs it under this path; "
        f"choose an --out on a file system that all of them share"
    )


def sees(path: str) -> bool:
    """Whether this node sees a file."""
    return Path(path).exists()


def run_task(run: RunConfig, directory: str, device: str, command: str) -> Outcome:
    """Carry out one run on the node that Ray chose; ``command`` is what was typed to start the face-off.

    The first interruption, which is how Ray cancels a task, lets the step end and writes a checkpoint.
    """
    import torch

    from recollect.train.loop import StoppedError, train

    where = RunDirectory(Path(directory))
    os.environ[SWEEP_COMMAND] = command
    torch.set_num_threads(1)
    try:
        if not where.config.exists():
            raise RunError(unseen(socket.gethostname(), where.path))
        with suppress(OSError):
            where.begun.write_text(f"{socket.gethostname()} {os.getpid()}\n")
        with stop_on_signals() as stop:
            train(run, where.path, device=device, stop=stop)
    except StoppedError as error:
        return "failed", str(error)
    except Exception as error:
        log_traceback(where, error)
        return "failed", described(error)
    return "finished", ""
