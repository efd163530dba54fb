"""A window as a screen to play on (extra ``play``: pygame)."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any, Self

import numpy as np

from recollect.core.errors import ConfigError
from recollect.envs.tiles import Bytes

SIDE, LINE, WIDTH = 512, 18, 760
NAMES = {"up": "arrow-up", "down": "arrow-down", "left": "arrow-left", "right": "arrow-right"}


class Window:
    """One window, closed when the ``with`` block is left. Raises ConfigError without pygame or a display."""

    shows_text = False

    def __init__(self) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        try:
            self._pygame: Any = importlib.import_module("pygame")
        except ImportError:
            raise ConfigError("--window needs pygame: pip install 'recollect[play]'") from None
        self._screen: Any = None

    def __enter__(self) -> Self:
        pygame = self._pygame
        try:
            pygame.display.init()
            pygame.font.init()
            self._screen = pygame.display.set_mode((WIDTH, SIDE + 4 * LINE))
        except pygame.error as error:
            raise ConfigError(f"--window cannot open a window ({error}); play in a terminal instead") from None
        pygame.display.set_caption("recollect")
        pygame.key.set_repeat(300, 80)
        self._font = pygame.font.Font(None, LINE)
        return self

    def __exit__(self, *_: object) -> None:
        self._pygame.quit()

    def show(self, picture: Bytes | str, lines: list[str]) -> None:
        """Draw the picture large, and the lines below it."""
        assert not isinstance(picture, str)
        pygame = self._pygame
        zoom = max(1, SIDE // max(picture.shape[:2]))
        large = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
        height = len(large) + (len(lines) + 1) * LINE
        if height > self._screen.get_height():
            self._screen = pygame.display.set_mode((WIDTH, height))
        self._screen.fill((0, 0, 0))
        surface = pygame.image.frombuffer(np.ascontiguousarray(large).tobytes(), large.shape[1::-1], "RGB")
        self._screen.blit(surface, ((WIDTH - large.shape[1]) // 2, 0))
        for i, line in enumerate(lines):
            self._screen.blit(self._font.render(line, True, (220, 220, 220)), (8, len(large) + LINE // 2 + i * LINE))
        pygame.display.flip()

    def key(self, timeout_s: float | None) -> str | None:
        """The next key that was pressed; ``escape`` when the window was closed."""
        pygame = self._pygame
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            event = pygame.event.wait(max(1, round(1000 * min(left, 1.0))))
            if event.type == pygame.QUIT:
                return "escape"
            if event.type == pygame.KEYDOWN:
                name = pygame.key.name(event.key)
                return NAMES.get(name, name)
