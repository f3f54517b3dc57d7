"""Two ranks on a CPU: the same tokens as one, the sizes that were planned, ends that are clean.

Head groups are those of a rank, so two ranks of one group choose as one rank of two groups does.
The two servers also stand behind SGLang's router, as replicas would.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import random
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from arkvale_sglang.cli.launch import ServerFailed, free_port
from arkvale_sglang.cli.plan import Load, Machine, Model, expect
from arkvale_sglang.config.settings import ArkValeConfig
from support.serving import TWO_RANKS, generate, generate_together, prompt, wait_idle

SIZES = {"budget": 256, "device_tokens": 512, "host_memory": 0.25, "dense_layers": 1}
POLICY = (
    "--kv-policy", "arkvale", "--arkvale-oversubscription", "4", "--arkvale-check-invariants",
    "--chunked-prefill-size", "256",
    *(f"--arkvale-{name.replace('_', '-')}={value}" for name, value in SIZES.items()),
)  # fmt: skip
WITHIN = [prompt(length, 700 + length) for length in (30, 90, 150)]
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


@pytest.fixture
def router(one_rank, two_ranks, tmp_path):
    """The address of SGLang's router before both servers, as docs/operating.md starts it."""
    port, log = free_port(), tmp_path / "router.log"
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_router.launch_router", "--policy", "cache_aware",
             "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()),
             "--worker-urls", one_rank.url, two_ranks.url],
            stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline, known = time.monotonic() + 90, 0
        while known < 2:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/workers") as answer:
                known = json.load(answer)["total"]
        yield url
    finally:
        process.kill()
        process.wait()


def ask(url: str, path: str, body: dict) -> tuple[int, str]:
    """Status and text of a POST."""
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.skipif(not importlib.util.find_spec("sglang_router"), reason="sglang-router is absent")
def test_the_router_sends_what_shares_a_document_to_the_replica_that_has_it(
    one_rank, two_ranks, request
):
    """Six documents, asked about at once and then again: each is digested by one server, once."""
    router = request.getfixturevalue("router")

    def sealed() -> list[int]:
        return [server.arkvale()["pages_sealed"] for server in (one_rank, two_ranks)]

    def complete(document: str, new: int, **more: object) -> tuple[int, str]:
        body = {"model": "tiny", "prompt": document, "max_tokens": new, "temperature": 0}
        return ask(router, "/v1/completions", {**body, "ignore_eos": True, **more})

    rng = random.Random(17)
    documents = ["".join(rng.choices(string.ascii_lowercase, k=650)) for _ in range(6)]
    before = sealed()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        codes = [code for code, _ in pool.map(lambda text: complete(text, 64), documents)]
        first = sealed()
        again = [f"{text}? {number}" for number in range(3) for text in documents]
        codes += [code for code, _ in pool.map(lambda text: complete(text, 4), again)]
    assert codes == [200] * 24
    added = [after - start for after, start in zip(first, before, strict=True)]
    assert sum(added) == 6 * ((650 + 63) // 32) and min(added) > 0, "both took part"
    assert sealed() == first, "a document was digested twice"

    too_much = {"custom_params": {"arkvale": {"budget": 10**6}}}
    code, text = complete(documents[0], 4, **too_much)
    assert code == 400 and "ask for no more." in text
    code, _ = complete(documents[0], 4, custom_params={"arkvale": {"budget": 192}})
    assert code == 200
    # What docs/operating.md warns of: elsewhere this router drops fields that it does not know.
    code, _ = ask(router, "/generate", {"text": "a", "sampling_params": too_much})
    assert code == 200


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
