"""What the documentation shows works.

In README.md and docs/*.md: every ``recollect ...`` line of a bash block must parse, and name a recipe, row and keys
that exist; a Python or bash block directly under the comment ``<!-- run -->`` is executed, the blocks of one file in
order and in one namespace (bash: its ``recollect`` lines, in a temporary directory).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from recollect.cli import main
from recollect.cli.arguments import FaceOff, Train, parse
from recollect.core.config import override

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    language: str
    code: str
    run: bool
    line: int


def snippets(text: str) -> list[Snippet]:
    return [
        Snippet(m["language"], m["code"], m["mark"] is not None, text[: m.start("code")].count("\n") + 1)
        for m in BLOCK.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """The words of every ``recollect`` line; ``$`` prompts, comments and continuation lines are understood."""
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.strip().removeprefix("$ "), comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "recollect"]


PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse_and_name_what_exists(page: Path) -> None:
    from recollect.recipes import load_recipe

    for snippet in snippets(page.read_text()):
        for words in commands(snippet.code) if snippet.language in ("bash", "sh", "console") else []:
            if "--help" in words or words == ["--version"]:
                continue
            command = parse(words)
            if ":" in getattr(command, "recipe", ""):
                continue  # the reader's own module
            if isinstance(command, FaceOff):
                load_recipe(command.recipe).overridden(command.overrides, command.seeds)
            elif isinstance(command, Train):
                override(load_recipe(command.recipe).pick(command.row, command.group), command.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marked_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for snippet in snippets(page.read_text()):
        if snippet.run and snippet.language == "python":
            # Padded so that a traceback names the line of the page.
            exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), namespace)
        elif snippet.run:
            for words in commands(snippet.code):
                assert main(words) == 0, f"{page.name}: recollect {shlex.join(words)}"


def test_snippets_are_found() -> None:
    text = "a\n<!-- run -->\n```python\nx = 1\n```\nb\n```bash\n$ recollect list \\\n  layers  # all\nmake demo\n```\n"
    first, second = snippets(text)
    assert first == Snippet("python", "x = 1\n", True, 4)
    assert (second.language, second.run) == ("bash", False)
    assert commands(second.code) == [["list", "layers"]]
