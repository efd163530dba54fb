"""Playing: keys, what is drawn, and a terminal that is as before however the game ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.cli import main
from recollect.core.errors import ConfigError
from recollect.envs import ENVS, DistractingMemory
from recollect.envs.memory_maze import MemoryMaze
from recollect.envs.playing import Game, keys_of, told
from recollect.envs.terminal import ENTER, LEAVE, half_blocks
from recollect.envs.tiles import render
from toy_env import SIDE, ToyEnv

PATH = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])


class FakeScreen:
    """Gives the keys it was given, then leaves; keeps what it is shown."""

    def __init__(self, keys: list[str | None], *, text: bool = False) -> None:
        self.shows_text = text
        self._keys = iter(keys)
        self.shown: list[tuple[Any, list[str]]] = []
        self.waits: list[float | None] = []

    def show(self, picture: Any, lines: list[str]) -> None:
        self.shown.append((picture, lines))

    def key(self, timeout_s: float | None) -> str | None:
        self.waits.append(timeout_s)
        return next(self._keys, "escape")


def test_keys_play_and_the_line_says_what_happened() -> None:
    screen = FakeScreen(["d", "arrow-left", "z", "2", "h", "d", "d", "d", "d", "d", "r"])
    Game(ToyEnv.Config(), "toy").run(screen, fps=10)
    headlines = [lines[0] for _, lines in screen.shown]
    assert headlines[0].startswith("toy   step 0")
    at = [int(np.argwhere(picture[SIDE // 2, :, 0])[0, 0]) for picture, _ in screen.shown]
    assert at[:5] == [4, 5, 4, 4, 4]
    assert "step 2" in headlines[3], "an unknown key is no action"
    assert "step 3 " in headlines[4]
    assert "sing" in headlines[4]
    assert screen.shown[4][1][2:] == []
    assert screen.shown[5][1][2:] == ["x: 4", "map: [[1. 0.]", " [0. 1.]]"]
    assert headlines[9].endswith("right   reward 1   the end: r for another")
    assert headlines[10] == headlines[9], "nothing happens after the end"
    assert headlines[11].startswith("toy   step 0")
    assert set(screen.waits) == {None}
    assert screen.shown[0][1][1] == "a left  d right  2 sing  r new  h hidden state  q leave"


def test_text_where_the_environment_has_it_and_the_screen_takes_it() -> None:
    for text, kind in ((True, str), (False, np.ndarray)):
        screen = FakeScreen([], text=text)
        Game(ToyEnv.Config(), "toy").run(screen, fps=10)
        assert isinstance(screen.shown[0][0], kind)


def test_the_script_is_the_one_of_the_dataset() -> None:
    config = DistractingMemory.Config(11)
    screen = FakeScreen([None] * config.episode_length + ["d", None])
    Game(config, "memory", seed=3, script=True).run(screen, fps=4)
    n = config.episode_length
    frames = config.generate(np.random.default_rng(3), 1)
    pictures = render(frames["tiles"][0])
    assert all((picture == pictures[t]).all() for t, (picture, _) in enumerate(screen.shown[:n]))
    assert screen.waits[: n - 1] == [1 / 4] * (n - 1)
    assert screen.waits[n - 1] is None, "it waits at the end"
    assert f"step {config.context_length - 1} context" in screen.shown[config.context_length - 1][1][0]
    assert f"step {config.context_length} query" in screen.shown[config.context_length][1][0]
    assert f"reward {frames['reward'][0, -1]:g}" in screen.shown[n - 1][1][0]


def test_keys_are_letters_where_names_are_usual_and_numbers_always() -> None:
    assert keys_of(("left", "right", "forward")) == {"a": 0, "d": 1, "w": 2, "0": 0, "1": 1, "2": 2}
    maze = keys_of(MemoryMaze.Config.actions)
    assert [maze[key] for key in "xwadqe"] == list(range(6))
    assert keys_of(("turn_left", "hum"))["a"] == 0
    assert keys_of(tuple("abcdefghijkl"))["9"] == 9
    assert told({"position": (1, 2)}) == ["position: [1 2]"]


def test_half_blocks_carry_two_pixels_each() -> None:
    picture = np.zeros((4, 2, 3), dtype=np.uint8)
    picture[0, 0], picture[1, 0] = (1, 2, 3), (4, 5, 6)
    lines = half_blocks(picture, 80, 24)
    assert lines[0] == "\x1b[38;2;1;2;3;48;2;4;5;6m▀\x1b[38;2;0;0;0;48;2;0;0;0m▀\x1b[0m"
    assert lines[1] == "\x1b[38;2;0;0;0;48;2;0;0;0m▀▀\x1b[0m"
    assert len(half_blocks(np.zeros((64, 64, 3), np.uint8), 40, 100)) == 16
    assert len(half_blocks(np.zeros((64, 64, 3), np.uint8), 80, 16)) == 16
    assert len(half_blocks(np.zeros((5, 5, 3), np.uint8), 80, 16)) == 3


BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
"""As a shell starts what it puts into the background: with interrupts ignored."""


@pytest.mark.parametrize("how", ["key", "escape", "interrupt", "terminate", "error"])
def test_the_terminal_is_as_before_however_the_game_ends(how: str, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    code = "import sys; from recollect.cli import main; sys.exit(main(sys.argv[1:]))"
    if how == "error":
        broken = "from recollect.envs import DistractingMemory as D; D.hidden_state = lambda s: 1 / 0"
        code = f"{broken}; {code}"
    words = [*BACKGROUND, sys.executable, "-c", code, "envs", "play", "distracting-memory-100", "width=12"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=err,
            env={**os.environ, "PYTHONPATH": PATH},
            start_new_session=True,
        )
    said = ""

    def until(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 30
        while text not in said:
            assert time.monotonic() < deadline, repr(said[-300:])
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 65536).decode(errors="ignore")

    until("step 0")
    assert termios.tcgetattr(theirs)[3] & termios.ICANON == 0
    os.write(ours, b"w\x1b[C")
    until("step 2")
    assert "right" in said
    if how in ("key", "escape", "error"):
        os.write(ours, {"key": b"q", "escape": b"\x1b", "error": b"h"}[how])
    else:
        process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM)
    until(LEAVE)
    assert process.wait(timeout=30) == (1 if how == "error" else 0)
    assert termios.tcgetattr(theirs) == before
    assert said.startswith(ENTER)
    errors = (tmp_path / "err").read_text()
    assert ("ZeroDivisionError" in errors) == (how == "error")
    assert how == "error" or errors == ""
    os.close(ours)
    os.close(theirs)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    for words, message in (
        (["distracting-memory-100"], "playing needs a terminal to read keys from"),
        (["distracting-memory-100", "--window"], "--window needs pygame: pip install 'recollect[play]'"),
        (["distracting-memory-10"], "unknown environment 'distracting-memory-10'"),
        (["distracting-memory-100", "width=3"], "width must be at least 11, got 3"),
        (["distracting-memory-100", "--fps", "0"], "--fps must be positive"),
    ):
        capsys.readouterr()
        assert main(["envs", "play", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    from recollect.envs.window import Window

    with Window() as window:
        for key in (pygame.K_d, pygame.K_LEFT, pygame.K_ESCAPE):
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        assert window.key(0.01) == "d"
        assert window.key(None) == "arrow-left"
        picture = np.full((40, 40, 3), (10, 200, 30), dtype=np.uint8)
        window.show(picture, ["one", "two"])
        surface = pygame.display.get_surface()
        assert surface.get_at((surface.get_width() // 2, 100))[:3] == (10, 200, 30)
        assert window.key(1.0) == "escape"
        assert window.key(0.01) is None
        pygame.event.post(pygame.event.Event(pygame.QUIT))
        assert window.key(None) == "escape"
    monkeypatch.setenv("SDL_VIDEODRIVER", "none-such")
    with pytest.raises(ConfigError, match="cannot open a window"), Window():
        pass


@pytest.mark.parametrize("name", sorted(ENVS))
def test_every_environment_can_be_listed_for_play(name: str) -> None:
    """Each action has a key, whatever it is called."""
    actions = ENVS[name].actions
    assert set(keys_of(actions).values()) == set(range(len(actions)))
