"""One small server through a storm of every kind of call, and what it does about bad memory."""

from __future__ import annotations

import collections
import os
import urllib.error

import pytest

from chaos import storms
from support.serving import generate, generate_together, prompt, wait_idle

WEATHER, SEED, ACTS = storms.TURNS, "0-0", 140
POISON = """
import os, sys, threading, time

def poison():
    while not hasattr(cache := sys.modules.get("arkvale_sglang.runtime.cache"), "PagedCache"):
        time.sleep(0.1)
    begin = cache.PagedCache.begin_step

    def begin_poisoned(self):
        begin(self)
        if os.path.exists(os.environ["POISON"]):
            host = self.store.host
            host.view(-1).view(__import__("torch").int32).bitwise_xor_(1 << 20)

    cache.PagedCache.begin_step = begin_poisoned

threading.Thread(target=poison, daemon=True).start()
"""
"""Runs as ``sitecustomize`` in the server's processes: while a file exists, every pass begins with
one bit of every word of the host memory flipped."""


@pytest.fixture(scope="module")
def poison(tmp_path_factory):
    """The file whose existence poisons the server's host memory."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "sitecustomize.py").write_text(POISON)
    return folder / "now"


@pytest.fixture(scope="module")
def server(tiny, serve, poison):
    path = os.pathsep.join([str(poison.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**storms.ENVIRONMENT, "PYTHONPATH": path, "POISON": str(poison)}
    return serve(tiny("llama", dtype="float32"), *WEATHER.command, env=env)


@pytest.fixture(scope="module")
def calm(server):
    """What the reference prompts answer before any storm."""
    return storms.answers(server)


def test_many_requests_on_one_prefix_digest_and_back_it_up_once(server, calm):
    wait_idle(server)
    shared = prompt(320, 900)
    generate(server, shared, 1)
    before = server.arkvale()
    answers = generate_together(server, [[*shared, *prompt(5, 910 + n)] for n in range(8)], 6)
    after = server.arkvale()
    assert all(answer["meta_info"]["cached_tokens"] >= 304 for answer in answers)
    for counter in ("pages_sealed", "pages_digested", "pages_backed_up", "bytes_backed_up"):
        assert after[counter] == before[counter], f"{counter} grew although the prefix is shared"
    lanes = 3
    assert before["pages_backed_up"] == lanes * before["pages_sealed"]
    assert before["bytes_backed_up"] == before["pages_backed_up"] * 2 * 16 * 2 * 64 * 4


@pytest.mark.parametrize("token", [-1, 258, 1 << 40])
def test_a_token_that_the_model_does_not_know_is_a_400(server, calm, token):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        generate(server, [5, token, 6], 4)
    assert refusal.value.code == 400 and f"token id {token}," in refusal.value.read().decode()
    assert storms.answers(server) == calm


def test_a_storm_loses_nothing_and_leaks_nothing(server, calm):
    before = server.arkvale()
    storm = storms.Storm(server, WEATHER, SEED, ACTS)
    storm.run(calm)
    assert storm.counts.total() == ACTS and len(storm.counts) == 14, "a kind of call went untested"
    assert server.arkvale()["pages_recalled"] > before["pages_recalled"]
    fates = collections.Counter(
        end.removeprefix("generate: ").removesuffix(", retracted")
        for end in storm.ends.elements()
        if end.startswith("generate: ")
    )
    assert min(fates[fate] for fate in ("finish", "hang up", "abort")) > 5
    assert storm.retracted > 3, "retraction went untested"


def test_poisoned_host_memory_ends_the_server_with_a_sentence_and_no_answer(server, calm, poison):
    """The last test: it takes the server down."""
    for number in range(4):
        generate(server, prompt(480, 700 + number), 2)
    poison.touch()
    with pytest.raises(OSError):
        generate(server, [*prompt(480, 700), *prompt(20, 1)], 24)
    assert server.wait(60) != 0
    (line,) = [line for line in server.log.read_text().splitlines() if "error: page " in line]
    assert "of layer" in line and "test the memory, restart the server" in line
