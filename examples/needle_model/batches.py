"""Training sequences: chats about facts in filler, and random tokens said twice.

A sequence of T tokens stands for a longer text.  Gaps between sentences push the positions on
(skip-wise positions), and a filler key weighs as much as all the filler it stands for, so that
attention learns to find one fact among the mass of 32K tokens while T stays small.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from needle_model import text
from needle_model.tokenizer import ASSISTANT, BEGIN, END, USER

Fact = text.Code | text.Link
NEAR = 64
"""Keys nearer than this weigh once: what lies just before a token is there only once."""
MOST_GAPS = 8
ALPHABETS = (8, 16, 32, 256)
"""Different tokens in a random sequence."""
Drawn = tuple[list[int], list[int], list[float], list[bool]]
"""Tokens, positions, weights and targets of one sequence."""


@dataclass(frozen=True)
class Piece:
    """Tokens that stay together: a sentence or a part of a turn."""

    tokens: list[int]
    answer: bool = False
    filler: bool = False


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length.

    Attributes:
        tokens: ``[rows, length]`` int64.
        positions: ``[rows, length]`` int64, rising, with gaps.
        weights: ``[rows, length]`` float32, log of the number of keys that each key stands for.
        targets: ``[rows, length]`` bool, tokens that must be predicted from those before.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to attention scores: ``[rows, 1, length, length]``."""
        index = torch.arange(self.tokens.shape[1])
        ahead = index[:, None] - index
        mask = torch.where(ahead >= NEAR, self.weights[:, None], 0.0)
        return mask.masked_fill(ahead < 0, -math.inf)[:, None].to(dtype)


class Sequences:
    """Draws batches; the same seed draws the same batches.

    Args:
        tokenizer: of the model.
        context: longest text that a sequence may stand for, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self.rng = random.Random(seed)
        self._known: dict[str, list[int]] = {}

    def batch(self, rows: int, length: int, drills: float, far: float) -> Batch:
        """``rows`` sequences of ``length`` tokens.

        Args:
            drills: share of sequences that are said twice, random tokens and lists of facts by
                turns; they come first.
            far: share of the others that stand for a text longer than themselves.
        """
        parts = []
        for index in range(rows):
            if index >= drills * rows:
                parts.append(self._chat(length, self.rng.random() < far))
            else:
                parts.append(self._repeated(length) if index % 3 == 0 else self._listed(length))
        tokens, positions, weights, targets = zip(*parts, strict=True)
        return Batch(
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.tensor(weights),
            torch.tensor(targets),
        )

    def _repeated(self, length: int) -> Drawn:
        """Random tokens, then the same again.

        The distance is the same in all sequences of a length, so heads that look back by position
        suffice, and they come first; with a random distance, seed 0 still missed half of the facts
        after 4,200 steps.
        """
        half = length // 2
        # Few different tokens make pairs ambiguous, so that longer contexts must be matched, as
        # facts about many subjects ask.
        some = self.rng.sample(range(len(self._tokenizer)), self.rng.choice(ALPHABETS))
        once = self.rng.choices(some, k=half)
        again = [False] * (half + 1) + [True] * (half - 1)
        return once * 2, list(range(2 * half)), [0.0] * (2 * half), again

    def _listed(self, length: int) -> Drawn:
        """Facts without filler, then the same again in another order: the densest exercise."""
        names = text.subjects(self.rng, min(length // 10, text.MOST_SUBJECTS))
        codes = text.codes(self.rng, names)
        short = self.rng.random() < 0.5
        said = [
            self._encode(c.sentence.removeprefix("the code of the") if short else c.sentence)
            for c in codes
        ]
        while sum(map(len, said)) > length // 2:
            said.pop()
        tokens = [token for line in said for token in line]
        targets = [False] * len(tokens)
        self.rng.shuffle(said)
        for line in said:
            tokens += line
            targets += [False] * (len(line) - 3) + [True] * 3
        rest = length - len(tokens)
        tokens += self._encode(END) * rest
        return tokens, list(range(length)), [0.0] * length, targets + [False] * rest

    def _chat(self, length: int, far: bool) -> Drawn:
        total = length
        if far:
            total = int(length * (self._context / length) ** self.rng.random())
        turns, needed, others = self._turns(length)
        body = self._body(needed, others, length - 2 - sum(len(piece.tokens) for piece in turns))
        pieces = [Piece(self._encode(BEGIN + USER)), *body, *turns]
        positions, weights = self._stretch(pieces, len(body), total - length)
        return (
            [token for piece in pieces for token in piece.tokens],
            positions,
            weights,
            [piece.answer for piece in pieces for _ in piece.tokens],
        )

    def _stretch(self, pieces: list[Piece], body: int, extra: int) -> tuple[list[int], list[float]]:
        """Positions and weights as if ``extra`` more tokens of filler stood between the pieces."""
        # A few long gaps, not many short ones: most neighbours stay neighbours.
        gaps = self.rng.randint(1, MOST_GAPS)
        cuts = sorted(self.rng.randrange(extra + 1) for _ in range(gaps - 1))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, extra], strict=True)]
        skip = [0] * len(pieces)
        for size in sizes:
            skip[self.rng.randrange(body + 1)] += size
        filler = sum(len(piece.tokens) for piece in pieces if piece.filler)
        weight = math.log((filler + extra) / filler) if filler else 0.0
        positions: list[int] = []
        weights: list[float] = []
        at = 0
        for piece, gap in zip(pieces, skip, strict=True):
            positions += range(at, at + len(piece.tokens))
            weights += [weight * piece.filler] * len(piece.tokens)
            at += len(piece.tokens) + gap
        return positions, weights

    def _turns(self, length: int) -> tuple[list[Piece], list[Fact], list[Fact]]:
        """Questions with their answers, the facts they need, and facts nobody asks for."""
        rng = self.rng
        names = text.subjects(rng, min(5 + length // 16, text.MOST_SUBJECTS))
        hops = rng.randint(2, 6) if length >= 256 else rng.randint(2, 3)
        path = text.path(names[:hops])
        codes = text.codes(rng, names[hops:])
        turns: list[Piece] = []
        needed: dict[str, Fact] = {}
        used = 0
        while True:
            if length >= 128 and rng.random() < 0.3:
                start = rng.randrange(hops - 1)
                wanted: list[Fact] = [*path[start:]]
                facts: list[Fact] = [*path]
                question = rng.choice(text.LINK_QUESTIONS)
            else:
                wanted = facts = [rng.choice(codes)]
                question = rng.choice(text.CODE_QUESTIONS)
            said = [
                Piece(self._encode(question.format(subject=wanted[0].subject) + END + ASSISTANT)),
                Piece(self._encode(text.follow(wanted) + END), answer=True),
                Piece(self._encode(USER)),
            ]
            more = {fact.subject: fact for fact in facts}
            cost = sum(len(piece.tokens) for piece in said)
            cost += sum(len(self._encode(f.sentence)) for s, f in more.items() if s not in needed)
            if used + cost > length * 0.75 - 2:
                break
            used += cost
            turns += said
            needed |= more
        return turns, [*needed.values()], [c for c in codes if c.subject not in needed]

    def _body(self, needed: list[Fact], others: list[Fact], room: int) -> list[Piece]:
        """The needed facts, some others and filler: ``room`` tokens, shuffled."""
        pieces = [Piece(self._encode(fact.sentence)) for fact in needed]
        free = room - sum(len(piece.tokens) for piece in pieces)
        least = 0 if self.rng.random() < 0.3 else int(free * self.rng.random())
        for fact in others:
            tokens = self._encode(fact.sentence)
            if free - len(tokens) < least:
                break
            pieces.append(Piece(tokens))
            free -= len(tokens)
        for line in text.filler(self.rng):
            if not free:
                break
            pieces.append(Piece(self._encode(line)[:free], filler=True))
            free -= len(pieces[-1].tokens)
        self.rng.shuffle(pieces)
        return pieces

    def _encode(self, words: str) -> list[int]:
        known = self._known.get(words)
        if known is None:
            known = self._tokenizer.encode(words, add_special_tokens=False)
            if len(self._known) < 200_000:
                self._known[words] = known
        return known
