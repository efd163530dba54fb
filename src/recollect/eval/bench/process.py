"""One process per measurement: a server that has imported what is needed forks for every case.

``Worker`` starts the server, ``python -m recollect.eval.bench.process``, under the allocator settings of
``train.runtime``; both speak one line of JSON per case over pipes. The child inherits the imports, has a heap that no
other case has touched, ends by an alarm when its time is up, and cannot take more memory than is free. Where forking a
process that has loaded torch is not safe (anywhere but Linux), each case gets a fresh server instead.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import recollect
from recollect.core.errors import RecollectError
from recollect.train.runtime import allocator_env

FORKS = sys.platform == "linux"

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "cannot allocate memory")


class Worker:
    """Runs calls in processes of their own, one after another. Use as a context; nothing outlives it."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(
        self, call: str, arguments: Mapping[str, Any], *, limit_s: float, preload: Sequence[str] = ()
    ) -> dict[str, Any]:
        """``call`` ("module:function") with ``arguments``, both JSON; returns what it returned with a ``status``.

        ``measured``; ``skipped`` with ``why`` when it ran out of time or memory; ``failed`` with ``why`` when it raised
        or died. ``preload`` names modules that the server imports first, once for all cases.
        """
        server = self._server or self._start()
        job = {"call": call, "arguments": dict(arguments), "limit_s": limit_s, "preload": list(preload)}
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            reply = server.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply or not FORKS:
            self._stop()
        if not reply:
            return {"status": "failed", "why": "the measuring process died"}
        return json.loads(reply)

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(Path(recollect.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, **allocator_env(os.environ), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._server = subprocess.Popen(
            # -P: files of the folder it is started in are not modules.
            [sys.executable, "-P", "-m", "recollect.eval.bench.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
            start_new_session=True,
        )
        return self._server

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except (OSError, AttributeError):
            server.kill()
        with server:  # closes the pipes and waits
            pass


def resolve(call: str) -> Any:
    """The function that "module:function" names."""
    module, _, function = call.partition(":")
    return getattr(importlib.import_module(module), function)


def serve() -> None:
    """Read cases from stdin, a line each, and answer each with a line, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    # What libraries print must not come between the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        importlib.import_module("recollect.layers")
        with suppress(ImportError):  # dispatch does without
            importlib.import_module("numba")
        broken = None
    except Exception as error:
        broken = _failure(error)
    for line in sys.stdin:
        job = json.loads(line)
        replies.write(json.dumps(broken or _answer(job)) + "\n")
        replies.flush()


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        for name in (*job["preload"], str(job["call"]).partition(":")[0]):
            importlib.import_module(name)
    except Exception as error:
        return _failure(error)
    return _forked(job) if FORKS else _call(job)


def _forked(job: Mapping[str, Any]) -> dict[str, Any]:
    # What was imported is never garbage: a child that looked through it would copy its pages, and take its time.
    gc.freeze()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(math.ceil(job["limit_s"]))
            with os.fdopen(write, "w") as pipe:
                pipe.write(json.dumps(_call(job)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if text and os.WIFEXITED(status):
        return json.loads(text)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGALRM:
        return {"status": "skipped", "why": f"took more than {job['limit_s']:.0f} s", "ran_over": True}
    if number == signal.SIGKILL:
        return {"status": "skipped", "why": "killed by the system, which was out of memory", "ran_over": True}
    return {"status": "failed", "why": f"its process died of {signal.Signals(number).name}" if number else "no result"}


def _call(job: Mapping[str, Any]) -> dict[str, Any]:
    from recollect.eval.bench.measure import available_bytes, forbid_more_than

    arguments = job["arguments"]
    on_cpu = str(arguments.get("device", "cpu")) == "cpu"
    free = available_bytes()
    if FORKS and on_cpu and free is not None:
        forbid_more_than(free)
    try:
        return {"status": "measured", **resolve(job["call"])(**arguments)}
    except Exception as error:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
            there = f": {free / 2**30:.1f} GiB were free" if free and on_cpu else ""
            return {"status": "skipped", "why": f"out of memory{there}", "ran_over": True}
        return _failure(error)


def _failure(error: Exception) -> dict[str, Any]:
    text = " ".join(str(error).split())[:300]
    return {"status": "failed", "why": text if isinstance(error, RecollectError) else f"{type(error).__name__}: {text}"}


if __name__ == "__main__":
    serve()
