"""Two ranks on a CPU: the same tokens as one, the sizes that were planned, ends that are clean.

Head groups are those of a rank, so two ranks of one group choose as one rank of two groups does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import psutil
import pytest
import torch

from arkvale_sglang.cli.launch import ServerFailed
from arkvale_sglang.cli.plan import Load, Machine, Model, expect
from arkvale_sglang.config.settings import ArkValeConfig
from support.serving import generate, generate_together, prompt, wait_idle

SIZES = {"budget": 256, "device_tokens": 512, "host_memory": 0.25, "dense_layers": 1}
POLICY = (
    "--kv-policy", "arkvale", "--arkvale-oversubscription", "4", "--arkvale-check-invariants",
    "--chunked-prefill-size", "256",
    *(f"--arkvale-{name.replace('_', '-')}={value}" for name, value in SIZES.items()),
)  # fmt: skip
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
WITHIN = [prompt(length, 700 + length) for length in (30, 150, 220)]
BEYOND = [prompt(length, 700 + length) for length in (400, 333, 900)]
FAULTS = '''
"""A plugin beside ours: one rank refuses at the start, or breaks a law once a file appears."""

import os
import pathlib


def on_rank_1():
    from sglang.srt.distributed import parallel_state
    return parallel_state.get_tensor_model_parallel_rank() == 1


def register():
    from arkvale_sglang.config.settings import ArkValeError
    from arkvale_sglang.integration import model_check
    from arkvale_sglang.runtime.cache import PagedCache
    check, settle = model_check.check_loaded, PagedCache.settle

    def refuse(model):
        check(model)
        if "FAULT_REFUSE" in os.environ and on_rank_1():
            raise ArkValeError("rank 1 has no wish to serve; ask another.")

    def corrupt(cache):
        settle(cache)
        if pathlib.Path(os.environ["FAULT_FILE"]).exists() and on_rank_1():
            cache.store.sealed[0] = True

    model_check.check_loaded, PagedCache.settle = refuse, corrupt
'''


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", kv_heads=4, dtype="float32")


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str]:
    """The environment of servers that have the plugin of faults."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "rank_faults.py").write_text(FAULTS)
    about = folder / "rank_faults-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rank-faults\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nrank_faults = rank_faults:register\n"
    )
    return {"PYTHONPATH": str(folder), "FAULT_FILE": str(folder / "break"), **TWO_RANKS}


@pytest.fixture(scope="module")
def one_rank(model, serve):
    return serve(model, *POLICY, "--arkvale-head-groups", "2", env={"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def two_ranks(model, serve, faults):
    return serve(model, *POLICY, "--tp", "2", env=faults)


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize("prompts", [WITHIN, BEYOND], ids=["within the budget", "beyond it"])
def test_two_ranks_answer_as_one(one_rank, two_ranks, prompts):
    expected = tokens(generate_together(one_rank, prompts, 32))
    assert tokens(generate_together(two_ranks, prompts, 32)) == expected
    again = [[*ids, *answer, *prompt(40, 9)] for ids, answer in zip(prompts, expected, strict=True)]
    expected = tokens([generate(one_rank, ids, 16) for ids in again])
    assert tokens([generate(two_ranks, ids, 16) for ids in again]) == expected


def test_pages_were_recalled_and_everything_is_given_back_on_both_sides(one_rank, two_ranks):
    for server in (one_rank, two_ranks):
        report = wait_idle(server)
        assert report["pages_recalled"] > 100 and report["pages_refused"] == 0
        assert report["frames_used"] == 0 and report["violations"] == []


def test_ranks_hold_equal_shares_of_what_was_planned(model, one_rank, two_ranks):
    shape = dataclasses.replace(Model.from_config(model), dtype=torch.float32)
    machine = Machine(64, 0.25, 100, 10, 0.85)
    planned = expect(ArkValeConfig(**SIZES), shape, 0, machine, Load(8192, 1, 0.9), tp=2).pool
    alone, report = one_rank.arkvale(), two_ranks.arkvale()
    assert report["bytes"] == planned.bytes
    assert 2 * report["bytes"]["host"] == alone["bytes"]["host"] <= 0.25 * 2**30
    assert report["logical_pages_total"] == alone["logical_pages_total"] == planned.logical_pages
    lines = [
        line.partition("arkvale: ")[2]
        for line in two_ranks.log.read_text().splitlines()
        if " TP0] arkvale: " in line or " TP1] arkvale: " in line
    ]
    assert len(lines) == 2 and lines[0] == lines[1]


def test_a_law_broken_on_one_rank_ends_the_server(two_ranks, faults):
    """Last of those that use the server; ranks look whenever they are idle."""
    family = psutil.Process(two_ranks.pid).children(recursive=True)
    assert len(family) >= 3
    Path(faults["FAULT_FILE"]).touch()
    with contextlib.suppress(OSError):
        generate(two_ranks, prompt(20, 1), 1)
    assert two_ranks.wait(60) != 0
    log = two_ranks.log.read_text()
    assert "arkvale: the padding page" in log and " TP1] Scheduler hit an exception" in log
    assert not psutil.wait_procs(family, timeout=20)[1], "processes are left"


def test_one_rank_that_refuses_ends_the_server_with_its_sentence(model, serve, faults):
    with pytest.raises(ServerFailed, match="the server ended with") as failure:
        serve(model, *POLICY, "--tp", "2", env={**faults, "FAULT_REFUSE": "1"})
    assert "\nerror: rank 1 has no wish to serve; ask another.\n" in str(failure.value)
