"""Two chats that take turns on a cache too small for both: pages leave, come back, nothing is lost.

    make demo

Starts ``python -m sglang.launch_server --kv-policy arkvale`` with frames for one chat only, lets
two people talk in turns, prints the answers and what the policy did, and holds the same chats with
stock SGLang.  The budget covers each chat, so recall must make every answer the same.  Exits
non-zero if an answer differs, or if nothing was evicted and recalled.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arkvale_sglang.cli.launch import Server
from arkvale_sglang.cli.report import table
from tiny_model import make_model

BUILD = Path(__file__).resolve().parent.parent / "build"
POLICY = [
    "--kv-policy", "arkvale",
    "--arkvale-budget", "3072",
    "--arkvale-device-tokens", "3136",
    "--arkvale-host-memory", "0.25",
    "--arkvale-check-invariants",
]  # fmt: skip
COMMON = ["--dtype", "float32", "--random-seed", "0", "--log-level", "warning"]
STOCK = ["--max-total-tokens", "16384"]
STORY = "The {door} door opens with the code {code}; remember it well. "
QUESTIONS = (
    "What is the code of the {door} door?",
    "Say it once more.",
    "And the door, which was it?",
)


def hold_chats(server: Server, show: bool) -> list[str]:
    """Two chats in turns; returns all answers."""
    people = {"Ada": ("blue", "7351"), "Bo": ("red", "1864")}
    chats: dict[str, list[dict[str, str]]] = {name: [] for name in people}
    answers = []
    for turn, question in enumerate(QUESTIONS):
        for name, (door, code) in people.items():
            text = question.format(door=door)
            if turn == 0:
                text = STORY.format(door=door, code=code) * 30 + text
            chats[name].append({"role": "user", "content": text})
            answer = server.post(
                "/v1/chat/completions",
                {"model": "tiny", "messages": chats[name], "temperature": 0, "max_tokens": 24},
            )["choices"][0]["message"]["content"]
            chats[name].append({"role": "assistant", "content": answer})
            answers.append(answer)
            if show:
                asked = text if len(text) < 60 else f"{text[:40]} ... {text[-36:]}"
                print(f"  {name:4s} {asked}\n       -> {answer!r}", flush=True)
    return answers


def main() -> int:
    model = make_model(BUILD / "demo_model", dtype="float32")
    print("starting SGLang under --kv-policy arkvale ...", flush=True)
    with Server(model, [*COMMON, *POLICY]) as server:
        print(" ".join(["  $ python", *server.command[1:]]), flush=True)
        answers = hold_chats(server, show=True)
        did = server.arkvale()
    print("\nwhat the policy did\n" + table(did))
    print("\nthe same chats with stock SGLang ...", flush=True)
    with Server(model, [*COMMON, *STOCK]) as server:
        expected = hold_chats(server, show=False)
    problems = []
    if answers != expected:
        problems.append(f"answers differ from stock SGLang: {answers} != {expected}")
    for name in ("pages_evicted", "pages_recalled"):
        if not did[name]:
            problems.append(f"{name} is 0, so the demo showed nothing")
    for problem in problems:
        print(f"error: {problem}.", file=sys.stderr)
    if not problems:
        print(
            f"all {len(answers)} answers are the same (random weights talk nonsense, but the same)."
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
