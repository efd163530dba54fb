"""What the benches measure with: processes that say how they ended, peaks of memory, medians, turns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recollect.eval.bench import measure as bench_measure
from recollect.eval.bench.measure import median_time, peak_of
from recollect.eval.bench.process import Worker

CPU = torch.device("cpu")


def test_processes_say_how_they_ended() -> None:
    with Worker() as worker:
        assert worker.run("json:loads", {"s": '{"a": 1}'}, limit_s=30) == {"status": "measured", "a": 1}
        assert worker.run("json:loads", {"s": "{"}, limit_s=30)["why"].startswith("JSONDecodeError: ")
        assert worker.run("os:abort", {}, limit_s=30) == {"status": "failed", "why": "its process died of SIGABRT"}
        assert worker.run("no_such:thing", {}, limit_s=30)["why"].startswith("ModuleNotFoundError: ")
        late = worker.run("subprocess:run", {"args": ["sleep", "20"]}, limit_s=1)
        assert (late["status"], late["ran_over"]) == ("skipped", True)
        assert late["why"] == "took more than 1 s"
        free = bench_measure.available_bytes()
        assert free is not None
        large = worker.run("builtins:bytearray", {"source": free + 2**30}, limit_s=30)
        assert (large["status"], large["ran_over"]) == ("skipped", True)
        assert "out of memory" in large["why"]
        env = worker.run("json:loads", {"s": "{}"}, limit_s=30)
        assert env["status"] == "measured", "the server outlives its children"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's variables, read from /proc")
def test_processes_get_the_allocator_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from recollect.train.runtime import ALLOCATOR_ENV, allocator_env

    for name in ALLOCATOR_ENV:
        monkeypatch.delenv(name, raising=False)
    with Worker() as worker:
        worker.run("json:loads", {"s": "{}"}, limit_s=30)
        server = worker._server
        assert server is not None
        found = dict(pair.split("=", 1) for pair in Path(f"/proc/{server.pid}/environ").read_text().split("\0") if pair)
    assert {name: found.get(name) for name in ALLOCATOR_ENV if name in allocator_env({})} == allocator_env({})
    assert server.poll() is not None, "the server outlives its context"


def test_peaks_are_of_the_call_alone() -> None:
    """Neither what came before nor what stays counts; what came and went within does."""
    mib = 2**20
    torch.ones(96 * mib // 4)  # a larger peak before
    kept: list[torch.Tensor] = []

    def call() -> None:
        torch.ones(48 * mib // 4)
        kept.append(torch.ones(16 * mib // 4))

    peak = peak_of(call, CPU)
    assert 46 * mib < peak.bytes < 72 * mib
    assert peak.seconds > 0


def test_long_calls_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    assert median_time(lambda: calls.append(1), 0.0, CPU).repeats == 3
    assert len(calls) == 3
    assert median_time(lambda: calls.append(1), 0.0, CPU, first_s=11.0) == (11.0, 1)
    assert len(calls) == 3
    monkeypatch.setattr(bench_measure, "once", lambda *_: 11.0)
    assert median_time(lambda: None, 0.0, CPU) == (11.0, 1)


def test_calls_that_are_compared_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down threefold between turns: the ratio within each turn does not see it."""
    slow, order = {"first": 2.0, "last": 1.0}, []

    def once(run: Callable[[], str], _: torch.device) -> float:
        order.append(run())
        return slow[order[-1]] * 3 ** ((len(order) - 1) // 2)

    monkeypatch.setattr(bench_measure, "once", once)
    timings, ratio = bench_measure.taking_turns([lambda: "first", lambda: "last"], 0.0, torch.device("cpu"))
    assert order == ["first", "last"] * 3
    assert ratio == 2.0
    assert [timing.seconds for timing in timings] == [6.0, 3.0]
