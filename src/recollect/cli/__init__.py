"""The command line. It parses, calls and prints; everything it does can be done from Python.

Exit codes: 0 done, 1 some runs of a face-off failed, 2 something the user can mend (one line on stderr), 130 stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recollect import __version__
from recollect.core.errors import RecollectError

COMPUTING = frozenset({"train", "resume", "eval", "imagine", "faceoff", "bench", "lm"})
"""Commands that run models, and so want the allocator settings of ``recollect.train.runtime``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. ``argv`` None means the arguments of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"recollect {__version__}")
        return 0
    if argv is None and words and words[0] in COMPUTING and not {"-h", "--help"} & set(words):
        from recollect.train.runtime import reexec_with_allocator

        reexec_with_allocator()
    from recollect.cli.arguments import parse

    command = parse(words)
    from recollect.cli.commands import execute

    try:
        return execute(command)
    except RecollectError as error:
        from recollect.train.stopping import is_told

        if not is_told(error):
            print(f"recollect: {' '.join(str(error).split())}", file=sys.stderr)
        return 130 if type(error).__name__ == "StoppedError" else 2
    except KeyboardInterrupt:
        from recollect.train.runtime import is_first_process

        if is_first_process():
            print("recollect: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
