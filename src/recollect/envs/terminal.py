"""A terminal as a screen to play on: pictures as half blocks in 24-bit colour, keys without Enter."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
from types import TracebackType
from typing import Any, Self

import numpy as np

from recollect.core.errors import ConfigError
from recollect.envs.tiles import Bytes

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[0m\x1b[?25h\x1b[?1049l"
NAMES = {"A": "arrow-up", "B": "arrow-down", "C": "arrow-right", "D": "arrow-left"}
SEQUENCE_S = 0.02
"""How long the rest of an escape sequence may take; after that it was the Escape key."""


class Terminal:
    """The terminal of this process, which is as it was before however the ``with`` block is left."""

    shows_text = True

    def __init__(self) -> None:
        try:
            import termios
            import tty
        except ImportError:
            raise ConfigError("playing in a terminal needs a POSIX system; use --window") from None
        self._termios, self._tty = termios, tty
        self._input = sys.stdin.fileno()
        self._waiting = ""

    def __enter__(self) -> Self:
        self._before: list[Any] = self._termios.tcgetattr(self._input)
        # A terminated game leaves through __exit__ too, and one whose shell has it ignore interrupts.
        ends = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, signal.default_int_handler) for number in ends}
        self._tty.setcbreak(self._input)
        changed = self._termios.tcgetattr(self._input)
        changed[6][self._termios.VSUSP] = b"\0"  # stopped in the background, it could not put the terminal back
        self._termios.tcsetattr(self._input, self._termios.TCSANOW, changed)
        self._write(ENTER)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> bool:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._termios.tcsetattr(self._input, self._termios.TCSADRAIN, self._before)
        self._write(LEAVE)
        return kind is KeyboardInterrupt

    def show(self, picture: Bytes | str, lines: list[str]) -> None:
        """Draw over what was there. What does not fit is left out."""
        width, height = shutil.get_terminal_size()
        drawn = picture.splitlines() if isinstance(picture, str) else half_blocks(picture, width, height - len(lines))
        fitting = [*drawn, *(line[:width] for line in lines)][:height]
        self._write("\x1b[H" + "\x1b[K\r\n".join(fitting) + "\x1b[K\x1b[J")

    def key(self, timeout_s: float | None) -> str | None:
        """One key; arrows by name."""
        character = self._read(timeout_s)
        if character != "\x1b":
            return character
        if self._read(SEQUENCE_S) not in ("[", "O"):
            return "escape"
        return NAMES.get(self._read(SEQUENCE_S) or "", "")

    def _read(self, timeout_s: float | None) -> str | None:
        if not self._waiting:
            if not select.select([self._input], [], [], timeout_s)[0]:
                return None
            data = os.read(self._input, 64)
            if not data:  # the terminal is gone
                raise KeyboardInterrupt
            self._waiting = data.decode(errors="ignore")
        first, self._waiting = self._waiting[:1], self._waiting[1:]
        return first

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def half_blocks(picture: Bytes, width: int, height: int) -> list[str]:
    """A picture as lines of characters, two pixels each; every second pixel, or fewer, where it does not fit."""
    step = max(1, -(-picture.shape[1] // max(1, width)), -(-picture.shape[0] // max(1, 2 * height)))
    small = picture[::step, ::step]
    if len(small) % 2:
        small = np.concatenate([small, np.zeros_like(small[:1])])
    lines: list[str] = []
    for above, below in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        parts: list[str] = []
        colour = ""
        for (r, g, b), (r2, g2, b2) in zip(above, below, strict=True):
            wanted = f"\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m"
            parts.append("▀" if wanted == colour else f"{wanted}▀")
            colour = wanted
        lines.append("".join(parts) + "\x1b[0m")
    return lines
