"""The process a run lives in: allocator, device, threads, signals, and a record of the environment.

Nothing here imports torch before it is called, so the command line can re-execute itself first.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect.core.errors import RecollectError

if TYPE_CHECKING:
    import torch

ALLOCATOR_ENV: Mapping[str, str] = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""Makes glibc keep large blocks instead of giving them back after every step, which costs page faults."""

REEXECUTED = "RECOLLECT_ALLOCATOR"
SWEEP_PID = "RECOLLECT_SWEEP_PID"
SWEEP_COMMAND = "RECOLLECT_SWEEP_COMMAND"

PACKAGES = ("recollect", "torch", "numpy", "safetensors", "gymnasium", "tyro", "rich")


def allocator_env(env: Mapping[str, str]) -> dict[str, str]:
    """What to add to ``env`` for the allocator. Nothing without glibc, or where another allocator is preloaded."""
    if not sys.platform.startswith("linux") or "LD_PRELOAD" in env:
        return {}
    try:
        glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return {}
    return {key: value for key, value in ALLOCATOR_ENV.items() if key not in env} if glibc else {}


def reexec_with_allocator() -> None:
    """Start this very process again under ``ALLOCATOR_ENV``, at most once; returns when there is nothing to change.

    glibc reads these variables before Python starts. Call it before torch is imported.
    """
    added = allocator_env(os.environ)
    if not added or REEXECUTED in os.environ:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added, REEXECUTED: "1"})


def is_first_process() -> bool:
    """Whether this is the one process of a run that speaks to the user: all are but those that torchrun counts on."""
    return os.environ.get("RANK", "0") == "0"


def resolve_device(name: str) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1").

    Raises RecollectError when it is not one, or is not there.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecollectError(f"unknown device '{name}'; use cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = "no GPU is visible" if torch.backends.cuda.is_built() else "this build of torch has no CUDA"
            raise RecollectError(f"device '{name}' was asked for but {build}; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise RecollectError(f"device '{name}' does not exist; there are {torch.cuda.device_count()} GPUs")
        return device if ":" in name else torch.device("cuda", torch.cuda.current_device())
    if device.type != "cpu":
        raise RecollectError(f"device '{name}' is not supported; use cpu or cuda")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """JSON facts about where a run takes place: commit and diff, versions, device, threads."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **git_state(Path(__file__).parent),
        "packages": {p: package_version(p) for p in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR_ENV},
        "command": own_command(),
    }


def git_state(folder: Path) -> dict[str, str | None]:
    """``commit`` (with ``-dirty`` when files differ from it) and ``diff`` of the checkout that tracks ``folder``."""
    git = shutil.which("git")

    def ask(*arguments: str) -> str | None:
        if git is None:
            return None
        try:
            done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    # Installed into an environment inside some other repository, the package is untracked and that commit says nothing.
    if not (ask("ls-files", "__init__.py") or "").strip():
        return {"commit": None, "diff": None}
    commit, diff = ask("rev-parse", "HEAD"), ask("diff", "HEAD")
    return {"commit": (commit or "").strip() + ("-dirty" if diff else ""), "diff": diff or None}


def own_command() -> str:
    """What was typed to start this process, or the sweep that it is part of."""
    script = Path(sys.argv[0]).name if sys.argv else ""
    typed = shlex.join(["recollect" if script in ("recollect", "__main__.py") else script, *sys.argv[1:]])
    return os.environ.get(SWEEP_COMMAND, typed)


def package_version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def stop_on_signals() -> Generator[Callable[[], bool]]:
    """A question that turns true at the first SIGINT or SIGTERM, or when the sweep that started this process is gone.

    A second SIGINT interrupts at once. Handlers are put back at the end; only the main thread may enter.
    """
    caught: list[int] = []
    sweep = int(os.environ.get(SWEEP_PID, "0"))

    def handle(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(caught) or (sweep != 0 and os.getppid() != sweep)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
