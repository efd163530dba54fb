"""Tiles: what the codes mean, the committed pictures against MiniGrid's rules, and drawing them."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recollect.envs.tiles import (
    COLOURS,
    EMPTY,
    FIRST_AGENT,
    FIRST_AGENT_IN_DOOR,
    FIRST_COLOUR,
    FIRST_KEY,
    FIRST_LOCKED,
    FIRST_OPEN,
    N_CODES,
    N_FLOOR_CODES,
    WALL,
    agent_code,
    atlas,
    codes_from_pixels,
    render,
    text,
)
from recollect.eval.pictures import render_on

ROOT = Path(__file__).parents[1]
RGB = {"green": (0, 255, 0), "blue": (0, 0, 255), "purple": (112, 39, 195), "yellow": (255, 255, 0)}
SAMPLES = 24  # 8 pixels of 3 samples each


class Canvas:
    """One tile at MiniGrid's sampling, drawn shape by shape."""

    def __init__(self) -> None:
        centres = (np.arange(SAMPLES) + 0.5) / SAMPLES
        self.x, self.y = np.meshgrid(centres, centres)
        self.picture = np.zeros((SAMPLES, SAMPLES, 3), dtype=np.uint8)
        self.rect(0, 0.031, 0, 1, (100, 100, 100))
        self.rect(0, 1, 0, 0.031, (100, 100, 100))

    def rect(self, x0: float, x1: float, y0: float, y1: float, colour: tuple[float, ...]) -> None:
        inside = (self.x >= x0) & (self.x <= x1) & (self.y >= y0) & (self.y <= y1)
        self.picture[inside] = np.array(colour).astype(np.uint8)

    def disc(self, x: float, y: float, r: float, colour: tuple[float, ...]) -> None:
        self.picture[(self.x - x) ** 2 + (self.y - y) ** 2 <= r * r] = colour

    def agent(self, heading: int) -> None:
        """A triangle from 0.12 to 0.87 of the tile, turned about its middle."""
        angle = -heading * np.pi / 2
        dx, dy = self.x - 0.5, self.y - 0.5
        along, across = 0.5 + dx * np.cos(angle) - dy * np.sin(angle), dy * np.cos(angle) + dx * np.sin(angle)
        self.picture[(along >= 0.12) & (np.abs(across) < 0.31 * (0.87 - along) / 0.75)] = (255, 0, 0)

    def tile(self) -> np.ndarray:
        return np.trunc(self.picture.reshape(8, 3, 8, 3, 3).mean(axis=(1, 3))).astype(np.uint8)


def drawn(code: int) -> np.ndarray:
    """The picture of a code by the rules of MiniGrid, as facts."""
    canvas = Canvas()
    colours = [RGB[name] for name in COLOURS]

    def floor(c: int) -> None:
        canvas.rect(0.031, 1, 0.031, 1, tuple(v / 2 for v in colours[c]))

    def open_door(c: int) -> None:
        canvas.rect(0.88, 1, 0, 1, colours[c])
        canvas.rect(0.92, 0.96, 0.04, 0.96, (0, 0, 0))

    if code == WALL:
        canvas.rect(0, 1, 0, 1, (100, 100, 100))
    elif FIRST_COLOUR <= code < FIRST_AGENT:
        floor(code - FIRST_COLOUR)
    elif FIRST_AGENT <= code < FIRST_LOCKED:
        ground, heading = divmod(code - FIRST_AGENT, 4)
        if ground:
            floor(ground - 1)
        canvas.agent(heading)
    elif FIRST_LOCKED <= code < FIRST_OPEN:
        colour = colours[code - FIRST_LOCKED]
        canvas.rect(0, 1, 0, 1, colour)
        canvas.rect(0.06, 0.94, 0.06, 0.94, tuple(0.45 * v for v in colour))
        canvas.rect(0.52, 0.75, 0.50, 0.56, colour)
    elif FIRST_OPEN <= code < FIRST_KEY:
        open_door(code - FIRST_OPEN)
    elif FIRST_KEY <= code < FIRST_AGENT_IN_DOOR:
        colour = colours[code - FIRST_KEY]
        canvas.rect(0.50, 0.63, 0.31, 0.88, colour)
        canvas.rect(0.38, 0.50, 0.59, 0.66, colour)
        canvas.rect(0.38, 0.50, 0.81, 0.88, colour)
        canvas.disc(0.56, 0.28, 0.190, colour)
        canvas.disc(0.56, 0.28, 0.064, (0, 0, 0))
    elif code >= FIRST_AGENT_IN_DOOR:
        c, heading = divmod(code - FIRST_AGENT_IN_DOOR, 4)
        open_door(c)
        canvas.agent(heading)
    return canvas.tile()


@pytest.mark.parametrize("code", range(N_CODES))
def test_the_atlas_is_drawn_by_minigrids_rules(code: int):
    assert (atlas()[code] == drawn(code)).all()


def test_the_atlas_is_the_committed_one():
    digest = hashlib.sha256(atlas().tobytes()).hexdigest()[:16]
    # Another digest means other pictures than those that published numbers were measured on: say so in the changelog.
    assert digest == "94234892dbac9225"
    assert atlas().dtype == np.uint8
    assert not atlas().flags.writeable


@pytest.mark.skipif(importlib.util.find_spec("minigrid") is None, reason="needs the package minigrid")
def test_minigrid_draws_the_same_tiles():
    script = ROOT / "bench" / "pictures" / "make_atlas.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


def test_codes_follow_each_other_without_gaps():
    ranges = [FIRST_COLOUR, FIRST_AGENT, FIRST_LOCKED, FIRST_OPEN, FIRST_KEY, FIRST_AGENT_IN_DOOR, N_CODES]
    assert np.diff(ranges).tolist() == [4, 20, 4, 4, 4, 16]
    assert (EMPTY, WALL, N_FLOOR_CODES) == (0, 1, FIRST_LOCKED)


def test_every_code_has_its_own_picture_and_is_read_back():
    assert atlas().shape == (N_CODES, 8, 8, 3)
    assert len({picture.tobytes() for picture in atlas()}) == N_CODES
    codes = np.arange(N_CODES, dtype=np.uint8).reshape(1, 2, N_CODES // 2)
    pixels = render(codes)
    assert pixels.shape == (1, 16, 4 * N_CODES, 3)
    assert pixels.dtype == np.uint8
    for code in range(N_CODES):
        row, column = divmod(code, N_CODES // 2)
        tile = pixels[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert (tile == atlas()[code]).all()
    assert (codes_from_pixels(pixels) == codes).all()
    noisy = pixels + np.random.default_rng(0).normal(0, 20, pixels.shape)
    assert (codes_from_pixels(noisy) == codes).all()


def test_agent_codes_cover_everything_to_stand_on():
    headings = np.arange(4, dtype=np.uint8)
    floors = np.array([EMPTY, *range(FIRST_COLOUR, FIRST_AGENT)], dtype=np.uint8)
    assert agent_code(floors[:, None], headings).ravel().tolist() == list(range(FIRST_AGENT, FIRST_LOCKED))
    doors = np.arange(FIRST_OPEN, FIRST_KEY, dtype=np.uint8)
    assert agent_code(doors[:, None], headings).ravel().tolist() == list(range(FIRST_AGENT_IN_DOOR, N_CODES))


def every_neighbourhood(device: str) -> tuple[np.ndarray, torch.Tensor]:
    codes = np.random.default_rng(0).integers(N_CODES, size=(3, 7, 5, 4)).astype(np.uint8)
    codes[0, 0] = np.arange(20).reshape(5, 4)
    codes[0, 1:3].flat[: N_CODES - 20] = np.arange(20, N_CODES)
    return render(codes), render_on(torch.from_numpy(codes).to(device))


def test_torch_draws_the_same_pictures():
    ours, on_device = every_neighbourhood("cpu")
    assert on_device.dtype == torch.uint8
    assert (on_device.numpy() == ours).all()
    single = np.full((5, 5), FIRST_KEY, dtype=np.uint8)
    assert (render_on(torch.from_numpy(single)).numpy() == render(single)).all()
    assert render_on(torch.zeros((0, 5, 5), dtype=torch.uint8)).shape == (0, 40, 40, 3)
    assert (render_on(torch.from_numpy(single).long()).numpy() == render(single)).all()


@pytest.mark.gpu
def test_a_gpu_draws_the_same_pictures():
    ours, on_device = every_neighbourhood("cuda")
    assert on_device.is_cuda
    assert (on_device.cpu().numpy() == ours).all()


def test_text_names_every_tile():
    codes = np.array([[EMPTY, WALL, FIRST_COLOUR], [FIRST_LOCKED + 1, FIRST_OPEN + 2, FIRST_KEY + 3]], dtype=np.uint8)
    assert text(codes, colour=False) == "  ##:g\nDb|pky"
    agents = np.array([[FIRST_AGENT, FIRST_AGENT + 4 + 1, FIRST_AGENT_IN_DOOR + 4 + 3]], dtype=np.uint8)
    assert text(agents, colour=False) == "> vg^b"
    coloured = text(codes)
    assert coloured.count("\033[0m") == 4
    plain = [text(np.array([[code]], dtype=np.uint8), colour=False) for code in range(N_FLOOR_CODES)]
    assert len(set(plain)) == N_FLOOR_CODES
    assert {len(glyphs) for glyphs in plain} == {2}
