"""``python -m recollect``: the same as the command ``recollect``."""

from __future__ import annotations

import sys

from recollect.cli import main

if __name__ == "__main__":
    sys.exit(main())
