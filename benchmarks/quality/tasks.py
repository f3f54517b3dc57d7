"""What is asked: chats whose answers stand somewhere in a long context.

* ``lengths``: many facts in contexts of 1K to 32K tokens, to see what the model itself can do;
* ``passkey``: one fact in filler, at a depth (ArkVale, Table 1);
* ``needle``: many facts, one asked;
* ``sequence``: the same, several asked one after the other in one chat;
* ``path``: facts that lead to one another, followed within one answer, so that what matters moves
  while decoding (ArkVale, Figure 4a) and cannot be known when decoding starts;
* ``chat``: many turns, facts of the first asked at the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from needle_model import text

CODES, PATHS, HOPS = 27, 6, 5
QUESTION_TOKENS = 24


@dataclass(frozen=True)
class Turn:
    """A message, the answer it deserves, and what of it is counted, each item for itself."""

    message: str
    answer: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Episode:
    """A chat from its beginning; turns without expectations are not counted."""

    task: str
    length: int
    context: int
    """Number of its text: questions about one text are not independent."""
    depth: float | None
    """Share of the context before the fact; ``None`` where many facts are spread."""
    turns: tuple[Turn, ...]


def _question(code: text.Code) -> Turn:
    return Turn(code.question, code.sentence, (code.digits,))


def _after(context: str, turn: Turn) -> Turn:
    return replace(turn, message=f"{context} {turn.message}")


def passkey(
    writer: text.Writer, length: int, depths: Sequence[float], seed: int
) -> Iterator[Episode]:
    """A fact at each depth of the same filler, deepest first: what stands before is shared."""
    for depth in sorted(depths, reverse=True):
        own = random.Random(f"{seed} {length} {depth}")
        code = text.codes(own, text.subjects(own, 1))[0]
        rng = random.Random(f"{seed} {length}")
        context = writer.context(rng, length - QUESTION_TOKENS, [(depth, code.sentence)])
        yield Episode("passkey", length, seed, depth, (_after(context, _question(code)),))


def lengths(writer: text.Writer, length: int, seed: int, asked: int) -> Iterator[Episode]:
    """As many facts as fill half of the context, at most as there are subjects, some asked."""
    rng = random.Random(f"{length} {seed}")
    codes = text.codes(rng, text.subjects(rng, min(text.MOST_SUBJECTS, length // 25)))
    spread = [(rng.random(), code.sentence) for code in codes]
    context = writer.context(rng, length - QUESTION_TOKENS, spread)
    for code in codes[:asked]:
        yield Episode("lengths", length, seed, None, (_after(context, _question(code)),))


def many(writer: text.Writer, length: int, seed: int, asked: int) -> Iterator[Episode]:
    """Tasks over one context of codes and paths: ``needle``, ``sequence`` and ``path``."""
    rng = random.Random(seed)
    names = text.subjects(rng, CODES + PATHS * (HOPS + 1))
    codes = text.codes(rng, names[:CODES])
    rest = names[CODES:]
    paths = [text.path(rest[i::PATHS]) for i in range(PATHS)]
    facts = [*codes, *(link for path in paths for link in path)]
    spread = [(rng.random(), fact.sentence) for fact in facts]
    context = writer.context(rng, length - QUESTION_TOKENS, spread)
    for code in rng.sample(codes, asked):
        yield Episode("needle", length, seed, None, (_after(context, _question(code)),))
    for _ in range(2):
        first, *others = rng.sample(codes, asked // 2)
        turns = (_after(context, _question(first)), *map(_question, others))
        yield Episode("sequence", length, seed, None, turns)
    for path in paths:
        turn = Turn(path[0].question, text.follow(path), tuple(link.sentence for link in path))
        yield Episode("path", length, seed, None, (_after(context, turn),))


def chat(writer: text.Writer, seed: int, turns: int = 16, tokens: int = 700) -> Iterator[Episode]:
    """Facts and small talk in every turn; at the end the first turn's facts are asked."""
    rng = random.Random(seed)
    codes = text.codes(rng, text.subjects(rng, 4 + turns))
    early, later = codes[:4], codes[4:]
    said: list[Turn] = []
    for number, code in enumerate(later):
        facts = [
            (rng.random(), fact.sentence) for fact in ([code, *early] if not number else [code])
        ]
        context = writer.context(rng, tokens, facts)
        said.append(replace(_after(context, _question(code)), expected=()))
    said += map(_question, early)
    yield Episode("chat", turns * tokens, seed, None, tuple(said))
