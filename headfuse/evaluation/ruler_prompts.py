"""The texts of a test of long contexts after RULER (arXiv 2404.06654): its tasks, templates and sizes, made offline.

Every task is a function of a random generator that gives a `Puzzle`; its prompt grows with a number of units (lines,
sentences or words), so that it fills a length. Words and prose come from the packaged prose, in the place of RULER's
word lists and essays.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from headfuse.choices import RulerTask
from headfuse.text.documents import packaged

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_NEEDLES = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{context}\nWhat are all the special magic numbers for {query} mentioned in the provided "
    "text? The special magic numbers for {query} mentioned in the provided text are"
)
_ONE_NEEDLE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {query} mentioned in the provided text? The "
    "special magic number for {query} mentioned in the provided text is"
)
_CHAINS = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
_HOPS, _COMMON = 4, 10


@dataclass(frozen=True)
class Puzzle:
    """`prompt` of a number of units, of which there are at most `units`; what a right answer holds."""

    prompt: Callable[[int], str]
    answers: tuple[str, ...]
    units: int | None = None


@functools.cache
def _packaged() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The different words of the packaged prose, and its sentences in order."""
    text = " ".join(" ".join(packaged("prose")).split())
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    return tuple(words), tuple(re.split(r"(?<=[.!?]) +", text))


def _needles(
    generator: random.Random, length: int, *, keys: int = 1, values: int = 1, queries: int = 1, prose: bool = True
) -> Puzzle:
    """Numbers of several keys in other text; those of some keys are asked for."""
    words, sentences = _packaged()
    named = ["-".join(generator.sample(words, 2)) for _ in range(keys)]
    numbers = {key: [str(generator.randrange(10**6, 10**7)) for _ in range(values)] for key in named}
    needles = [_NEEDLE.format(key=key, value=value) for key in named for value in numbers[key]]
    generator.shuffle(needles)
    depths = sorted(generator.random() for _ in needles)
    asked = generator.sample(named, queries)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
    start = generator.randrange(len(sentences))

    def prompt(units: int) -> str:
        hay = [sentences[(start + i) % len(sentences)] if prose else _NOISE for i in range(units)]
        template = _ONE_NEEDLE if queries * values == 1 else _NEEDLES
        context = (" " if prose else "\n").join(_inserted(hay, needles, depths))
        return template.format(context=context, query=query)

    return Puzzle(prompt, tuple(number for key in asked for number in numbers[key]))


def _inserted(hay: list[str], needles: list[str], depths: list[float]) -> list[str]:
    """Needles in their order between the units of a text, at shares of it that ascend."""
    result, done = list[str](), 0
    for needle, depth in zip(needles, depths, strict=True):
        place = round(depth * len(hay))
        result += [*hay[done:place], needle]
        done = place
    return result + hay[done:]


def _variables(generator: random.Random, length: int) -> Puzzle:
    """A chain of variables, each assigned the one before, and an example with its answer."""

    def chain(letters: int) -> tuple[str, list[str], list[str], list[float]]:
        names = list[str]()
        while len(names) <= _HOPS:
            name = "".join(generator.choices(string.ascii_uppercase, k=letters))
            names += [] if name in names else [name]
        value = str(generator.randrange(10**4, 10**5))
        assigned = [value, *(f"VAR {name}" for name in names[:-1])]
        lines = [f"VAR {name} = {before}" for name, before in zip(names, assigned, strict=True)]
        return value, names, lines, sorted(generator.random() for _ in lines)

    def asked(found: tuple[str, list[str], list[str], list[float]], units: int) -> str:
        value, names, lines, depths = found
        context = "\n".join(_inserted([_NOISE] * units, lines, depths))
        return _CHAINS.format(context=context, query=value, count=len(names))

    example, own = chain(3), chain(5)
    shown = f"{asked(example, 5)}{' '.join(example[1])}\n\n"
    return Puzzle(lambda units: shown + asked(own, units), tuple(own[1]))


def _common_words(generator: random.Random, length: int) -> Puzzle:
    """A list in which ten words come more often than the others, and an example with its answer."""
    words = list(_packaged()[0])
    # of the list and of the example: how often a common word comes, how often another
    often, seldom, shown_often, shown_seldom = (6, 1, 3, 1) if length < 4096 else (30, 3, 10, 3)

    def listed(common: list[str], others: list[str], often: int, seldom: int, order: random.Random) -> str:
        entries = common * often + others * seldom
        order.shuffle(entries)
        return _WORDS.format(context=_numbered(entries))

    taken = generator.sample(words, 20 if length < 4096 else 40)
    shown = listed(taken[:_COMMON], taken[_COMMON:], shown_often, shown_seldom, generator)
    shown += f" {_numbered(taken[:_COMMON])}\n"
    generator.shuffle(words)
    common, others, order = words[:_COMMON], words[_COMMON:], generator.random()

    def prompt(units: int) -> str:
        return shown + listed(common, others[:units], often, seldom, random.Random(order))

    return Puzzle(prompt, tuple(common), len(others))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


PUZZLES: dict[RulerTask, tuple[Callable[[random.Random, int], Puzzle], int]] = {
    "niah_single": (functools.partial(_needles, prose=False), 128),
    "niah_multikey": (functools.partial(_needles, keys=4), 128),
    "niah_multivalue": (functools.partial(_needles, values=4), 128),
    "niah_multiquery": (functools.partial(_needles, keys=4, queries=4), 128),
    "vt": (_variables, 30),
    "cwe": (_common_words, 120),
}
"""Of each task: what makes a puzzle for a context length, and how many tokens an answer may have."""
