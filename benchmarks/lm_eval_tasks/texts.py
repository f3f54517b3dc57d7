"""Texts of the local lm-eval tasks, made here: nothing is fetched.

lm-eval calls the functions with the metadata of the run: ``max_seq_lengths`` in tokens and the name
of the ``tokenizer``.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from needle_model import text

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""With a line of their own in the table."""
NOT_ASKED = -1.0
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)
SEEDS = 4
SPARE_TOKENS = 96
"""Left for the template of a chat and the answer."""
OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def passkey(**about: Any) -> dict[str, datasets.Dataset]:
    """The passkey task of landmark attention, which the paper's Table 1 uses."""

    def sample(rng: random.Random) -> tuple[str, Iterator[str], str, str, str]:
        key = str(rng.randrange(10_000, 100_000))
        fact = f"The pass key is {key}. Remember it. {key} is the pass key."
        return OPENING, itertools.repeat(GRASS), fact, "What is the pass key? The pass key is", key

    return _dataset(sample, **about)


def needle(**about: Any) -> dict[str, datasets.Dataset]:
    """The same with words that the needle model knows."""

    def sample(rng: random.Random) -> tuple[str, Iterator[str], str, str, str]:
        code = text.codes(rng, text.subjects(rng, 1))[0]
        return "", text.filler(rng), code.sentence, code.question, code.digits

    return _dataset(sample, **about)


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer holds the key, over all documents and for those of each length."""
    found = float(doc["answer"] in results[0])
    by_length = {str(length): NOT_ASKED for length in LENGTHS}
    return {"found": found, **by_length, str(doc["length"]): found}


def mean_of_asked(values: Sequence[float]) -> float:
    """As RULER does it: lengths that were not asked show as -1."""
    asked = [value for value in values if value != NOT_ASKED]
    return sum(asked) / len(asked) if asked else NOT_ASKED


def _dataset(
    sample: Callable[[random.Random], tuple[str, Iterator[str], str, str, str]],
    max_seq_lengths: Sequence[int] = (4096,),
    tokenizer: str = "",
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Every length with the fact at every depth, ``SEEDS`` times."""
    for length in max_seq_lengths:
        if length not in LENGTHS:
            raise ValueError(f"--lengths {length} is none of {', '.join(map(str, LENGTHS))}")
    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    docs = []
    for length in max_seq_lengths:
        for depth in DEPTHS:
            for seed in range(SEEDS):
                opening, filler, fact, question, answer = sample(random.Random(f"{depth} {seed}"))
                room = length - SPARE_TOKENS - len(encode(f"{opening} {fact} {question}"))
                lines = _lines(filler, room, lambda line: len(encode(f" {line}")))
                lines.insert(round(depth * len(lines)), fact)
                words = " ".join([opening, *lines, question]).strip()
                docs.append({"input": words, "answer": answer, "length": length, "depth": depth})
    random.Random(0).shuffle(docs)  # so that --limit takes some of every kind
    return {"test": datasets.Dataset.from_list(docs, split=datasets.Split.TEST)}


def _lines(filler: Iterator[str], room: int, size: Callable[[str], int]) -> list[str]:
    lines: list[str] = []
    for line in filler:
        room -= size(line)
        if room < 0:
            return lines
        lines.append(line)
    raise AssertionError("filler has no end")
