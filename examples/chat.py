"""A chat by the ``openai`` client that is asked, at its end, for what its first message told.

    make serve
    python examples/chat.py http://127.0.0.1:30000

Each answer attends to 512 tokens of the chat, chosen anew for every token.  Expected output (the
number of pages varies):

    turn 1: the code of the proud well is 9558.
    turn 2: the code of the faded fence is 3578.
    turn 3: the code of the narrow table is 8268.
    turn 4: the code of the quick pipe is 2281.
    turn 5: the code of the fast rope is 4617.
    turn 6: the code of the bitter curtain is 2289.
    turn 1 again: the code of the curved hammer is 1553.
    turn 1 again: the code of the green door is 4104.
    8 of 8 right, 541 pages recalled
"""

from __future__ import annotations

import itertools
import random
import sys

import requests
from openai import OpenAI

from needle_model import text

TURNS, MORE_FACTS, LINES = 6, 2, 90
WISHES = {"custom_params": {"arkvale": {"budget": 512, "top_k": 256}}}


def main(url: str) -> int:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    rng = random.Random(0)
    codes = text.codes(rng, text.subjects(rng, TURNS + MORE_FACTS))
    messages: list[dict[str, str]] = []
    right = 0
    for turn, code in enumerate(codes):
        story = list(itertools.islice(text.filler(rng), LINES)) if turn < TURNS else []
        told = [code, *codes[TURNS:]] if turn == 0 else [code] if story else []
        story[LINES // 2 : LINES // 2] = [fact.sentence for fact in told]
        messages.append({"role": "user", "content": " ".join([*story, code.question])})
        answer = client.chat.completions.create(
            model="needle", messages=messages, temperature=0, max_tokens=24, extra_body=WISHES
        )
        said = answer.choices[0].message.content.strip()
        messages.append({"role": "assistant", "content": said})
        print(f"turn {turn + 1}: {said}" if story else f"turn 1 again: {said}")
        right += said == code.sentence
    did = requests.get(f"{url}/server_info").json()["internal_states"][0]["arkvale"]
    print(f"{right} of {len(codes)} right, {did['pages_recalled']} pages recalled")
    return 0 if right == len(codes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
