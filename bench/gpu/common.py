"""What the timing scripts of this folder share: ceilings measured on the spot, graphs, a record kept case by case."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recollect.core.errors import RecollectError
from recollect.core.files import write_atomically
from recollect.eval.bench.measure import median_time, once, peak_of
from recollect.ops import dispatch
from recollect.train.runtime import environment

SECONDS = 0.3
"""How long each figure is repeated."""


def copy_rate(device: torch.device, n_bytes: int = 1 << 30) -> float:
    """Bytes a second of a plain copy, read and written bytes both counted: the ceiling of what only moves memory."""
    n_bytes = n_bytes if device.type == "cuda" else n_bytes >> 6
    source = torch.empty(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * n_bytes / median_time(lambda: target.copy_(source), SECONDS, device).seconds


def product_rate(device: torch.device, dtype: torch.dtype, n: int = 8192) -> float:
    """Operations a second of one large matrix product: the ceiling of what only multiplies."""
    n = n if device.type == "cuda" else n >> 4
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    return 2 * n**3 / median_time(lambda: a @ a, SECONDS, device).seconds


def graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as one CUDA graph: its time without the host's. Raises RuntimeError where something in it waits."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def figures(run: Callable[[], object], device: torch.device, *, graph: bool = True) -> dict[str, Any]:
    """Milliseconds of ``run`` and of its graph, and peak bytes above what was there; ``failed`` if it did."""
    try:
        for _ in range(3):
            once(run, device)
        peak = peak_of(run, device)
        found: dict[str, Any] = {"ms": 1000 * median_time(run, SECONDS, device).seconds, "peak_bytes": peak.bytes}
    except (RuntimeError, RecollectError) as error:  # out of memory, or a kernel that does not compile
        return {"failed": " ".join(str(error).split())[:300]}
    if graph and device.type == "cuda":
        try:
            replay = graphed(run, device)
            found["graph_ms"] = 1000 * median_time(replay, SECONDS, device).seconds
        except RuntimeError as error:
            found["graph_failed"] = " ".join(str(error).split())[:300]
    return found


@contextmanager
def only_library(name: str) -> Generator[list[dispatch.Choice]]:
    """Ops use no other installed library than this; the list gets what every call of one that may chose."""
    chosen: list[dispatch.Choice] = []
    explain, order = dispatch.explain_library, dispatch.LIBRARIES

    def noted(op: str, asked: dispatch.Asked) -> dispatch.Choice:
        chosen.append(explain(op, asked))
        return chosen[-1]

    try:
        dispatch.LIBRARIES, dispatch.explain_library = (name,), noted
        yield chosen
    finally:
        dispatch.LIBRARIES, dispatch.explain_library = order, explain


class Cases:
    """A JSON file of named cases, written after each one; those it already holds are not measured again."""

    def __init__(self, path: Path, device: torch.device, **settings: Any) -> None:
        facts = environment(device)
        self.path = path
        self.record: dict[str, Any] = {
            **{"commit": facts["commit"], "device": facts["device"], "torch": torch.__version__},
            **settings,
            "cases": {},
        }
        if path.exists():
            before = json.loads(path.read_text())
            same = {name: value for name, value in before.items() if name != "cases"}
            if same == {name: value for name, value in self.record.items() if name != "cases"}:
                self.record = before

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The case of this name, measured unless it is there."""
        cases = self.record["cases"]
        if name not in cases:
            cases[name] = measure()
            self.write()
            print(name, json.dumps(cases[name]), flush=True)
        return cases[name]

    def write(self) -> None:
        """Write the file as it stands."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self.record, indent=1) + "\n").encode())
