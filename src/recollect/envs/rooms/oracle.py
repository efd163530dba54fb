"""What a perfect memory of the context predicts of the query's pictures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from recollect.envs.base import Frames
from recollect.envs.rooms.renderer import nothing_seen, reduced, render
from recollect.envs.rooms.scene import BRIGHT_FLOOR, DOME_RGB, FIRST_WALL, SIZE, Bytes, Floats, Scene
from recollect.envs.rooms.textures import NO_WALL

_NOWHERE = -1e3


def view(frames: Frames, context: int, *, teleports: bool = False, margin: int = 0) -> dict[str, float]:
    """``seen``: share of the query's pixels that show only what the context has shown; ``view``: share of those that
    are predicted exactly.

    The solver knows where it started, how it moves and how things look. In the context it notes every cell and every
    dome that some pixel's ray has met: their kind, colour and place are taken from the keys for probes instead of read
    off the pictures, and walls stop it where they are. In the query it reckons where it is from the actions alone,
    after a teleport from the earlier frame that looks the same and was followed by the same actions, and draws what it
    noted; every picture twice, with different things wherever it noted nothing: pixels that differ are those it cannot
    know. ``margin`` pixels of those seen are left out along the edges. Cost: rendering every context once, every query
    twice.
    """
    n, T = frames["action"].shape
    right, known, pixels = 0, 0, 0
    for i in range(n):
        scene = _world(frames, i)
        states = _reckoned(frames, i, scene, context, teleports)
        poses, index = states[:, :3], np.zeros(T, dtype=np.int64)
        seen = nothing_seen(scene)
        render(scene, poses[:context], index[:context], seen=seen)
        noted = [seen.cells == 1, seen.domes == 1]
        draft, other = (render(s, poses[context:], index[context:]) for s in _imagined(scene, noted[0], noted[1]))
        truth = frames["image"][i, context:]
        side = truth.shape[1]
        # A pixel of a smaller picture is known where all that it averages is.
        alike = (draft == other).all(axis=-1).reshape(len(truth), side, SIZE // side, side, SIZE // side)
        inner = slice(margin, side - margin)
        sure, draft, truth = (array[:, inner, inner] for array in (alike.all((2, 4)), reduced(draft, side), truth))
        right += int(((draft == truth).all(axis=-1) & sure).sum())
        known += int(sure.sum())
        pixels += sure.size
    return {"view": right / max(known, 1), "seen": known / pixels}


def _world(frames: Frames, i: int) -> Scene:
    """The scene of an episode, from the keys for probes."""
    rgb = frames["targets_color"][i, 0]
    colours = np.abs(rgb[:, None] - DOME_RGB).sum(axis=-1).argmin(axis=-1).astype(np.uint8)
    return Scene(np.array(frames["cells"][i, :1]), np.array(frames["targets_pos"][i, :1]), colours[None])


def _imagined(scene: Scene, cells: npt.NDArray[np.bool_], domes: npt.NDArray[np.bool_]) -> tuple[Scene, Scene]:
    """The scene as noted, twice, filled up in different ways."""
    open_ = np.full_like(scene.grid, FIRST_WALL)
    open_[:, 1:-1, 1:-1] = BRIGHT_FLOOR
    hidden = np.where(domes[..., None], scene.domes, np.float32(_NOWHERE))
    other = np.where(domes, scene.colours, (scene.colours + 1) % len(DOME_RGB)).astype(np.uint8)
    walled = np.where(cells, scene.grid, NO_WALL).astype(np.uint8)
    return (
        Scene(walled, hidden, scene.colours),
        Scene(np.where(cells, scene.grid, open_).astype(np.uint8), scene.domes, other),
    )


def _reckoned(frames: Frames, i: int, scene: Scene, context: int, teleports: bool) -> Floats:
    """States (T, 5) from the first pose and the actions."""
    from recollect.envs.rooms.motion import replay

    actions = np.array(frames["action"][i])
    states = np.zeros((len(actions), 5))
    states[0] = [*frames["agent_pos"][i, 0], frames["heading"][i, 0], 0.0, 0.0]
    if not teleports:
        replay(states, actions, scene.grid[0])
        return states
    replay(states[: context - 1], actions[: context - 1], scene.grid[0])
    states[context - 1] = states[_recognised(frames["image"][i], actions, context)]
    replay(states[context - 1 :], actions[context - 1 :], scene.grid[0])
    return states


def _recognised(image: Bytes, actions: Bytes, context: int) -> int:
    """The earlier frame that looks like the context's last one, and whose next actions are the query's."""
    same = np.flatnonzero((image[: context - 1] == image[context - 1]).all(axis=(1, 2, 3)))
    query = actions[context:]
    agree = [int((actions[c + 1 : context - 1][: len(query)] == query[: context - 2 - c]).sum()) for c in same]
    return int(same[int(np.argmax(agree))]) if len(same) else 0
