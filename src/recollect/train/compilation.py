"""Compiling what a model computes in training, with ``torch.compile`` and, on a GPU, CUDA graphs.

Modules are compiled in place, so parameters keep their names and a checkpoint does not tell. Only training runs the
compiled form: evaluation has other shapes at every call and is done by the code as written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import nn

from recollect.core.errors import ConfigError, RunError

Compile: TypeAlias = Literal["off", "default", "graphs"]

BACKEND = "inductor"
"""What ``torch.compile`` hands its graphs to; ``eager`` and ``aot_eager`` generate no code and need no compiler."""


def check_compile(how: str, device: torch.device) -> None:
    """Raise ConfigError when ``how`` is no way to compile, or none on ``device``."""
    if how not in ("off", "default", "graphs"):
        raise ConfigError(f"unknown way to compile '{how}'; use off, default or graphs")
    if how == "graphs" and device.type != "cuda":
        raise ConfigError(
            f"--compile graphs records CUDA graphs and needs a GPU, not {device.type}; use default or off"
        )


def compile_modules(modules: Iterable[nn.Module], how: Compile) -> None:
    """Make every call of these modules compile on its first use; ``off`` leaves them as they are."""
    for module in modules if how != "off" else ():
        module.compile(backend=BACKEND, mode="reduce-overhead" if how == "graphs" else None)


@contextmanager
def compiled_step(how: Compile) -> Generator[None]:
    """Around forward and backward of one step. Raises RunError when the compiler fails."""
    if how == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    try:
        yield
    except Exception as error:
        if how == "off" or not _is_of_the_compiler(error):
            raise
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        raise RunError(f"--compile {how} failed ({reason}); the same command with --compile off goes on") from error


@contextmanager
def as_written(how: Compile) -> Generator[None]:
    """Runs modules without their compiled form."""
    if how == "off":
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def _is_of_the_compiler(error: Exception) -> bool:
    return any(kind.__module__.startswith(("torch._dynamo", "torch._inductor")) for kind in type(error).__mro__)
