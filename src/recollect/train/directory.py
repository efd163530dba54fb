"""A run's directory: which config it belongs to, who is writing to it, and what it ended with.

``config.json`` ``environment.json`` ``metrics.jsonl`` ``checkpoints/`` ``results.json`` ``arrays.npz``. Whole files are
replaced atomically, so a killed process leaves the old one or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from recollect.core.config import differences, dumps, fingerprint, from_dict, to_dict
from recollect.core.errors import RunError
from recollect.core.files import locked, write_atomically
from recollect.train.run import RunConfig

OUR_KINDS = (
    "recollect.layers",
    "recollect.models.presets",
    "recollect.train.recall",
    "recollect.train.world",
    "recollect.train.language",
)
"""The modules that define, or import, every kind of config that a run of this package may name."""


class OtherRunError(RunError):
    """The directory is whole and belongs to another config: nothing may be written into it."""


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises RunError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{path} does not exist; is {path.parent} a run's directory?") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it and run the same command again") from None


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run and the rules for writing below them."""

    path: Path

    @property
    def log(self) -> Path:
        """What a run of a face-off printed, and the traceback of what ended it."""
        return self.path / "log.txt"

    @property
    def begun(self) -> Path:
        """Which process of a cluster took the run up last."""
        return self.path / ".begun"

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, device and commit of every start."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "results.json"

    @property
    def arrays(self) -> Path:
        """Arrays of the final evaluation."""
        return self.path / "arrays.npz"

    def claim(self, run: RunConfig) -> bool:
        """Make the directory this run's own, or check that it is; whether it was not before.

        Raises OtherRunError naming the keys that differ when it belongs to another config, RunError when it is damaged.
        """
        if not self.config.exists():
            if self.path.exists() and any(self.path.glob("checkpoints/*.json")):
                raise RunError(f"{self.path} holds checkpoints but no config.json; choose another --out or delete it")
            write_atomically(self.config, dumps(run).encode())
            return True
        held = read_json(self.config)
        if not isinstance(held, dict):
            raise RunError(f"{self.config} is not a JSON object; delete {self.path} and run the same command again")
        changed = differences(held, json.loads(json.dumps(to_dict(run))))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise OtherRunError(
                f"{self.path} holds a run of another config ({'; '.join(changed[:3])}{more}); "
                f"choose another --out or delete that directory"
            )
        return False

    def give_up(self) -> None:
        """Take back a claim of which nothing came but the record of its start."""
        made = {self.config, self.environment, self.path / ".lock"}
        if set(self.path.iterdir()) <= made:
            for path in made:
                path.unlink(missing_ok=True)
            self.path.rmdir()

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Describe a start in ``environment.json``; the starts it resumes move to its list ``earlier``."""
        earlier: list[Any] = []
        if self.environment.exists():
            last = read_json(self.environment)
            earlier = [*last.pop("earlier"), last]
        write_atomically(self.environment, json.dumps({**facts, "earlier": earlier}, indent=2).encode())

    def finished(self, run: RunConfig) -> dict[str, Any] | None:
        """What ``results.json`` holds when this very run has ended; None while it has not."""
        if not self.results.exists():
            return None
        results = read_json(self.results)
        if not isinstance(results, dict):
            raise RunError(f"{self.results} is not a JSON object; delete it and run the same command again")
        return results if results.get("fingerprint") == fingerprint(run) else None

    @contextmanager
    def lock(self) -> Generator[None]:
        """Hold the directory for this process; the system lets go of it however the process ends.

        Raises RunError when another process holds it.
        """
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path / ".lock", wait=False))
            except BlockingIOError:
                raise RunError(f"another process is training in {self.path}; wait for it or stop it") from None
            yield


def load_run(directory: Path) -> RunConfig:
    """The config of a run's directory. Kinds of one's own are known once the modules that define them are imported.

    Raises RunError when there is none, ConfigError when it does not decode.
    """
    for module in OUR_KINDS:
        import_module(module)
    path = RunDirectory(directory).config
    return from_dict(RunConfig, read_json(path), str(path))
