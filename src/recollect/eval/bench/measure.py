"""Seconds and bytes of a call, measured in the process that runs it.

Time: the median of at least three repeats after a warm-up; a call of more than ``LONG_S`` counts with its first run.

Memory: how far the process rose above where it stood while the call ran. On Linux the free pages of the heap are given
back first and the kernel's high-water mark is set to the present, so earlier peaks neither hide nor add anything;
elsewhere it is the growth of the largest size ever. On a GPU it is the allocator's own peak.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

LONG_S = 10.0
"""A call longer than this is not repeated."""

MIN_REPEATS, MAX_REPEATS = 3, 1000

STATUS, CLEAR_REFS, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class Timing(NamedTuple):
    """Median seconds of one call, and of how many."""

    seconds: float
    repeats: int


class Peak(NamedTuple):
    """Bytes that a call needed on top of what was there, and how long it took."""

    bytes: int
    seconds: float


def median_time(run: Callable[[], object], seconds: float, device: torch.device, *, first_s: float = 0.0) -> Timing:
    """Repeat ``run`` at least three times and for ``seconds``. ``run`` must be warm.

    ``first_s`` is what an earlier run took: above ``LONG_S`` it is the result.
    """
    if first_s > LONG_S:
        return Timing(first_s, 1)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_REPEATS or (time.perf_counter() < deadline and len(times) < MAX_REPEATS):
        times.append(once(run, device))
        if times[0] > LONG_S:
            break
    return Timing(statistics.median(times), len(times))


def taking_turns(
    runs: Sequence[Callable[[], object]], seconds: float, device: torch.device
) -> tuple[list[Timing], float]:
    """As ``median_time`` for calls that are to be compared: one of each in turn, so that what else the machine does
    meets all alike. Also the median, over turns, of the first one's time over the last one's.
    """
    times: list[list[float]] = []
    deadline = time.perf_counter() + seconds * len(runs)
    while len(times) < MIN_REPEATS or (time.perf_counter() < deadline and len(times) < MAX_REPEATS):
        times.append([once(run, device) for run in runs])
    medians = [Timing(statistics.median(each), len(times)) for each in zip(*times, strict=True)]
    return medians, statistics.median(turn[0] / turn[-1] for turn in times)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until its result is there."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def peak_of(run: Callable[[], object], device: torch.device) -> Peak:
    """Run once and see how far memory rises. Warm up at a small size before: compiling takes memory too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = once(run, device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, seconds)
    give_back_free_pages()
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        largest = _largest_ever()
        seconds = once(run, device)
        return Peak(_largest_ever() - largest, seconds)
    before = _status("VmRSS")
    seconds = once(run, device)
    return Peak(max(0, _status("VmHWM") - before), seconds)


def give_back_free_pages() -> None:
    """Let the C library return what it holds but does not use. Does nothing where it cannot."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device | None = None) -> int | None:
    """Memory that may still be taken: of the GPU, else of the machine and of the container. None when unknown."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found: list[int] = []
    try:
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(max(0, limit - used + int(cached.get("inactive_file", 0))))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        pass
    return min(found, default=None)


def forbid_more_than(n_bytes: int) -> None:
    """Make allocations beyond ``n_bytes`` more than now fail, rather than the machine run out. Linux only."""
    if sys.platform == "linux":
        limit = _status("VmData") + n_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def _largest_ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
