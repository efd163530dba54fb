"""Reading a prompt of the long-context suite as a careful person would, and a tokenizer of words."""

from __future__ import annotations

import re
from collections import Counter

LIST = re.compile(r", | and ")
VALUE = r"([\w-]+)\."


class WordTokenizer:
    """Words with the space before them, punctuation marks and line ends: a vocabulary like that of word pieces."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return [hash(word) % 50_000 for word in re.findall(r" ?\w+|[^\w\s]|\s", text)]


def solve(text: str) -> list[str]:
    """The answers, from the text alone. It knows how things are told and asked, and nothing of how they were drawn."""
    context, _, question = text.rpartition("\n")
    if found := re.fullmatch(r"(?:.* )?In ([\w ]+), the code for ([\w ]+) is", question):
        return re.findall(rf"In {found[1]}, the code for {found[2]} is {VALUE}", context)
    if found := re.fullmatch(r"(?:.* )?The secret \w+ for ([\w ]+) is", question):
        return re.findall(rf"The secret \w+ for {found[1]} is {VALUE}", context)
    if found := re.fullmatch(r"The (\d+) secret \w+s for ([\w ]+) are", question):
        values = re.findall(rf"The secret \w+ for {found[2]} is {VALUE}", context)
        assert len(values) == int(found[1])
        return values
    if found := re.fullmatch(r"(?:.*\. )?The secret \w+s for (.+) are", question):
        told = [re.findall(rf"The secret \w+ for {name} is {VALUE}", context) for name in LIST.split(found[1])]
        assert all(len(values) == 1 for values in told)
        return [values[0] for values in told]
    if found := re.fullmatch(r"The names that hold (\w+) are", question):
        held: dict[str, str] = {}
        for name, other, value in re.findall(r"Let (\w+) be (?:the same as (\w+)|(\w+))\.", context):
            held[name] = held[other] if other else value
        return [name for name, value in held.items() if value == found[1]]
    found = re.fullmatch(r"The (\d+) most (common|frequent) words.* are", question)
    assert found is not None, question
    counts = Counter(context.split("\n", 1)[1].split())
    best = counts.most_common(int(found[1]) + 1)
    assert best[-2][1] > best[-1][1]  # or there would be no telling
    if found[2] == "common":
        assert best[0][1] == best[-2][1] >= 3 * best[-1][1]
    else:
        assert len({count for _, count in best}) == len(best)
    return [word for word, _ in best[:-1]]
