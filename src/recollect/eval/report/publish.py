"""Publishing a face-off: its rows under ``results/``, its picture under ``docs/``, its tables inside the documentation.

Tables go where a Markdown file of the project says so, between two comments, so that no number is ever copied by hand::

    <!-- results demo -->
    (rewritten by ``recollect report runs/demo --publish .``)
    <!-- end results -->

``<!-- results worlds-micro all-worlds -->`` asks for the table of that name alone: ``all-worlds``, a group,
``GROUP-longer``, or ``GROUP-suite`` of a language group.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from recollect.core.errors import RunError
from recollect.core.files import write_atomically
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.write import answer_of, markdown_tables, result_rows, write_report


def publish(directory: Path, root: Path) -> list[Path]:
    """Write ``results/NAME.json`` and ``docs/NAME.png`` below ``root``, and fill the blocks of its Markdown files.

    Returns what was written. Raises RunError when a run of the face-off has not finished, since a published table is
    whole; or as ``write_report`` does.
    """
    face = load_faceoff(directory)
    missing = [f"{run.group}/{run.row} seed {run.seed}" for run in face.runs if run.status != "finished"]
    missing += [f"{row.group}/{row.name} at another learning rate" for row in face.provisional if row.score]
    if missing:
        raise RunError(f"{directory} is not finished ({', '.join(missing)}); run its face-off again before publishing")
    write_report(directory)
    rows = result_rows(directory)
    results, picture = root / "results" / f"{face.name}.json", root / "docs" / f"{face.name}.png"
    write_atomically(results, (json.dumps(rows, indent=1) + "\n").encode())
    write_atomically(picture, (directory / "summary.png").read_bytes())
    written = [results, picture]
    commits, devices = sorted({str(r["commit"])[:12] for r in rows}), sorted({str(r["device"]) for r in rows})
    seeds = sorted({str(run.seed) for run in face.runs})
    made = f"Recipe `{face.name}`, commit {', '.join(commits)}, {', '.join(devices)}, seeds {', '.join(seeds)}."
    answer, every = answer_of(directory), markdown_tables(directory)
    pattern = re.compile(
        rf"(<!-- results {re.escape(face.name)}(?: ([\w.+-]+))? -->\n).*?(<!-- end results -->)", re.DOTALL
    )

    def block(found: re.Match[str]) -> str:
        shown = markdown_tables(directory, found[2]) if found[2] else every
        return f"{found[1]}> {answer}\n\n{shown.rstrip()}\n\n{made}\n{found[3]}"

    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if path.is_file() and pattern.search(text := path.read_text(encoding="utf-8")):
            write_atomically(path, pattern.sub(block, text).encode())
            written.append(path)
    return written
