"""The policy inside a Python program, without a server.

    python examples/engine.py

The flags of the command line are arguments of ``sglang.Engine``.  Expected output (the numbers
of pages vary):

    the code of the proud rope is 6634. full
    the code of the faded bell is 4969. arkvale
    the code of the narrow house is 7808. arkvale
    the code of the quick well is 5866. arkvale
    407 pages evicted, 311 recalled
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import sglang

from needle_model import text

MODEL = Path(__file__).resolve().parent / "needle_model/model"


def main() -> None:
    rng = random.Random(0)
    codes = text.codes(rng, text.subjects(rng, 4))
    prompts = []
    for code in codes:
        lines = list(itertools.islice(text.filler(rng), 120))
        lines.insert(40, code.sentence)
        prompts.append(f"<|begin|><|user|>{' '.join(lines)} {code.question}<|end|><|assistant|>")
    with sglang.Engine(
        model_path=str(MODEL),
        dtype="float32",
        log_level="error",
        kv_policy="arkvale",
        arkvale_budget=512,
        arkvale_device_tokens=1024,
        arkvale_dense_layers=0,
        arkvale_host_memory=0.25,
    ) as engine:
        sampling = {"temperature": 0, "max_new_tokens": 24}
        in_full = {**sampling, "custom_params": {"arkvale": {"policy": "full"}}}
        for answer in engine.generate(prompts, [in_full, *[sampling] * 3]):
            print(answer["text"].strip(), answer["meta_info"]["arkvale"]["policy"])
        did = engine.get_server_info()["internal_states"][0]["arkvale"]
    print(f"{did['pages_evicted']} pages evicted, {did['pages_recalled']} recalled")


if __name__ == "__main__":
    main()
