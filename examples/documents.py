"""A batch of documents, each read with settings of its own, one of them in full.

    make serve
    python examples/documents.py http://127.0.0.1:30000

What a request leaves open it gets from the server.  Expected output: whether the fact is found by
what was asked, and what was got (policy, budget, top-k, how heads agree, selection):

    found by {'policy': 'full'}: full
    found by {'budget': 256}: arkvale 256 128 mean recall
    found by {'budget': 384, 'top_k': 128}: arkvale 384 128 mean recall
    lost by {'selection': 'streaming'}: arkvale 512 384 mean streaming
    found by {}: arkvale 512 256 mean recall
"""

from __future__ import annotations

import itertools
import random
import sys

import requests

from needle_model import text

LINES = 120
WISHES = (
    {"policy": "full"},
    {"budget": 256},
    {"budget": 384, "top_k": 128},
    {"selection": "streaming"},
    {},
)


def main(url: str) -> int:
    rng = random.Random(0)
    codes = text.codes(rng, text.subjects(rng, len(WISHES)))
    prompts, params = [], []
    for code, wishes in zip(codes, WISHES, strict=True):
        lines = list(itertools.islice(text.filler(rng), LINES))
        lines.insert(LINES // 3, code.sentence)
        prompts.append(f"<|begin|><|user|>{' '.join(lines)} {code.question}<|end|><|assistant|>")
        asked = {"custom_params": {"arkvale": wishes}}
        params.append({"temperature": 0, "max_new_tokens": 24, **asked})
    body = {"text": prompts, "sampling_params": params}
    answers = requests.post(f"{url}/generate", json=body).json()
    for code, wishes, answer in zip(codes, WISHES, answers, strict=True):
        found = "found" if answer["text"].strip() == code.sentence else "lost"
        got = answer["meta_info"]["arkvale"]
        print(f"{found} by {wishes}: {' '.join(map(str, got.values()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
