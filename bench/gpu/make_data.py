"""Make what a recipe's rows are trained on, with several processes: episodes, text, the model they go on from.

    python bench/gpu/make_data.py worlds-paper-two-rooms --workers 16
    python bench/gpu/make_data.py language-mini --device cuda

Training would make it itself, in one process and on the CPU. What is there stays; a model that is half trained is
trained on. SIGTERM stops it so that the same command goes on.
"""

from __future__ import annotations

import argparse
import sys

from recollect.cli.progress import counting
from recollect.recipes import load_recipe
from recollect.train.language import LanguageConfig, pretrained
from recollect.train.run import RunConfig
from recollect.train.runtime import stop_on_signals
from recollect.train.stopping import StoppedError
from recollect.train.world import WorldConfig


def main() -> int:
    """Make it all, each thing once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="of the model that rows go on from")
    options = parser.parse_args()
    groups = {run.group: run.problem for run in load_recipe(options.recipe).runs}
    for name, problem in groups.items():
        if isinstance(problem, LanguageConfig) and isinstance(problem.model, RunConfig):
            with stop_on_signals() as stop:
                try:
                    pretrained(problem.model, counting, device=options.device, stop=stop)
                except StoppedError as error:
                    print(error, file=sys.stderr)
                    return 130
        if isinstance(problem, WorldConfig | LanguageConfig):
            problem.build().make_data(counting, options.workers)
            print(f"{name}: all that training reads is there", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
