"""Compute the table of ``docs/planning.md``: what ``arkvale plan`` expects of well-known shapes.

    PYTHONPATH=benchmarks python benchmarks/planning.py [--docs docs]

Nothing is measured and nothing is fetched: shapes and data sheets stand below.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from arkvale_sglang.cli.plan import Load, Machine, Model, expect
from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.sizing import GIB
from pages import fill, table

ROOT = Path(__file__).resolve().parent.parent


def _decoder(layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> Model:
    return Model(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=8,
        head_dim=128, vocabulary=vocabulary, tied=False, dtype=torch.bfloat16,
    )  # fmt: skip


MODELS = {
    "8B (Llama 3.1)": _decoder(32, 4096, 14336, 32, 128_256),
    "32B (Qwen3)": _decoder(64, 5120, 25600, 64, 151_936),
    "70B (Llama 3.1)": _decoder(80, 8192, 28672, 64, 128_256),
}
MACHINES = {
    "RTX 4090": Machine(24, 128, 1008, 25, 0.85),
    "H100": Machine(80, 256, 3350, 55, 0.85),
    "H200": Machine(141, 256, 4800, 55, 0.85),
}
CASES = (
    ("8B (Llama 3.1)", "RTX 4090", "int4", 1),
    ("8B (Llama 3.1)", "H100", "bfloat16", 1),
    ("8B (Llama 3.1)", "H200", "bfloat16", 1),
    ("32B (Qwen3)", "RTX 4090", "int4", 2),
    ("32B (Qwen3)", "H100", "fp8", 1),
    ("32B (Qwen3)", "H200", "bfloat16", 1),
    ("70B (Llama 3.1)", "RTX 4090", "int4", 4),
    ("70B (Llama 3.1)", "H100", "fp8", 2),
    ("70B (Llama 3.1)", "H200", "fp8", 1),
)
CONTEXTS = (131_072, 1_048_576)
HIT_RATE = 0.95


def lines(context: int) -> list[list[str]]:
    """A row for every case; what does not fit says so."""
    found = []
    for model_name, machine_name, weights, tp in CASES:
        model, device = MODELS[model_name], MACHINES[machine_name]
        machine = dataclasses.replace(device, host_memory=tp * device.host_memory)
        config = ArkValeConfig(host_memory=machine.host_memory, digest_dtype="fp8")
        where = [model_name, f"{tp} x {machine_name}" if tp > 1 else machine_name, weights]
        weight_bytes = model.weight_bytes(weights, tp)
        try:
            one = expect(config, model, weight_bytes, machine, Load(context, 1, HIT_RATE), tp)
        except ArkValeError as error:
            found.append([*where, str(error).partition(";")[0], *[""] * 5])
            continue
        batch = max(1, one.requests)
        many = expect(config, model, weight_bytes, machine, Load(context, batch, HIT_RATE), tp)
        found.append(
            [
                *where,
                f"{one.pool.device_bytes / GIB:.1f}",
                str(one.full_requests),
                str(one.requests),
                f"{one.full_ms:.1f} / {one.arkvale_ms:.1f}" if one.requests else "-",
                f"{many.full_ms:.1f} / {many.arkvale_ms:.1f}" if one.requests else "-",
                f"{many.recalled_bytes / 1e6:.0f}" if one.requests else "-",
            ]
        )
    return found


HEAD = (
    "model", "device", "weights", "cache on the device, GiB", "requests, full", "requests, arkvale",
    "step of one, full / arkvale, ms", "step of all that arkvale admits, full / arkvale, ms",
    "recalled per step, MB",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    page = parser.parse_args().docs / "planning.md"
    places = {
        f"context {context // 1024}k": lambda context=context: table(HEAD, lines(context))
        for context in CONTEXTS
    }
    page.write_text(fill(page.read_text(), places))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
