"""Two people talk in turns on a cache too small for them: pages leave, come back, nothing is lost.

    make demo
    python examples/demo.py [--arkvale-recall-cap 0] [any other flag of sglang.launch_server]

Starts ``python -m sglang.launch_server --kv-policy arkvale`` with the needle model and frames for a
tenth of what is said.  At the end it asks for what each person told first, checks every answer, and
exits non-zero if one is wrong or nothing was evicted and recalled.  ``--arkvale-recall-cap 0``
switches recall off, and the same chats fail.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

from arkvale_sglang.cli.launch import Server, leave_blocks_on_sigterm
from arkvale_sglang.cli.report import table
from needle_model import text

MODEL = Path(__file__).resolve().parent / "needle_model/model"
FLAGS = [
    "--dtype", "float32", "--log-level", "warning", "--random-seed", "0",
    "--kv-policy", "arkvale",
    "--arkvale-budget", "512",
    "--arkvale-device-tokens", "1024",
    "--arkvale-dense-layers", "0",
    "--arkvale-host-memory", "0.25",
    "--arkvale-check-invariants",
]  # fmt: skip
PEOPLE = ("Ada", "Bo")
TURNS, TURN_TOKENS, FIRST_FACTS = 6, 800, 4


class Chat:
    """One person's side of a chat, and how many of the answers were right.

    The first turn tells ``FIRST_FACTS`` codes and one more, every later turn one, all of them
    asked in their own turn but for the first, which are asked at the end.
    """

    def __init__(self, name: str, server: Server, writer: text.Writer):
        self._name, self._server = name, server
        self._messages: list[dict[str, str]] = []
        self.asked = self.right = self.tokens = 0
        rng = random.Random(name)
        codes = text.codes(rng, text.subjects(rng, FIRST_FACTS + TURNS))
        self.first, recent = codes[:FIRST_FACTS], codes[FIRST_FACTS:]
        self._turns = []
        for turn, code in enumerate(recent):
            told = [code, *self.first] if turn == 0 else [code]
            facts = [(rng.random(), fact.sentence) for fact in told]
            self._turns.append((writer.context(rng, TURN_TOKENS, facts), code))

    def talk(self, turn: int) -> None:
        """Say a turn's text and ask for its own code."""
        self._ask(self._turns[turn][1], self._turns[turn][0])

    def remember(self, index: int) -> None:
        """Ask for one of the codes of the first turn."""
        self._ask(self.first[index])

    def _ask(self, code: text.Code, told: str = "") -> None:
        question = code.question
        self._messages.append({"role": "user", "content": f"{told} {question}".strip()})
        answer = self._server.post(
            "/v1/chat/completions",
            {"model": "needle", "messages": self._messages, "temperature": 0, "max_tokens": 24},
        )
        said = answer["choices"][0]["message"]["content"]
        self._messages.append({"role": "assistant", "content": said})
        self.tokens = answer["usage"]["total_tokens"]
        right = code.digits in said
        self.asked, self.right = self.asked + 1, self.right + right
        mark = "right" if right else f"wrong: it is {code.digits}"
        print(
            f"  {self._name:4s}({self.tokens:5d} tokens)  {question}\n{'':20s}-> {said}  [{mark}]"
        )


def main() -> int:
    flags = [*FLAGS, *sys.argv[1:]]
    leave_blocks_on_sigterm()
    print("starting SGLang under --kv-policy arkvale ...", flush=True)
    with Server(MODEL, flags) as server:
        print(" ".join(["  $ python", *server.command[1:]]), flush=True)
        writer = text.Writer(AutoTokenizer.from_pretrained(MODEL))
        chats = [Chat(name, server, writer) for name in PEOPLE]
        for turn in range(TURNS):
            for chat in chats:
                chat.talk(turn)
        recent = sum(chat.right for chat in chats)
        print("\nand now what was told in the first turn, most of it evicted since:")
        for index in range(FIRST_FACTS):
            for chat in chats:
                chat.remember(index)
        did = server.arkvale()
    print("\nwhat the policy did\n" + table(did))
    asked = len(chats) * FIRST_FACTS
    right = sum(chat.right for chat in chats) - recent
    settings = did["settings"]
    print(
        f"\n{sum(chat.tokens for chat in chats):,} tokens in two chats, room for "
        f"{settings['device_tokens']:,} of them on the device, {settings['budget']:,} attended.\n"
        f"{recent} of {len(chats) * TURNS} recent codes are right, and {right} of {asked} codes of "
        "the first turn."
    )
    problems = []
    if right < asked or recent < len(chats) * TURNS:
        problems.append("an answer is wrong")
    for name in ("pages_evicted", "pages_recalled"):
        if not did[name]:
            problems.append(f"{name} is 0, so the demo showed nothing")
    for problem in problems:
        print(f"error: {problem}.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
