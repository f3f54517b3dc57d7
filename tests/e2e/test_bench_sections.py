"""The benchmark's sections on two small servers: what they measure is what they say."""

from __future__ import annotations

import contextlib

import pytest

from arkvale_sglang.cli.launch import Server
from bench import latency, sides, steps, throughput

POOL = 16_384
FRAMES = 2048
LOADS = (
    throughput.Load("long_prompts", chats=3, shared=0, message=700, new=40),
    throughput.Load("shared_prefix", chats=3, shared=1500, message=200, new=40),
    throughput.Load("returning_chats", chats=3, shared=700, message=40, new=8, turns=2),
)


def quiet(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", dtype="float32")


@pytest.fixture(scope="module")
def both(model):
    flags = [*sides.COMMON, "--dtype", "float32", "--max-total-tokens", str(POOL)]
    arkvale = [
        "--kv-policy", "arkvale", "--arkvale-budget", "512", "--arkvale-device-tokens", str(FRAMES),
        "--arkvale-host-memory", "0.25", "--arkvale-dense-layers", "0", "--page-size", "16",
    ]  # fmt: skip
    with Server(model, flags) as stock, Server(model, [*flags, *arkvale]) as policy:
        yield sides.Sides(stock, policy)


@pytest.fixture
def shared(both, monkeypatch):
    """Sections start servers of their own; here they get these."""

    @contextlib.contextmanager
    def running(*_):
        yield both

    for module in (latency, throughput):
        monkeypatch.setattr(module, "sides", running)
    return both


def check(row, rounds: int) -> None:
    assert len(row["rounds"]["stock"]) == len(row["rounds"]["arkvale"]) == rounds
    assert min(*row["rounds"]["stock"], *row["rounds"]["arkvale"]) > 0
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]


def test_decoding_has_a_row_for_every_context_batch_and_budget(shared, model):
    contexts = {256: (1,), 1200: (1, 2)}
    profiled = tuple(contexts)
    rows = list(latency.decoding("decode", model, contexts, (128, 512), 2, quiet, 0, profiled))
    (growth,) = (row for row in rows if row["case"] == "growth")
    assert (growth["short"], growth["context"]) == profiled and growth["budget"] == 512
    check(growth, 8)
    parts = {row["part"]: row["arkvale"] for row in rows if row["case"] == "step"}
    rows = [row for row in rows if row["case"] == "decode"]
    assert list(parts) == [*steps.PARTS, "rest"] and min(parts["score"], parts["rest"]) > 0
    assert [(row["context"], row["batch"], row["budget"]) for row in rows] == [
        (context, batch, budget)
        for context, batches in contexts.items()
        for batch in batches
        for budget in (128, 512)
    ]
    for row in rows:
        check(row, 2)


def test_follow_ups_and_prefill_have_a_round_each(shared, model):
    (row,) = latency.follow_ups(model, (900,), 2, quiet)
    check(row, 2)
    rows = list(latency.prefilling(model, FRAMES, (1, 2), 2, quiet))
    assert [row["context"] for row in rows] == [FRAMES, 2 * FRAMES]
    for row in rows:
        check(row, 2)
        assert min(row["peak_bytes"].values()) > 1 << 20


def test_every_chat_of_a_load_is_answered(shared, model):
    rows = list(throughput.throughput(model, LOADS, 1, quiet))
    assert [row["case"] for row in rows] == [load.case for load in LOADS]
    for row, load in zip(rows, LOADS, strict=True):
        check(row, 1)
        for side, seconds in row["rounds"].items():
            answered = load.chats * load.turns * load.new
            assert row["tokens_per_second"][side] * seconds[0] == pytest.approx(answered, rel=0.01)
        assert row["bytes"]["frame"] > 0 and min(row["peak_bytes"].values()) > 1 << 20


def test_a_measurement_without_evictions_is_void(both):
    class Server:
        def arkvale(self):
            return {**both.arkvale.arkvale(), "pages_evicted": 0}

    with pytest.raises(RuntimeError, match="nothing was evicted"):
        latency.must_have_evicted(Server())
    with pytest.raises(RuntimeError, match="nothing was evicted"):
        latency.must_have_evicted(both.arkvale, both.arkvale.arkvale()["pages_evicted"])
