"""Counters equal an independent count; page states equal what the tables did; the stream holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import zmq

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.runtime import broadcast, decode
from arkvale_sglang.runtime.broadcast import Batch, Broadcast
from arkvale_sglang.runtime.publish import HIGH_WATER, PAGES, STATS, Publisher
from arkvale_sglang.runtime.watch import STATES, PageStates
from support.counting import CountingEngine, counted, reported, states_of


def engine(pages=80, frames=24, groups=1, layers=3, **settings) -> CountingEngine:
    options = {"page_size": 16, "budget": 16 * 7, "dense_layers": 1, "head_groups": groups}
    config = ArkValeConfig(**{**options, **settings})
    return CountingEngine(config, pages=pages, frames=frames, layers=layers)


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize(
    "settings, frames, prompts, seen",
    [
        ({}, 24, [400, 20, 130], {"pages_recalled", "pages_evicted"}),
        ({"top_k": 16}, 10, [400, 380], {"forced_fills"}),
        ({"recall_cap": 1}, 12, [400], {"pages_withheld"}),
        ({"budget": 16 * 20}, 60, [100, 150], {"page_hits"}),
        ({"budget": 16 * 8}, 10, [100, 90, 60], {"pages_recalled"}),
    ],
    ids=["choosing", "few-resident", "cap", "calm", "pressed-within-budget"],
)
def test_counters_equal_an_independent_count(settings, frames, prompts, seen, groups):
    fake = engine(frames=frames, groups=groups, **settings)
    rows = [fake.add_row() for _ in prompts]
    fake.extend(dict(zip(rows, prompts, strict=True)))
    assert reported(fake) == counted(fake)
    for number in range(20):
        one = rows[number % len(rows) :][:1]  # each finds what the others left of its pages
        fake.decode(rows if number % 2 and frames > 10 else one)
        assert reported(fake) == counted(fake), number
    assert all(layer[name] > 0 for layer in counted(fake) for name in seen)
    free = fake.cache.plan.frames * groups
    for managed, layer in enumerate(fake.cache.report()["layers"]):
        assert layer["frames_free"] == free - len(fake.resident(managed))
        assert layer["layer"] == managed + 1
        assert layer["bytes_recalled"] == layer["pages_recalled"] * 16 * (2 // groups) * 8 * 2 * 4


def test_totals_are_sums_and_a_rate_needs_something_wanted():
    fake = engine()
    row = fake.add_row()
    nothing = fake.cache.snapshots.latest()
    assert nothing.hit_rate() is None and nothing.levels["frames_free"] == 48
    fake.extend({row: 400})
    for _ in range(3):
        fake.decode([row])
    now = fake.cache.snapshots.current(time.time())
    for name in ("page_hits", "page_misses", "pages_backed_up"):
        assert now.totals[name] == sum(layer[name] for layer in counted(fake))
    wanted = now.totals["page_hits"] + now.totals["page_misses"]
    assert wanted == 3 * 7 * 2 and now.hit_rate(nothing) == now.totals["page_hits"] / wanted
    assert now.hit_rate(now) is None


def last_step(fake: CountingEngine, monkeypatch) -> list[decode.DecodeStep]:
    """Steps as they are planned, the latest last."""
    planned: list[decode.DecodeStep] = []
    original = decode.plan_decode

    def plan(*arguments, **options):
        planned.append(original(*arguments, **options))
        return planned[-1]

    monkeypatch.setattr(decode, "plan_decode", plan)
    return planned


@pytest.mark.parametrize("groups", [1, 2], ids="groups-{}".format)
@pytest.mark.parametrize("frames, budget", [(24, 7), (70, 30)], ids=["choosing", "calm"])
def test_page_states_are_what_a_step_did(groups, frames, budget, monkeypatch):
    fake = engine(groups=groups, frames=frames, budget=16 * budget)
    planned = last_step(fake, monkeypatch)
    rows = [fake.add_row(), fake.add_row()]
    fake.extend({rows[0]: 400, rows[1]: 60})
    states, seen = PageStates(fake.cache), set()
    for number in range(20):
        fake.steps.clear()
        fake.decode(rows)
        counts = [len(fake.rows[row].pages) for row in rows]
        found = states.of_step(planned[-1], counts)
        assert (found is None) == (number == 0), "what was away before the first is not known"
        if found is None:
            continue
        for index, row in enumerate(rows):
            words = [
                [[STATES[state] for state in lane] for lane in layer]
                for layer in found.tensor[:, index, :, : counts[index]].tolist()
            ]
            assert words == states_of(fake, row)
            seen |= {word for layer in words for lane in layer for word in lane}
    assert seen == (set(STATES) if budget == 7 else {"attended"})


def test_a_full_row_attends_to_all_its_pages_wherever_they_are(monkeypatch):
    fake = engine(frames=24, budget=16 * 7)
    planned = last_step(fake, monkeypatch)
    rows = [fake.add_row(), fake.add_row()]
    fake.extend({rows[0]: 400, rows[1]: 300})
    full = fake.config.for_request({"policy": "full"})
    states = PageStates(fake.cache)
    for _ in range(2):
        fake.decode(rows, [fake.config, full])
        counts = [len(fake.rows[row].pages) for row in rows]
        found = states.of_step(planned[-1], counts)
    frame_of = fake.cache.store.managed[0].residency.frame_of
    assert any(int(frame_of[page]) < 0 for page in fake.rows[rows[1]].pages), "nothing is away"
    chosen, whole = (found.tensor[:, row, :, : counts[row]] for row in range(2))
    assert (whole == STATES.index("attended")).all() and (chosen == 0).any()


# -- the stream ------------------------------------------------------------------------------


class Subscriber:
    """A plain SUB socket, as any program would open."""

    def __init__(self, endpoint: str, *topics: str):
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        for topic in topics:
            self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.socket.connect(endpoint)

    def messages(self, milliseconds: int = 300) -> list[list[bytes]]:
        found = []
        while self.socket.poll(milliseconds):
            found.append(self.socket.recv_multipart())
        return found

    def stats(self) -> list[dict]:
        return [json.loads(parts[1]) for parts in self.messages() if parts[0] == STATS.encode()]


@pytest.fixture
def publisher():
    made = Publisher(None)
    yield made
    made.close()


def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def listening(publisher: Publisher, topic: str) -> bool:
    publisher.poll()
    return publisher.wants(topic)


def test_subscribers_come_and_go(publisher):
    assert publisher.endpoint.startswith("tcp://127.0.0.1:")
    assert not listening(publisher, STATS)
    publisher.send(STATS, {"nobody": "hears"})
    first, second = Subscriber(publisher.endpoint, ""), Subscriber(publisher.endpoint, STATS)
    until(lambda: listening(publisher, STATS) and publisher.wants(PAGES))
    time.sleep(0.2)
    publisher.poll()
    publisher.send(STATS, {"number": 1})
    publisher.send(PAGES, {"number": 2}, b"\0\1")
    assert [parts[0] for parts in first.messages()] == [b"stats", b"pages"]
    assert second.messages() == [[b"stats", b'{"sequence": 1, "number": 1}']]
    first.socket.close()
    until(lambda: listening(publisher, STATS) and not publisher.wants(PAGES))
    second.socket.close()
    until(lambda: not listening(publisher, STATS))


def test_a_subscriber_that_stands_still_loses_messages_and_holds_up_nobody(publisher):
    listen = (
        "import sys, zmq; s = zmq.Context().socket(zmq.SUB); s.setsockopt(zmq.RCVHWM, 1);"
        "s.setsockopt(zmq.RCVBUF, 4096); s.subscribe(b''); s.connect(sys.argv[1]); input()"
    )
    still = subprocess.Popen(
        [sys.executable, "-c", listen, publisher.endpoint], stdin=subprocess.PIPE
    )
    try:
        until(lambda: listening(publisher, PAGES), 60)
        os.kill(still.pid, signal.SIGSTOP)
        lively = Subscriber(publisher.endpoint, PAGES)
        lively.socket.setsockopt(zmq.RCVHWM, 0)
        time.sleep(0.3)
        publisher.poll()
        heard = 0
        for number in range(3 * HIGH_WATER):
            publisher.send(PAGES, {"number": number}, bytes(100_000))
            if lively.socket.poll(10_000):
                lively.socket.recv_multipart()
                heard += 1
        assert publisher.dropped > 0 and heard == 3 * HIGH_WATER
    finally:
        still.kill()
        still.wait()
    until(lambda: not publisher.poll() and True)
    publisher.send(PAGES, {"number": -1}, b"")
    assert len(lively.messages()) == 1
    lively.socket.close()


def test_words_that_concern_no_topic_are_neither_kept_nor_waited_for(publisher):
    heard = Subscriber(publisher.endpoint, PAGES)
    until(lambda: listening(publisher, PAGES))
    for number in range(100):
        heard.socket.subscribe(f"statistics {number}")
    heard.socket.subscribe(STATS)
    time.sleep(0.3)
    assert not listening(publisher, STATS), "some words are left for the next pass"
    until(lambda: listening(publisher, STATS))
    assert publisher._prefixes == {PAGES.encode(), STATS.encode()}
    long = Subscriber(publisher.endpoint, "x" * 100_000)
    assert not publisher._socket.poll(500), "nor is a word taken that is longer than any topic"
    heard.socket.close()
    long.socket.close()


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_an_endpoint_that_is_taken_is_refused_in_a_sentence(kind, tmp_path):
    """ZMQ itself would take the path of an ``ipc`` endpoint away from whoever has it."""
    first = Publisher(None if kind == "tcp" else f"ipc://{tmp_path / 'stream'}")
    with pytest.raises(ArkValeError, match=r"cannot be bound .* name another endpoint, or off\.$"):
        Publisher(first.endpoint)
    first.close()
    Publisher(first.endpoint).close()


def test_a_path_too_long_for_a_socket_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ArkValeError, match=r"cannot be bound .* name another endpoint, or off\.$"):
        Publisher(f"ipc://{tmp_path / ('x' * 120)}")


# -- what is told ----------------------------------------------------------------------------


def decoded(fake: CountingEngine, step, names: list[str], rows: list[int]) -> Batch:
    return Batch(names, torch.tensor([fake.rows[row].tokens for row in rows]), None, step)


def test_nothing_is_looked_at_while_nobody_listens(publisher, monkeypatch):
    fake = engine()
    planned = last_step(fake, monkeypatch)
    row = fake.add_row()
    told = Broadcast(fake.cache, publisher)
    for name in ("take", "latest", "current"):
        monkeypatch.setattr(fake.cache.snapshots, name, None)
    monkeypatch.setattr(PageStates, "of_step", None)
    monkeypatch.setattr(PageStates, "note", None)
    monkeypatch.setattr(broadcast, "STATS_SECONDS", 0.0)
    fake.extend({row: 400})
    told.after_pass(None)
    fake.decode([row])
    told.after_pass(decoded(fake, planned[-1], ["one"], [row]))
    told.idle()


def test_messages_tell_what_happened(publisher, monkeypatch):
    fake = engine()
    planned = last_step(fake, monkeypatch)
    monkeypatch.setattr(broadcast, "STATS_SECONDS", 0.0)
    rows = [fake.add_row(), fake.add_row()]
    told = Broadcast(fake.cache, publisher)
    heard = Subscriber(publisher.endpoint, "")
    until(lambda: listening(publisher, PAGES))
    fake.extend({rows[0]: 400, rows[1]: 60})
    told.after_pass(None)
    for _ in range(4):
        fake.decode(rows)
        told.after_pass(decoded(fake, planned[-1], ["one", "two"], rows))
    told.idle()
    told.idle()
    messages = heard.messages()
    stats = [json.loads(parts[1]) for parts in messages if parts[0] == b"stats"]
    pages = [(json.loads(parts[1]), parts[2]) for parts in messages if parts[0] == b"pages"]
    assert [one["sequence"] for one in stats] == list(range(len(stats))) and len(stats) == 6
    assert [one["idle"] for one in stats] == [False] * 5 + [True]
    assert stats[-1]["requests"] == []
    assert [one["rid"] for one in stats[-2]["requests"]] == ["one", "two"]
    assert [one["tokens"] for one in stats[-2]["requests"]] == [404, 64]
    assert [one["pages"] for one in stats[-2]["requests"]] == [26, 4]
    assert all(one["ms_per_token"] > 0 for one in stats[-2]["requests"])
    hits, misses = (
        sum(layer[name] for layer in counted(fake)) for name in ("page_hits", "page_misses")
    )
    assert stats[-1]["totals"]["page_hits"] == hits
    per_step = [one["hit_rate"] for one in stats[1:5]]
    assert all(0 < rate <= 1 for rate in per_step) and misses > 0
    assert len(pages) == 2 * 4, "the pass before the first step says what was away"
    for header, payload in pages:
        states = np.frombuffer(payload, np.uint8).reshape(header["shape"])
        assert states.shape == (2, 1, 26 if header["rid"] == "one" else 4)
        assert header["layers"] == [1, 2]
    recalled = sum(payload.count(3) for _, payload in pages)
    assert recalled == sum(layer["pages_recalled"] for layer in counted(fake))
    heard.socket.close()


def test_who_subscribes_while_nothing_runs_is_told_at_once(publisher):
    fake = engine()
    told = Broadcast(fake.cache, publisher)
    told.idle()
    heard = Subscriber(publisher.endpoint, STATS)
    until(lambda: (told.idle(), publisher.wants(STATS))[1])
    found = heard.stats()
    assert len(found) == 1 and found[0]["idle"] and found[0]["hit_rate"] is None
    heard.socket.close()


def test_a_clock_that_is_set_back_stops_nothing(publisher, monkeypatch):
    """Messages carry the time of the day, which does not decide when they are sent."""
    fake = engine()
    planned = last_step(fake, monkeypatch)
    monkeypatch.setattr(broadcast, "STATS_SECONDS", 0.01)
    monkeypatch.setattr(broadcast, "EXPORT_SECONDS", 0.01)
    got = []
    told = Broadcast(fake.cache, publisher, lambda snapshot, dropped: got.append(snapshot))
    heard = Subscriber(publisher.endpoint, "")
    until(lambda: listening(publisher, PAGES))
    row = fake.add_row()
    fake.extend({row: 400})
    told.after_pass(None)
    now = time.time()
    for hours in range(3):
        monkeypatch.setattr(time, "time", lambda hours=hours: now - 3600 * hours)
        time.sleep(0.02)
        fake.decode([row])
        told.after_pass(decoded(fake, planned[-1], ["one"], [row]))
    messages = heard.messages()
    headers = {
        topic: [json.loads(parts[1]) for parts in messages if parts[0] == topic.encode()]
        for topic in (STATS, PAGES)
    }
    assert len(got) == len(headers[STATS]) == 4
    for found in headers.values():
        hours = [(now - one["time"]) / 3600 for one in found[-3:]]
        assert hours == pytest.approx([0, 1, 2], abs=0.01)
    stats = headers[STATS][-1]
    assert 0 < stats["interval"] < 10 and 0 < stats["requests"][0]["ms_per_token"] < 10_000
    heard.socket.close()


def test_an_export_gets_every_count(monkeypatch):
    fake = engine()
    planned = last_step(fake, monkeypatch)
    monkeypatch.setattr(broadcast, "STATS_SECONDS", 0.0)
    monkeypatch.setattr(broadcast, "EXPORT_SECONDS", 0.0)
    got = []
    told = Broadcast(fake.cache, None, lambda snapshot, dropped: got.append(snapshot))
    row = fake.add_row()
    fake.extend({row: 400})
    told.after_pass(None)
    for _ in range(3):
        fake.decode([row])
        told.after_pass(decoded(fake, planned[-1], ["one"], [row]))
    told.idle()
    assert len(got) == 5
    for name, value in counted(fake)[0].items():
        assert got[-1].layers[0][name] == value
