"""Compile every kernel that ships for one architecture and print what came out, as JSON.

    python tests/support/aot_matrix.py 90

Runs apart from the tests, since these hold the kernels in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "kernels")]
sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from arkvale_kernels.attend import kernel as attend  # noqa: E402
from arkvale_kernels.digest import kernel as digest  # noqa: E402
from arkvale_kernels.layout import (  # noqa: E402
    FrameLists,
    NewTokens,
    PagedLayer,
    Recalls,
    Residency,
    SelectionRule,
)
from arkvale_kernels.residency import kernel as residency  # noqa: E402
from arkvale_kernels.score import kernel as score  # noqa: E402
from arkvale_kernels.select import kernel as select  # noqa: E402
from arkvale_kernels.transfer import kernel as transfer  # noqa: E402
from support.aot import compiling_for  # noqa: E402

FP8 = torch.float8_e4m3fn
ROWS, WIDTH, BUDGET = 16, 4096, 64
PREFILLED = ("llama-3.1-8b", "dim-64-half", "dim-96", "dim-256")
"""Prefill attention knows neither pages nor digests, and compiles the longest."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One layer's lane, as a model and its settings make it."""

    name: str
    heads: int
    ratio: int
    head_dim: int
    page: int
    dtype: torch.dtype = torch.bfloat16
    digest_dtype: torch.dtype | None = None
    reduce: str = "mean"
    kind: str = "cuboid-mean"


CONFIGS = (
    Config("llama-3.1-8b", 8, 4, 128, 32),
    Config("llama-3.1-8b-grouped", 1, 4, 128, 32, reduce="max", kind="cuboid-max"),
    Config("qwen3-32b-fp8", 8, 8, 128, 64, digest_dtype=FP8, kind="cuboid-center"),
    Config("qwen2-7b", 4, 7, 128, 16, reduce="softmax-mean", kind="mean-std"),
    Config("dim-64-half", 2, 7, 64, 16, dtype=torch.float16, reduce="max"),
    Config("dim-96", 8, 4, 96, 64),
    Config("dim-256", 4, 2, 256, 16),
)


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def launches(config: Config) -> Iterator[Callable[[], object]]:
    """One call of each launcher; what depends on no configuration comes with the first."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=config.dtype)

    page = (config.page, config.heads, config.head_dim)
    digests = torch.zeros(9, 2, *page[1:], dtype=config.digest_dtype or config.dtype)
    tables = Residency(integers(9), integers(9), torch.zeros(9, dtype=torch.int64))
    layer = PagedLayer(zeros(9, *page), zeros(9, *page), zeros(9, 2, *page), digests, tables)
    clock, rule = torch.tensor(1), SelectionRule(BUDGET, 32, 2, 2)
    query = zeros(ROWS, config.heads * config.ratio, config.head_dim)
    chunk = zeros(4 * config.page, *page[1:])
    new = NewTokens(integers(ROWS), integers(ROWS), zeros(ROWS, *page[1:]), zeros(ROWS, *page[1:]))
    recalls = Recalls(integers(64), integers(64), integers(1))
    pages, counts = integers(ROWS, WIDTH), integers(ROWS)
    yield lambda: digest.build_digests(zeros(9, *page), config.kind, digests.dtype)
    yield lambda: score.score_pages(
        query, digests, tables.frame_of, pages, counts, rule, config.reduce, 0.1
    )
    yield lambda: transfer.move_pages(layer, new, recalls, clock, config.kind)
    yield lambda: transfer.seal_pages(layer, integers(4), integers(4), chunk, chunk, config.kind)
    yield lambda: transfer.seal_frames(layer, integers(4), clock, config.kind)
    yield lambda: transfer.gather_pages(layer, integers(4), 1, (chunk, chunk))
    yield lambda: transfer.write_tokens(
        layer.k_frames, layer.v_frames, integers(4).long(), chunk[:4], chunk[:4]
    )
    yield lambda: attend.attend_frames(
        query, layer.k_frames, layer.v_frames, integers(ROWS, BUDGET), counts, 0.1, None
    )
    if config.name not in PREFILLED:
        return
    tokens = zeros(4 * config.page, config.heads * config.ratio, config.head_dim)
    yield lambda: attend.attend_chunk(tokens, chunk, chunk, 0.1)
    yield lambda: attend.attend_part(tokens, chunk, chunk, 0.1)
    part = tokens, torch.zeros(tokens.shape[:2])
    yield lambda: attend.merge_parts(part, part)
    if config is not CONFIGS[0]:
        return
    totals = torch.zeros(5, dtype=torch.int64)
    for width, cap in ((WIDTH, None), (WIDTH, 4), (1024, 4), (256, None)):
        yield lambda width=width, cap=cap: select.select_pages(
            torch.zeros(ROWS, width), integers(ROWS, width), counts,
            rule._replace(recall_cap=cap), totals[:2],
        )  # fmt: skip
    lists = FrameLists(integers(ROWS * BUDGET), integers(ROWS + 1))
    many = Residency(integers(520), integers(513), torch.zeros(513, dtype=torch.int64))
    for rows, groups, listed in ((ROWS, 1, lists), (ROWS, 8, None), (4 * ROWS, 1, None)):
        for scores in (torch.zeros(rows, BUDGET), None):
            yield functools.partial(
                residency.resolve_pages, many, integers(rows, BUDGET), scores, clock, totals,
                groups, listed,
            )  # fmt: skip
    yield lambda: residency.find_frames(tables.frame_of, pages, counts, 8, lists)


def main() -> None:
    rows = []
    with compiling_for(int(sys.argv[1])) as compiled:
        for config in CONFIGS:
            for launch in launches(config):
                first = len(compiled)
                launch()
                rows += [(config, kernel) for kernel in compiled[first:]]
    print(
        json.dumps(
            [
                {
                    "kernel": kernel.name, "config": config.name, "warps": kernel.warps,
                    "shared": kernel.shared, **kernel.usage,
                    **{kind: kernel.global_accesses(kind) for kind in ("ld", "st", "cp.async")},
                }
                for config, kernel in rows
            ]
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
