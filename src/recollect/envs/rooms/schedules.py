"""When the scripted policy leaves a room, and how long the parts of an episode are (S4WM, arXiv 2307.02064)."""

from __future__ import annotations

from typing import NamedTuple

from recollect.envs.rooms.layouts import RoomsName


class Schedule(NamedTuple):
    """Counts are of frames; frame t is what step t led to."""

    context: int
    query: int
    switches: tuple[tuple[int, int], ...]
    """First and last step at which exploring may end, switch by switch."""
    copies: tuple[int, int] = (0, 0)
    """First and last frame that a teleport may lead back to."""

    def lasting(self, query: int) -> Schedule:
        """The same context before ``query`` frames: rooms go on being left as the last one of ``switches`` is.

        A room is left where a whole period follows, as after the last published switch; so the published query gives
        the schedule itself.
        """
        (_, before), (first, last) = self.switches[-2:]
        period = last - before
        periods = (self.context + query - 1 - last) // period
        more = tuple((first + period * k, last + period * k) for k in range(1, periods))
        return self._replace(query=query, switches=(*self.switches, *more))


def _every(period: int, early: int, n: int, forced: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """n switches, the i-th within ``early`` steps before the end of period i unless it is forced."""
    ends = [period * (i + 1) for i in range(n)]
    return tuple((forced[i], forced[i]) if i in forced else (end - early, end) for i, end in enumerate(ends))


SCHEDULES: dict[tuple[RoomsName, bool], Schedule] = {
    ("two", False): Schedule(301, 200, _every(100, 20, 4, {2: 300})),
    ("four", False): Schedule(501, 500, (*_every(100, 20, 5, {4: 500}), (600, 625), (725, 750), (850, 875))),
    ("ten", False): Schedule(1101, 900, _every(100, 20, 19, {10: 1100})),
    ("two", True): Schedule(151, 100, ((65, 75),), (20, 49)),
    ("four", True): Schedule(301, 200, ((65, 75), (140, 150), (215, 225)), (30, 99)),
    ("ten", True): Schedule(601, 400, _every(60, 10, 9, {}), (50, 199)),
}
"""By name of the rooms, and whether the context ends in a teleport."""
