"""The processes that carry out one run together, and how they stay of one mind.

They are started by ``torchrun`` and agree through a gloo group on the CPU, so that agreeing never waits for a GPU;
gradients and parameters go over gloo or NCCL, whichever is the device's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Literal, TypeAlias, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from recollect.core.errors import ConfigError, RecollectError, RunError, described
from recollect.train.runtime import resolve_device
from recollect.train.stopping import TOLD, StoppedError

Parallel: TypeAlias = Literal["off", "ddp", "fsdp"]

PATIENCE = timedelta(days=7)
"""How long processes wait for the first one, which scores alone. One that dies is noticed at once."""

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout", "NCCL", "gloo")
"""What is in the message of an operation that another process did not live to take part in."""


class Team:
    """A process among those of its run. Everything but ``rank``, ``size`` and ``first`` must be called by all.

    One process alone is a team too: nothing is sent, and nothing costs anything.
    """

    def __init__(self, kind: Parallel = "off", store: c10d.Store | None = None) -> None:
        self.kind: Parallel = kind
        self.rank, self.size = 0, 1
        self._store = store
        self._group: dist.ProcessGroup | None = None
        if kind != "off":
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this is the process that validates, writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        if self._group is None:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over processes, on its own device; the host does not wait for it."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def means(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The mean over processes of every number."""
        if self._group is None or self.size == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self._group)
        return dict(zip(numbers, (values / self.size).tolist(), strict=True))

    def texts(self, text: str) -> list[str]:
        """The text that each process brings, in order of rank."""
        if self._group is None:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self._group)
        return [bytes(row[: int(n)].tolist()).decode().strip("\0") for row, n in zip(rows, lengths, strict=True)]

    def from_first(self, text: str) -> str:
        """The text that the first process brings; what others bring is not read."""
        return self.texts(text if self.first else "")[0]

    @contextmanager
    def together(self) -> Generator[None]:
        """Wait at the end until all are there; what one raises inside, all raise, and the first to raise tells it."""
        if self._group is None:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if _is_settled(error) or self._is_loss(error):
                raise
            own = error
        said = self.texts("" if own is None else f"{type(own).__name__}\n{described(own)}")
        failed = next((rank for rank, text in enumerate(said) if text), None)
        if failed is None:
            return
        kind, _, message = said[failed].partition("\n")
        if own is not None and failed == self.rank:
            raise _settled(own, told=False)
        raise _settled(own or (StoppedError if kind == "StoppedError" else RunError)(message), told=True)

    def explain(self, error: Exception) -> Exception:
        """What to raise in the place of an error that leaves the run here, having let the others know.

        An operation that failed because another process is gone becomes one line, told by one process, unless the one
        that is gone has told why.
        """
        if self._group is None or _is_settled(error):
            return error
        lost = self._is_loss(error)
        try:
            assert self._store is not None
            told = self._store.add("told", 1) > 1
        except RuntimeError:  # the store is gone with the process that kept it
            told = False
        if lost:
            error = RunError(
                f"another of the {self.size} processes of this run is gone (was it killed, or out of memory?); the "
                f"last checkpoint is kept: the same command goes on from it, also with another number of processes"
            )
        return _settled(error, told=told)

    def _is_loss(self, error: Exception) -> bool:
        if isinstance(error, RecollectError) or not isinstance(error, RuntimeError):
            return False
        return isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST)


def _settled(error: Exception, *, told: bool) -> Exception:
    """The error, marked as one that all processes know of."""
    error.add_note(TOLD if told else "every process of this run was told")
    return error


def _is_settled(error: Exception) -> bool:
    return bool(getattr(error, "__notes__", ()))


@contextmanager
def joined(parallel: Parallel, device: str) -> Generator[tuple[Team, str]]:
    """Join the other processes of the run; gives the team and this process's own device.

    Raises ConfigError, told once per machine, when the process was not started as ``parallel`` needs.
    """
    try:
        own = _own_device(parallel, device)
    except RecollectError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            error.add_note(TOLD)
        raise
    if parallel == "off":
        yield Team(), own
        return
    mine = not dist.is_initialized()
    if own.startswith("cuda"):
        torch.cuda.set_device(own)
    if mine:
        backend = "cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo"
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=_own_store(), rank=rank, world_size=size)
    team = Team(parallel, _own_store())
    try:
        yield team, own
    except Exception as error:
        better = team.explain(error)
        if better is not error:
            raise better from None
        raise
    finally:
        # After an error NCCL would wait for processes that may be gone.
        if mine and (own == "cpu" or sys.exc_info()[0] is None):
            dist.destroy_process_group()


def check_parallel(parallel: Parallel) -> None:
    """Raise ConfigError when this process was not started as ``parallel`` needs."""
    if parallel not in ("off", "ddp", "fsdp"):
        raise ConfigError(f"unknown way to share a run '{parallel}'; use off, ddp or fsdp")
    started = dist.is_initialized() or "RANK" in os.environ
    if parallel == "off" and started:
        rank, size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        raise ConfigError(
            f"this is process {rank} of {size} that torchrun started (RANK is set), and each would train alone in the "
            f"same directory: add --parallel ddp or --parallel fsdp, or start without torchrun"
        )
    if parallel != "off" and not started:
        raise ConfigError(
            f"--parallel {parallel} needs the processes that torchrun starts (RANK is not set): "
            f"python -m torch.distributed.run --nproc-per-node 2 -m recollect train ... --parallel {parallel}"
        )


def _own_device(parallel: Parallel, device: str) -> str:
    """With "cuda", each process of a machine takes the GPU of its local number."""
    check_parallel(parallel)
    if parallel == "off" or not device.startswith("cuda"):
        return device
    if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"device '{device}' is one GPU, but several processes share this machine; use --device cuda")
    own = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    resolve_device(own)
    return own


_n_stores = 0


def _own_store() -> c10d.Store:
    """A corner of the processes' store that nothing was written to: all of them ask for their corners in one order."""
    global _n_stores  # noqa: PLW0603
    _n_stores += 1
    made = c10d._get_default_store if dist.is_initialized() else _rendezvous  # pyright: ignore[reportPrivateUsage]
    return c10d.PrefixStore(f"recollect-{_n_stores}", made())


@cache
def _rendezvous() -> c10d.Store:
    """The store that torchrun names, kept for later runs of this process: its port can be taken once only."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store
