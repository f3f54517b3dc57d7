"""Every kernel that ships, compiled for GPUs that are not here: what the assembler made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have on each architecture."""
PREFILL = "_attend_sequence_kernel"
ON_STACK = {(80, PREFILL): 256, (100, "_seal_pages"): 8, (100, "_select_pages"): 16}
"""Bytes that are known to go to the stack, by architecture and kernel; selection's in rows of at
most 1024 pages under a recall cap."""
MEMORY_BOUND = {
    "_score_pages": ("ld",),
    "_build_digests": ("ld",),
    "_move_pages": ("ld", "st"),
    "_gather_pages": ("ld", "st"),
    "_seal_pages": ("ld", "st"),
    "_attend_frames_kernel": ("cp.async",),
    PREFILL: ("cp.async",),
}
"""Kernels that move bytes, and the accesses that must be 128 bits wide."""
EVERYTHING = {
    *MEMORY_BOUND, "_select_pages", "_resolve_pages", "_find_frames", "_softmax_mean",
    "_write_tokens", "_merge_splits_kernel", "_merge_parts_kernel",
}  # fmt: skip


def compile_for(capability: int, cache: Path) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "tests/support/aot_matrix.py", str(capability)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache / str(capability))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[dict]]:
    """What came out for each architecture; compiled afresh, two at a time."""
    cache = tmp_path_factory.mktemp("triton")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda capability: compile_for(capability, cache), SHARED_LIMIT)
        return dict(zip(SHARED_LIMIT, found, strict=True))


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_every_kernel_compiles_within_the_limits(compiled, capability):
    rows = compiled[capability]
    assert {row["kernel"] for row in rows} == EVERYTHING
    for row in rows:
        assert 0 < row["REG"] <= 255 and row["REG"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= SHARED_LIMIT[capability], row


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_nothing_spills(compiled, capability):
    """But where ``ON_STACK`` says so."""
    for row in compiled[capability]:
        spilled = row["STACK"] + row["LOCAL"]
        assert spilled <= ON_STACK.get((capability, row["kernel"]), 0), row


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("kernel", MEMORY_BOUND)
def test_bytes_move_128_bits_at_a_time(compiled, capability, kernel):
    rows = [row for row in compiled[capability] if row["kernel"] == kernel]
    assert rows
    for row in rows:
        for access in MEMORY_BOUND[kernel]:
            sizes = row[access]
            assert 16 in sizes, row
            # The rest are page ids, frame ids and queries, a few bytes for each tile.
            assert sizes.count(16) * 16 >= 0.6 * sum(sizes), (access, row)
