"""A perfect memory in Multi Doors Keys: a map of what was seen, kept up by the rules when nothing more is shown."""

from __future__ import annotations

import numpy as np

from recollect.envs.base import Frames
from recollect.envs.door_key_walks import HEIGHT, MIDDLE, PICKUP, TOGGLE, start, width
from recollect.envs.grid_world import FORWARD, LEFT, MARGIN, RIGHT, STEPS, VIEW, WALKABLE
from recollect.envs.tiles import (
    COLOURS,
    EMPTY,
    FIRST_AGENT,
    FIRST_AGENT_IN_DOOR,
    FIRST_KEY,
    FIRST_LOCKED,
    FIRST_OPEN,
    N_CODES,
    Bytes,
    agent_code,
)

UNKNOWN = N_CODES
"""A tile that was never seen."""
_BELOW = np.arange(N_CODES + 1, dtype=np.uint8)
"""By tile code: what is there without the agent."""
for _ground in (EMPTY, *range(FIRST_OPEN, FIRST_KEY)):
    _BELOW[agent_code(np.full(4, _ground, dtype=np.uint8), np.arange(4, dtype=np.uint8))] = _ground


def foretell(frames: Frames, n_doors: int, context: int) -> Bytes:
    """Tiles (N, T - context, 5, 5) of the query, from the tiles of the context and all actions; UNKNOWN where none.

    Time O(N T), with one loop over T.
    """
    tiles, actions = frames["tiles"], frames["action"].astype(np.int64)
    N, T = actions.shape
    rows, window = np.arange(N), np.arange(VIEW)
    x, y, heading = np.full(N, start(n_doors)), np.full(N, MIDDLE), np.zeros(N, dtype=np.int64)
    carried = np.zeros((N, len(COLOURS)), dtype=np.int64)
    known = np.full((N, HEIGHT + 2 * MARGIN, width(n_doors) + 2 * MARGIN), UNKNOWN, dtype=np.uint8)
    walkable = np.append(WALKABLE, False)
    foretold = np.empty((N, T - context, VIEW, VIEW), dtype=np.uint8)
    for t in range(T):
        if t:
            action = actions[:, t]
            heading = (heading + (action == RIGHT) - (action == LEFT)) % 4
            ahead = (rows, y + STEPS[heading, 1] + MARGIN, x + STEPS[heading, 0] + MARGIN)
            code = known[ahead].astype(np.int64)
            moves = (action == FORWARD) & walkable[code]
            key, door = code - FIRST_KEY, code - FIRST_LOCKED
            takes = (action == PICKUP) & (key >= 0) & (key < len(COLOURS))
            fits = (action == TOGGLE) & (door >= 0) & (door < len(COLOURS))
            opens = fits & (carried[rows, np.where(fits, door, 0)] > 0)
            carried[rows[takes], key[takes]] += 1
            carried[rows[opens], door[opens]] -= 1
            known[ahead] = np.where(takes, EMPTY, np.where(opens, door + FIRST_OPEN, code))
            x, y = x + STEPS[heading, 0] * moves, y + STEPS[heading, 1] * moves
        around = (rows[:, None, None], (y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :])
        if t < context:
            known[around] = _BELOW[tiles[:, t]]
        else:
            view = known[around]
            seen = view[:, MARGIN, MARGIN] != UNKNOWN
            view[seen, MARGIN, MARGIN] = agent_code(view[seen, MARGIN, MARGIN], heading[seen])
            foretold[:, t - context] = view
    return foretold


def scores(foretold: Bytes, frames: Frames, context: int) -> dict[str, float]:
    """How often the door that is tried is as foretold, and how often the whole view is, but for unknown tiles."""
    shown, action = frames["tiles"][:, context:], frames["action"][:, context:]
    agent = shown[:, :, MARGIN, MARGIN].astype(np.int64)
    heading = (agent - np.where(agent < FIRST_AGENT_IN_DOOR, FIRST_AGENT, FIRST_AGENT_IN_DOOR)) % 4
    episode, t = np.nonzero(action == TOGGLE)
    step = STEPS[heading[episode, t]]
    ahead = (episode, t, MARGIN + step[:, 1], MARGIN + step[:, 0])
    is_door = (shown[ahead] >= FIRST_LOCKED) & (shown[ahead] < FIRST_KEY)
    right = ((foretold == shown) | (foretold == UNKNOWN)).all(axis=(2, 3))
    return {"doors": float((foretold[ahead] == shown[ahead])[is_door].mean()), "view": float(right.mean())}
