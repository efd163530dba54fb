"""Make the episodes that a recipe's world models are trained and tested on, with several processes.

    python bench/gpu/make_episodes.py worlds-paper-two-rooms --workers 16

Training would make them itself, in one process. Where there is nothing to make, nothing happens.
"""

from __future__ import annotations

import argparse

from recollect.cli.progress import counting
from recollect.recipes import load_recipe
from recollect.train.world import WorldConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    groups = {run.group: run.problem for run in load_recipe(options.recipe).runs}
    for name, problem in groups.items():
        if isinstance(problem, WorldConfig):
            problem.build().make_data(counting, options.workers)
            print(f"{name}: episodes are there", flush=True)


if __name__ == "__main__":
    main()
