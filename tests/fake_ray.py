"""As much of Ray as a face-off uses, in this process: tasks run when they are waited for, ``room`` at a time."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class WorkerCrashedError(Exception):
    """What Ray raises for a task whose process died more often than it may."""


@dataclass(eq=False)
class Task:
    """One call of a remote function."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Any = None
    error: Exception | None = None
    done: bool = False

    @property
    def is_run(self) -> bool:
        return self.function.__name__ == "run_task"


@dataclass
class FakeRay:
    """The module ``ray`` and what was asked of it."""

    room: int = 1
    crashing: set[str] = field(default_factory=set)
    """Rows whose worker dies."""
    blind: set[str] = field(default_factory=set)
    """Nodes without the shared file system."""
    gpus: int = 0
    connects: bool = True
    initialised: bool = False
    calls: list[str] = field(default_factory=list)
    address: str | None = None
    tasks: list[Task] = field(default_factory=list)
    shut: int = 0

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self, *, address: str | None, **_options: Any) -> None:
        if not self.connects:
            raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")
        self.address, self.initialised = address, True

    def shutdown(self) -> None:
        self.shut += 1
        self.initialised = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def nodes(self) -> list[dict[str, Any]]:
        named = {"one": True, "two": True, "gone": False}
        return [{"NodeID": f"id-{n}", "NodeManagerHostname": n, "Alive": alive} for n, alive in named.items()]

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def wrap(function: Callable[..., Any]) -> Any:
            def start(*arguments: Any) -> Task:
                # Through pickle, as over the network.
                sent = pickle.loads(pickle.dumps(arguments))  # noqa: S301
                task = Task(function, sent, options)
                self.tasks.append(task)
                return task

            wrapped = ModuleType("remote")
            wrapped.remote = start
            return wrapped

        return wrap

    def wait(self, tasks: Sequence[Task], *, num_returns: int, timeout: float) -> tuple[list[Task], list[Task]]:
        assert 0 < num_returns <= len(tasks)
        assert timeout > 0
        room = self.room
        for task in tasks:
            if not task.done and (room or not task.is_run):
                room -= task.is_run
                self._carry_out(task)
        return [t for t in tasks if t.done], [t for t in tasks if not t.done]

    def get(self, task: Task, timeout: float | None = None) -> Any:
        assert task.done or timeout is None
        if task.error is not None:
            raise task.error
        return task.result

    def cancel(self, task: Task, *, force: bool) -> None:
        assert task in self.tasks
        self.calls.append(f"cancel {'hard' if force else 'softly'}")

    def _carry_out(self, task: Task) -> None:
        task.done = True
        strategy = task.options.get("scheduling_strategy")
        try:
            if strategy is not None and strategy.node_id.removeprefix("id-") in self.blind:
                task.result = False
            elif task.is_run and task.arguments[0].row in self.crashing:
                raise WorkerCrashedError("The worker died unexpectedly.\nCheck the logs.")
            else:
                task.result = task.function(*task.arguments)
        except Exception as error:
            task.error = error


@dataclass
class NodeAffinitySchedulingStrategy:
    """Names the node a task must run on."""

    node_id: str
    soft: bool


def install(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FakeRay:
    """Put a fake ``ray`` where imports find it."""
    fake = FakeRay(**settings)
    module = ModuleType("ray")
    for name in ("is_initialized", "init", "shutdown", "cluster_resources", "nodes", "remote", "wait", "get", "cancel"):
        setattr(module, name, getattr(fake, name))
    strategies = ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = NodeAffinitySchedulingStrategy
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    return fake


def leftovers(directory: Path) -> list[str]:
    """Files of the check that nodes see the directory: there should be none."""
    return [path.name for path in directory.rglob(".seen-*")]
