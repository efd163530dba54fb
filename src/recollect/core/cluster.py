"""A Ray cluster (extra ``cluster``): connecting to it, and things made on its nodes and taken in order.

Every node must have recollect installed. A task whose process or node dies is started again by Ray, up to ``RETRIES``
times; an exception is not retried, it would come again.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from recollect.core.ahead import Make
from recollect.core.errors import RecollectError, described

RETRIES = 3
WAIT_S = 0.25
"""How long a wait for tasks lasts before Ctrl-C is heard."""


class RayConnection:
    """Ray, once ``connect`` was called. ``address`` as ``ray.init`` takes it: "auto" for the cluster of this machine,
    "local" for a new one, host:port or ray://...; empty for RAY_ADDRESS where it is set, else a cluster that runs here,
    else a new one.

    Raises RecollectError without Ray, and in ``connect`` when there is no such cluster.
    """

    def __init__(self, address: str = "") -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError:
            raise RecollectError("--ray needs Ray: pip install 'recollect[cluster]'") from None
        self.address = address
        self.connected = self._ours = False

    def connect(self) -> None:
        """Join the cluster, unless this process has already."""
        if not self.ray.is_initialized():
            try:
                self.ray.init(address=self.address or None, logging_level=logging.ERROR, log_to_driver=False)
            except Exception as error:
                where = f"the Ray cluster '{self.address}'" if self.address else "a Ray cluster"
                raise RecollectError(f"cannot connect to {where}: {described(error)}") from None
            self._ours = True
        self.connected = True

    def remote(self, function: Callable[..., Any], **options: Any) -> Any:
        """The function as a Ray task, to be called with ``.remote(...)``."""
        return self.ray.remote(**options)(function)

    def leave(self) -> None:
        """Disconnect where ``connect`` connected."""
        self.connected = False
        if self._ours:
            self._ours = False
            self.ray.shutdown()


@contextmanager
def made_on_cluster(build: Callable[[], Make], numbers: range, address: str) -> Generator[Make]:
    """As ``core.ahead.made_ahead``, by tasks of one CPU each. At most two for every CPU of the cluster are under way.

    Raises RecollectError without Ray or such a cluster, and when a task died too often.
    """
    connection = RayConnection(address)
    connection.connect()
    ray, task = connection.ray, connection.remote(_make, num_cpus=1, max_retries=RETRIES)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, under_way = iter(numbers), deque[tuple[int, Any]]()

    def refill() -> None:
        while len(under_way) < ahead and (number := next(waiting, None)) is not None:
            under_way.append((number, task.remote(build, number)))

    def take(number: int) -> Any:
        refill()
        made, answer = under_way.popleft()
        assert made == number, f"item {made} is due, {number} was asked for"
        while not ray.wait([answer], num_returns=1, timeout=WAIT_S)[0]:
            pass
        try:
            ok, result = ray.get(answer)
        except Exception as error:
            raise RecollectError(f"item {number} was not made on the Ray cluster: {described(error)}") from None
        if not ok:
            raise result
        return result

    try:
        yield take
    finally:
        for _, answer in under_way:
            ray.cancel(answer, force=True)
        connection.leave()


def _make(build: Callable[[], Make], number: int) -> tuple[bool, Any]:
    try:
        return True, build()(number)
    except RecollectError as error:  # Ray would wrap it; users know ours by its text alone
        return False, error
