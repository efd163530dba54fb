"""Draw the tiles of the grid worlds with MiniGrid's own renderer: ``src/recollect/envs/atlas.npy``.

    pip install minigrid && python bench/pictures/make_atlas.py [--check]

Only needed when ``recollect.envs.tiles`` gets a new code; ``--check`` compares and writes nothing. The pictures are
those of ``Grid.render`` at 8 pixels a tile, with its default supersampling, without highlight: it stores the average of
3 x 3 samples per pixel rounded down. Made with MiniGrid 3.2 (Apache-2.0).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from recollect.envs import tiles


def pictures() -> np.ndarray:
    """The pictures (N_CODES, 8, 8, 3) of all codes in order."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Door, Floor, Key, Wall

    def draw(thing: Any, heading: int | None = None) -> np.ndarray:
        return Grid.render_tile(thing, agent_dir=heading, tile_size=tiles.TILE_PIXELS).astype(np.uint8)

    floors = [Floor(name) for name in tiles.COLOURS]
    doors = [Door(name, is_open=True) for name in tiles.COLOURS]
    drawn = [draw(None), draw(Wall()), *map(draw, floors)]
    drawn += [draw(floor, heading) for floor in (None, *floors) for heading in range(4)]
    drawn += [draw(Door(name, is_locked=True)) for name in tiles.COLOURS]
    drawn += map(draw, doors)
    drawn += [draw(Key(name)) for name in tiles.COLOURS]
    drawn += [draw(door, heading) for door in doors for heading in range(4)]
    return np.stack(drawn)


def main() -> None:
    """Write the atlas, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the atlas in the package")
    path = Path(tiles.__file__).with_name("atlas.npy")
    made = pictures()
    if not parser.parse_args().check:
        np.save(path, made)
        print(f"{path}: {len(made)} tiles")
    elif not np.array_equal(made, np.load(path)):
        sys.exit(f"{path} is not what this MiniGrid draws")


if __name__ == "__main__":
    main()
