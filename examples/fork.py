"""An ``sglang`` program that forks over one long document, whose pages are digested once.

    make serve
    python examples/fork.py http://127.0.0.1:30000

The model has 3 layers, and a branch fills one page of its own.  Expected output:

    the code of the proud rope is 6634.
    the code of the faded bell is 4969.
    the code of the narrow house is 7808.
    the code of the quick well is 5866.
    for the document 252 pages were digested, for its branches 12
"""

from __future__ import annotations

import itertools
import random
import sys

import sglang as sgl

from needle_model import text

BRANCHES, LINES = 4, 300


@sgl.function
def look_up(s, document, codes, digested):
    s += f"<|begin|><|user|>{document}"
    s.sync()  # a text that is complete by the time of the fork is computed once for all branches
    branches = s.fork(len(codes))
    s["digested"] = digested()
    for branch, code in zip(branches, codes, strict=True):
        branch += f" {code.question}<|end|><|assistant|>" + sgl.gen("answer", max_tokens=24)
    s["answers"] = [branch["answer"].strip() for branch in branches]


def main(url: str) -> int:
    server = sgl.RuntimeEndpoint(url)
    server.flush_cache()  # so that nothing of the document is known from an earlier run
    rng = random.Random(0)
    codes = text.codes(rng, text.subjects(rng, BRANCHES))
    lines = list(itertools.islice(text.filler(rng), LINES))
    lines[LINES // 2 : LINES // 2] = [code.sentence for code in codes]

    def digested() -> int:
        return server.get_server_info()["internal_states"][0]["arkvale"]["pages_digested"]

    before = digested()
    state = look_up.run(" ".join(lines), codes, digested, temperature=0, backend=server)
    shared, own = state["digested"] - before, digested() - state["digested"]
    print(*state["answers"], sep="\n")
    print(f"for the document {shared} pages were digested, for its branches {own}")
    return 0 if state["answers"] == [code.sentence for code in codes] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
