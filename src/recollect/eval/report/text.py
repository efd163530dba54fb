"""What a report says in words, computed from the numbers: verdicts, sentences, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from recollect.eval.report.data import FaceOff, Row, Stat
from recollect.eval.report.language import PLAIN, has_attention, plain_row, share_found, suite_lengths, told
from recollect.eval.report.metrics import REWARDS, is_share, label, lower_is_better

ABSENT = "-"

TIE = 0.02
"""Accuracies within this of the best one, or within its standard deviation, are called level with it."""

RELATIVE_TIE = 0.05
"""The same for errors, as a share of the smaller one."""

NATS_TIE = 0.01
"""The same for losses in nats per token, whose differences mean the same at any loss: one per cent of perplexity."""

NAMED = 4
"""More leaders than this are counted and not named."""

CHAPTERS = {"recall": "Words", "world": "Worlds", "language": "Text"}
"""What the groups of a family are called together."""

WHERE = {"recall": "in words", "world": "in worlds", "language": "on text"}
"""The same in a sentence."""

MARGIN = 0.05
"""A row is above chance or above the context-blind oracle when its mean less one deviation clears it by this much."""


@dataclass(frozen=True)
class Cell:
    """One table cell; ``best`` marks the best of its column."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """A backbone ("row"), a reference such as an oracle or chance ("line"), or one without results ("waiting")."""

    name: str
    cells: tuple[Cell, ...]
    form: Literal["row", "line", "waiting"] = "row"


@dataclass(frozen=True)
class Table:
    """Results of one group. The first column, the backbone's name, is not among ``columns``."""

    group: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str
    corner: str = "backbone"
    """What its rows are."""
    terminal: tuple[int, ...] | None = None
    """The columns that a terminal has room for, none of them: it is left out there; None: by their names."""


LEARNED = 0.5
"""A row has learned to dream when its error, and a deviation more, is below this share of the mean picture's: a blurred
scene without anything in it gets that far."""


@dataclass(frozen=True)
class Verdict:
    """Who leads a group: every row that is level with the best, and whether the best clears the line at all."""

    leaders: tuple[Row, ...]
    others: tuple[Row, ...]
    clears: bool
    below: tuple[Row, ...]


def percent(value: float) -> str:
    """0.971 -> "97.1 %" (with a no-break space)."""
    return f"{number(100 * value, 1)}\u00a0%"


def number(value: float, digits: int) -> str:
    """Fixed digits, or a dash for what is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ABSENT


def significant(value: float) -> str:
    """Three significant digits without an exponent where that stays readable."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def human_bytes(value: float | None) -> str:
    """4096 -> "4.0 KiB"."""
    if value is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f}\u00a0B" if unit == "B" else f"{value:.1f}\u00a0{unit}"
        value /= 1024
    return f"{value:.1f}\u00a0GiB"


def human_seconds(value: float | None) -> str:
    """200 -> "3 min 20 s"."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.0f}\u00a0s" if value >= 10 else f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h\u00a0{minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min\u00a0{seconds:02d}\u00a0s"


def human_count(value: float | None) -> str:
    """100594 -> "100,594"; millions are rounded to "1.23 M"."""
    if value is None:
        return ABSENT
    return f"{value / 1e6:.2f}\u00a0M" if value >= 1e6 else f"{value:,.0f}"


def listed(names: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def metric_text(metric: str, stat: Stat | None) -> str:
    """Mean and, over several seeds, its deviation: "97.1 ± 0.4" of a share, three digits of an error, else one."""
    if stat is None:
        return ABSENT
    if is_share(metric):
        return share_text(stat)
    if lower_is_better(metric):
        return significant(stat.mean) + ("" if stat.std is None else f"\u00a0±\u00a0{significant(stat.std)}")
    return number(stat.mean, 1) + ("" if stat.std is None else f"\u00a0±\u00a0{number(stat.std, 1)}")


def share_text(stat: Stat | None) -> str:
    """As "97.1 ± 0.4", in per cent."""
    if stat is None:
        return ABSENT
    return number(100 * stat.mean, 1) + ("" if stat.std is None else f"\u00a0±\u00a0{number(100 * stat.std, 1)}")


def loss_text(stat: Stat | None) -> str:
    """As "2.345 ± 0.004", in nats: their differences count, so all have the same digits."""
    if stat is None:
        return ABSENT
    return number(stat.mean, 3) + ("" if stat.std is None else f"\u00a0±\u00a0{number(stat.std, 3)}")


def score_text(family: str, metric: str, stat: Stat | None) -> str:
    """What ranks a group, as its table writes it."""
    return loss_text(stat) if family == "language" else metric_text(metric, stat)


def task_name(face: FaceOff, group: str | None = None) -> str:
    """What a group's recall rows are trained on: "joint recall"; "recall" where runs differ or do not say.

    None: the first recall group.
    """
    tasks = face.tasks.get(group or next(iter(face.groups_of("recall")), ""), ())
    return tasks[0].replace("-", " ") if len(tasks) == 1 else "recall"


def group_title(face: FaceOff, group: str) -> str:
    """The heading of a group's table."""
    family = face.family(group)
    own = group if len(face.groups_of(family)) > 1 or group != family else ""
    if family == "recall":
        task = task_name(face, group)
        return f"Words: {own}, {task}" if own and task.replace(" ", "-") != own else f"Words: {task}"
    if family == "language":
        return f"Text: {own}" if own else "Text: loss, and what is found in long contexts"
    return f"Worlds: {own}" if own else "Worlds: reward and frames in imagination"


def chapter_title(face: FaceOff, group: str) -> str:
    """The heading of a group's figures: "Worlds", and which one where there are several or it has a name."""
    family = face.family(group)
    plain = CHAPTERS[family]
    return plain if group == family and len(face.groups_of(family)) == 1 else f"{plain}: {group}"


def guesser_phrase(face: FaceOff, group: str | None = None) -> str:
    """The guesser that recall is held against, in words."""
    guesser = face.guesser_of(group)
    name = guesser[0] if guesser else "context-blind"
    return "a guesser that ignores the context" if name == "context-blind" else f"the guesser '{name}'"


def steps_to(row: Row, level: float) -> tuple[float, int] | None:
    """Steps until held-out accuracy first reached ``level``: mean over the finished seeds that did, and how many."""
    firsts: list[float] = []
    for run in row.finished:
        steps, accuracy = run.curve("accuracy", "step", evaluation=True)
        firsts += steps[accuracy >= level][:1].tolist()
    return (sum(firsts) / len(firsts), len(firsts)) if firsts else None


def verdict(face: FaceOff, group: str) -> Verdict | None:
    """Who leads ``group``; None while it has no results."""
    ranked = face.ranked(group)
    if not ranked:
        return None
    best, line = _score(ranked[0]), face.line(group)
    leaders = tuple(row for row in ranked if _level(best, _score(row), _tie(face, group, best)))
    below = tuple(row for row in ranked if line is not None and _score(row).low <= line + MARGIN)
    if (blank := face.blank(group)) is not None:
        below = tuple(row for row in ranked if _score(row).high >= LEARNED * blank)
    return Verdict(leaders, tuple(row for row in ranked if row not in leaders), ranked[0] not in below, below)


def answer(face: FaceOff) -> list[str]:
    """The shortest true answer to "which backbone remembers?": one sentence per family, or for all that agree."""
    found = {group: v for group in face.groups if (v := verdict(face, group)) is not None}
    said: dict[str, list[str]] = {}
    for family, where in WHERE.items():
        groups = {group: found[group] for group in face.groups_of(family) if group in found}
        if groups:
            said.setdefault(_leading(groups), []).append(where)
    return [f"{(where := listed(wheres))[0].upper()}{where[1:]}, {names}." for names, wheres in said.items()]


def sentences(face: FaceOff) -> list[str]:
    """The headline in paragraphs: one per group (who leads, by how much, at what price), then what is still missing."""
    said = [" ".join(found) for group in face.groups if (found := _group_sentences(face, group))]
    notes: list[str] = []
    unfinished = [run for run in face.runs if run.status != "finished"]
    if unfinished:
        notes.append(f"Not everything is in: {len(unfinished)} of {len(face.runs)} runs have not finished.")
    if all(len(row.finished) <= 1 for rows in face.groups.values() for row in rows):
        notes.append("One seed each: small differences mean little.")
    return [*said, " ".join(notes)] if notes else said


def _leading(found: Mapping[str, Verdict]) -> str:
    """Who leads one group, or leads most of several."""
    if len(found) == 1:
        (only,) = found.values()
        if only.clears and len(only.leaders) > NAMED:
            return f"{len(only.leaders)} of {len(only.leaders) + len(only.others)} backbones are level"
        return _names(only.leaders) if only.clears else "none yet"
    wins: dict[str, int] = {}
    for each in found.values():
        for row in each.leaders if each.clears else ():
            wins[row.name] = wins.get(row.name, 0) + 1
    if not wins:
        return "none yet"
    most = max(wins.values())
    names = [name for name, n in wins.items() if n == most]
    if most == 1 and len(names) > 1:
        return f"no backbone leads in more than 1 of {len(found)}"
    verb = "leads or is level" if len(names) == 1 else "lead or are level"
    return f"{listed(names)} {verb} in {most} of {len(found)}"


def _score(row: Row) -> Stat:
    score = row.score
    assert score is not None, f"{row.name} has no results"
    return score


def _tie(face: FaceOff, group: str, best: Stat) -> float:
    if face.family(group) == "language":
        return NATS_TIE
    return RELATIVE_TIE * abs(best.mean) if lower_is_better(face.headline(group)) else TIE


def _level(best: Stat, other: Stat, tie: float) -> bool:
    # The other's spread does not count: a row whose seeds scatter is not level with one whose seeds agree.
    return abs(best.mean - other.mean) <= max(tie, best.std or 0.0)


def _names(rows: Sequence[Row]) -> str:
    return listed([row.name for row in rows])


def _group_sentences(face: FaceOff, group: str) -> list[str]:
    found = verdict(face, group)
    if found is None:
        return []
    if face.family(group) == "language":
        return [*_language_sentences(face, group, found), *_state_sentence(face.ranked(group), found.leaders)]
    if not is_share(face.headline(group)):
        return [_error_sentence(face, group, found), *_state_sentence(face.ranked(group), found.leaders)]
    line, family = face.line(group), face.family(group)
    best = found.leaders[0]
    task, unit = _task_and_unit(face, group)
    reference = guesser_phrase(face, group) if family == "recall" else "chance"
    against = f"; {reference} gets {percent(line)}" if line is not None else ""
    if not found.clears:
        first = f"{task}, no backbone remembers yet: {best.name}, the best, gets {_spread(_score(best))} {unit} right"
        return [f"{first}{against}."]
    if len(found.leaders) > 1:
        worst = _score(found.leaders[-1])
        first = (
            f"{task}, {_names(found.leaders)} are level: between {percent(worst.mean)} and "
            f"{percent(_score(best).mean)} {unit} right"
        )
    else:
        first = f"{task}, {best.name} gets {_spread(_score(best))} {unit} right"
    if found.others:
        first += f", {found.others[0].name} {percent(_score(found.others[0]).mean)}"
    said = [f"{first}{against}."]
    if found.below:
        verb = "is" if len(found.below) == 1 else "are"
        said.append(f"{_names(found.below)} {verb} not clearly better than {reference}.")
    return [*said, *_state_sentence(face.ranked(group), found.leaders)]


def _task_and_unit(face: FaceOff, group: str) -> tuple[str, str]:
    """How a sentence on shares begins, and what they are shares of."""
    family, metric = face.family(group), face.headline(group)
    named = chapter_title(face, group).partition(": ")[2]
    if family == "recall":
        return f"On {named or task_name(face, group)}", "of the values"
    if metric not in REWARDS:
        return f"In {group}", f"({label(metric)})"
    asked = "asked for the reward after imagining the way to it"
    return f"In {named}, {asked}" if named else asked.capitalize(), "of the rewards"


def _error_sentence(face: FaceOff, group: str, found: Verdict) -> str:
    """Who errs least; ``generation_mse`` is called by what it is, other errors by their name."""
    metric, best = face.headline(group), found.leaders[0]
    what = "per imagined frame" if metric == "generation_mse" else f"({label(metric)})"
    if not found.clears:
        blank = face.blank(group)
        against = "" if blank is None else f"; the mean picture by {significant(blank)}"
        return (
            f"In {group}, no backbone has learned to dream yet: {best.name}, the best, errs by "
            f"{metric_text(metric, _score(best))} {what}{against}."
        )
    if len(found.leaders) > 1:
        low, high = _score(best).mean, max(_score(row).mean for row in found.leaders)
        first = f"{_names(found.leaders)} are level, at {significant(low)} to {significant(high)} {what}"
    else:
        first = f"{best.name} errs by {metric_text(metric, _score(best))} {what}"
    if found.others:
        first += f", {found.others[0].name} by {significant(_score(found.others[0]).mean)}"
        if len(found.others) > 1:
            first += f" and the last, {found.others[-1].name}, by {significant(_score(found.others[-1]).mean)}"
    return f"In {group}, {first}."


def _language_sentences(face: FaceOff, group: str, found: Verdict) -> list[str]:
    """Who has the lowest loss, what attention brings against the same model without, and what is found furthest out."""
    best, ranked = found.leaders[0], face.ranked(group)
    if len(found.leaders) > 1:
        low, high = (number(_score(row).mean, 3) for row in (best, found.leaders[-1]))
        between = low if low == high else f"{low} to {high}"
        first = f"{_names(found.leaders)} are level, at {between} nats per token of held-out text"
    else:
        first = f"{best.name} has the lowest loss, {loss_text(_score(best))} nats per token of held-out text"
    if found.others:
        first += f", {found.others[0].name} {number(_score(found.others[0]).mean, 3)}"
        if len(found.others) > 1:
            first += f" and the last, {found.others[-1].name}, {number(_score(found.others[-1]).mean, 3)}"
    named = chapter_title(face, group).partition(": ")[2]
    where = f"On text ({named})" if named else "On text"
    return [f"{where}, {first}.", *_attention_sentence(face, group), *_suite_sentence(face, group, ranked)]


def _attention_sentence(face: FaceOff, group: str) -> list[str]:
    """The best row with attention against the one without."""
    plain = plain_row(face, group)
    best = next((row for row in face.ranked(group) if has_attention(row)), None)
    if plain is None or best is None:
        return []
    mine, theirs = _score(best), _score(plain)
    gain = theirs.mean - mine.mean
    if _level(mine, theirs, NATS_TIE):
        what = "Attention makes no clear difference to the loss"
    else:
        what = f"Attention takes {number(gain, 3)} nats off the loss"
        if gain < 0:
            what = f"Attention adds {number(-gain, 3)} nats to the loss"
    others = [row for row in face.ranked(group) if not has_attention(row) and row is not plain]
    beside = listed([f"{row.name} {number(_score(row).mean, 3)}" for row in others])
    beside = f" ({beside})" if beside else ""
    with_, without = number(mine.mean, 3), number(theirs.mean, 3)
    return [f"{what}: {best.name} {with_} against {without} of {PLAIN}, the same model without it{beside}."]


def _suite_sentence(face: FaceOff, group: str, ranked: Sequence[Row]) -> list[str]:
    """Who finds most at the greatest length, against chance, and what the row without attention finds there."""
    length = max(suite_lengths(ranked), default=0)
    shares = {row.name: share for row in ranked if (share := share_found(row, length)) is not None}
    if not shares:
        return []
    names = sorted(shares, key=lambda name: -shares[name].mean)
    most = shares[names[0]]
    chance = told(ranked, "chance", length=length) or 0.0
    trained = face.trained.get(group)
    far = f", {length / trained:g} times the trained length," if trained and length > trained else ""
    if not most.mean:
        return [f"At {length:,} tokens{far} no row finds any of the suite's answers."]
    if most.low <= chance + MARGIN:
        rest = f"{names[0]}, the first, {_spread(most)}"
        return [f"At {length:,} tokens{far} no row finds clearly more than chance: {rest} of the suite's answers."]
    level = [name for name in names if _level(most, shares[name], TIE)]
    verb = "finds" if len(level) == 1 else "find"
    first = f"{listed(level)} {verb} most of the suite's answers, {_spread(most)}"
    if len(level) > 1:
        first = f"{first} at best"
    rest = [name for name in (PLAIN, names[-1]) if name in shares and name not in level]
    against = "".join(f", {name} {percent(shares[name].mean)}" for name in dict.fromkeys(rest))
    return [f"At {length:,} tokens{far} {first}{against}."]


def _state_sentence(ranked: Sequence[Row], leaders: Sequence[Row]) -> list[str]:
    """What the most frugal leader carries against the row with the largest state."""
    sizes = {row.name: size for row in ranked if (size := row.field("state_bytes")) is not None}
    frugal = min((row.name for row in leaders if row.name in sizes), key=sizes.__getitem__, default=None)
    if frugal is None or len(sizes) < 2:
        return []
    largest = max(sizes, key=sizes.__getitem__)
    if largest == frugal:
        return [f"{frugal} also carries the largest state, {human_bytes(sizes[frugal])} per sequence."]
    mine, theirs = human_bytes(sizes[frugal]), human_bytes(sizes[largest])
    return [f"{frugal} carries {mine} of state per sequence; the largest, {largest}, {theirs}."]


def _spread(stat: Stat) -> str:
    if stat.std is None:
        return percent(stat.mean)
    return f"{number(100 * stat.mean, 1)}\u00a0±\u00a0{number(100 * stat.std, 1)}\u00a0%"


def describe_unfinished(status: str, seed: int, last_step: int) -> str:
    """Where a run stands, as in "seed 1: unfinished, at step 130"."""
    return f"seed {seed}: {status}" + (f", at step {last_step}" if status == "unfinished" and last_step else "")
