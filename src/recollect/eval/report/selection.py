"""Which learning rate a row is reported at: the one with the best mean validation score over its seeds.

The protocol of arXiv 2507.00449. Test scores take no part in it: they are not even passed to ``choose``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tried:
    """What is known of one rate."""

    validation: float | None
    """Mean validation score over the seeds that have finished."""
    complete: bool
    """Every seed has finished and has a validation score."""
    settled: bool
    """No run of it is outstanding: every seed has finished, or one has diverged."""


@dataclass(frozen=True)
class Picked:
    """Position of the rate that was chosen, None without any score; ``provisional`` while another may be chosen yet."""

    index: int | None
    provisional: bool


def choose(tried: Sequence[Tried], *, higher_is_better: bool) -> Picked:
    """The best validated of the complete rates, the first of equals. A single rate needs no score.

    While no rate is complete, the best mean over what has finished, which is provisional in any case: the means may
    be over different seeds.
    """
    if len(tried) == 1:
        return Picked(0, provisional=False)
    complete = [i for i, each in enumerate(tried) if each.complete]
    scores = {i: v for i in complete or range(len(tried)) if (v := tried[i].validation) is not None}
    provisional = not complete or not all(each.settled for each in tried)
    if not scores:
        return Picked(None, provisional)
    best = max(scores.values()) if higher_is_better else min(scores.values())
    return Picked(next(i for i, score in scores.items() if score == best), provisional)


def validation_score(results: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """Metric and value of a finished run on validation data: of the tested weights where the results say so.

    Otherwise that of the last evaluation logged before the last step; the one at the last step is the test.
    """
    stated = results.get("validation")
    if isinstance(stated, Mapping) and (value := _number(stated.get("value"))) is not None:
        return str(stated.get("metric")), value
    metric, steps = results.get("headline"), results.get("steps")
    if not isinstance(metric, str) or not isinstance(steps, int):
        return None
    midway = [line["eval"] for line in log if isinstance(line.get("eval"), Mapping) and line["step"] < steps]
    value = _number(midway[-1].get(metric)) if midway else None
    return None if value is None else (metric, value)


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
