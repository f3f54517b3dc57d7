"""What the needle model reads and says: filler, facts, questions and the answers they deserve.

Two kinds of fact::

    the code of the blue door is 4821.           a needle; asked by its subject
    the neighbour of the blue door is red gate.  a link; following links moves what matters

Everything is drawn from a ``random.Random``, so that a seed names a text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter black blue brass bright broken bronze brown calm clever cold copper "
    "crimson crooked curved dark deep dry dusty eager early empty faded fancy fast gentle giant "
    "glass golden grand green grey heavy hidden hollow icy iron ivory jade lazy little loud lucky "
    "marble merry modern narrow noisy orange pale pink plain proud purple quick quiet red round "
    "rusty secret silver"
)
NOUNS = _words(
    "anchor apple arrow barrel basket bell boat bottle bridge bucket button cabin candle castle "
    "chair clock coat crown cup curtain desk dish door drum engine fence flag flute garden gate "
    "hammer harp hat house jar kettle key kite ladder lamp lantern lock mill mirror needle oven "
    "painting pencil piano pillow pipe plate ring rope saddle shelf ship statue table tower trunk "
    "wagon well wheel"
)
PEOPLE = _words(
    "farmers sailors children teachers travellers strangers merchants painters soldiers writers "
    "singers bakers doctors students gardeners hunters"
)
VERBS = _words(
    "walked waited talked rested worked played laughed slept listened danced gathered wandered "
    "argued sang hurried stayed"
)
ADVERBS = _words(
    "slowly quietly often together again happily late alone gladly rarely carefully freely"
)
PLACES = _words(
    "river forest market village harbour mountain meadow valley island desert station library "
    "field coast canyon lake"
)
TIMES = _words("morning evening night summer winter autumn spring afternoon")
FILLERS = (
    "the {people} {verb} {adverb} near the {place}.",
    "in the {time} some {people} {verb} by the {place}.",
    "many {people} {verb} {adverb} before the {time}.",
    "every {time} the {people} {verb} across the {place}.",
    "nobody knew why the {people} {verb} that {time}.",
)
CODE_QUESTIONS = (
    "what is the code of the {subject}?",
    "tell me the code of the {subject}.",
    "and what is the code of the {subject}?",
    "please say the code of the {subject} again.",
)
LINK_QUESTIONS = (
    "who is the neighbour of the {subject}?",
    "follow the neighbour of the {subject}.",
)
NOBODY = "nobody"


@dataclass(frozen=True)
class Code:
    """A needle: a subject and its four digits."""

    subject: str
    digits: str

    @property
    def sentence(self) -> str:
        """As it stands in a text, and as it is answered."""
        return f"the code of the {self.subject} is {self.digits}."

    @property
    def question(self) -> str:
        """The plainest way to ask for it."""
        return CODE_QUESTIONS[0].format(subject=self.subject)


@dataclass(frozen=True)
class Link:
    """One hop of a path; the last subject of a path has nobody."""

    subject: str
    target: str

    @property
    def sentence(self) -> str:
        """As it stands in a text, and as it is answered."""
        return f"the neighbour of the {self.subject} is {self.target}."

    @property
    def question(self) -> str:
        """The plainest way to ask for the path from here."""
        return LINK_QUESTIONS[0].format(subject=self.subject)


def follow(path: list[Link]) -> str:
    """The answer to a question for the first subject of a path."""
    return " ".join(link.sentence for link in path)


MOST_SUBJECTS = min(len(ADJECTIVES), len(NOUNS))


def subjects(rng: random.Random, count: int) -> list[str]:
    """Subjects such as ``blue door`` that share no word; at most ``MOST_SUBJECTS``."""
    pairs = zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count), strict=True)
    return [" ".join(pair) for pair in pairs]


def codes(rng: random.Random, names: list[str]) -> list[Code]:
    """A code for every subject."""
    return [Code(name, f"{rng.randrange(10_000):04d}") for name in names]


def path(names: list[str]) -> list[Link]:
    """Links from each subject to the next, the last to nobody."""
    return [Link(a, b) for a, b in zip(names, [*names[1:], NOBODY], strict=True)]


def filler(rng: random.Random) -> Iterator[str]:
    """Sentences without end that say nothing about any subject."""
    while True:
        yield rng.choice(FILLERS).format(
            people=rng.choice(PEOPLE),
            verb=rng.choice(VERBS),
            adverb=rng.choice(ADVERBS),
            place=rng.choice(PLACES),
            time=rng.choice(TIMES),
        )


def words() -> list[str]:
    """Every word that the texts use, once."""
    lists = (ADJECTIVES, NOUNS, PEOPLE, VERBS, ADVERBS, PLACES, TIMES)
    glue = " ".join((*FILLERS, *CODE_QUESTIONS, *LINK_QUESTIONS))
    extra = f"{glue} the code neighbour of is {NOBODY}"
    found = [w for part in lists for w in part]
    found += [w.strip(".?") for w in extra.split() if "{" not in w]
    return sorted(set(found))


class Writer:
    """Writes contexts of a given number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._sizes: dict[str, int] = {}

    def size(self, sentence: str) -> int:
        """Tokens of a sentence."""
        if sentence not in self._sizes:
            self._sizes[sentence] = len(self._tokenizer.encode(sentence, add_special_tokens=False))
        return self._sizes[sentence]

    def context(self, rng: random.Random, tokens: int, facts: Sequence[tuple[float, str]]) -> str:
        """Filler of ``tokens`` tokens with each fact where its share of them has passed."""
        waiting = sorted(facts)
        lines: list[str] = []
        written = 0
        for line in filler(rng):
            while waiting and written >= waiting[0][0] * tokens:
                fact = waiting.pop(0)[1]
                lines.append(fact)
                written += self.size(fact)
            if written >= tokens:
                break
            lines.append(line)
            written += self.size(line)
        lines += [fact for _, fact in waiting]
        return " ".join(lines)
