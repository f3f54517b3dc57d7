"""Clients of the soak and of the storms see how their requests end; a small server plays the part
of SGLang."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import threading
import time

import pytest

from arkvale_sglang.cli.launch import Server
from chaos import acts, storms
from soak.load import CLIENTS, Load

ABORT = {"type": "abort", "message": "made up"}
DONE = {"meta_info": {"finish_reason": {"type": "length"}}}
FAILED = {"meta_info": {"finish_reason": {**ABORT, "status_code": 500}}}
REFUSED = {"error": {"message": "made up", "code": 400}}
TOKEN = {"meta_info": {"finish_reason": None}}


# -- the soak's load -----------------------------------------------------------------------------


class Streams:
    """A server whose streams are this one."""

    def __init__(self, stream):
        self.stream = stream


def seen(load, requests):
    """Sums of what the clients saw of so many requests at least."""
    sums, deadline = {"requests": 0, "failed": 0, "tokens": 0}, time.monotonic() + 10
    while sums["requests"] < requests:
        assert time.monotonic() < deadline, f"the clients stand still: {sums}"
        taken = load.take()
        sums = {name: count + taken[name] for name, count in sums.items()}
        time.sleep(0.01)
    return sums


@pytest.mark.parametrize("rest", [[REFUSED], [FAILED], []], ids=["error", "abort", "cut off"])
def test_a_request_that_fails_in_its_stream_has_failed(rest):
    with Load(Streams(lambda body: (part for part in [TOKEN, *rest])), 1) as load:
        sums = seen(load, CLIENTS)
    assert sums["failed"] == sums["tokens"] == sums["requests"]


def test_an_answer_that_ends_well_has_not_failed():
    def stream(body):
        time.sleep(0.01)
        yield from (TOKEN, DONE)

    with Load(Streams(stream), 1) as load:
        sums = seen(load, CLIENTS)
    assert not sums["failed"] and sums["tokens"] == 2 * sums["requests"]


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(), http.client.IncompleteRead(b""), json.JSONDecodeError("", "", 0)],
)
def test_a_client_survives_a_request_that_breaks_off(error):
    def stream(body):
        raise error
        yield

    with Load(Streams(stream), 1) as load:
        sums = seen(load, CLIENTS + 1)
    assert sums["failed"] == sums["requests"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_client_that_died_is_no_quiet_load():
    numbers = itertools.count()

    def stream(body):
        if next(numbers) == 0:
            raise KeyError("made up")
        yield from (TOKEN, REFUSED)

    with (
        Load(Streams(stream), 1) as load,
        pytest.raises(RuntimeError, match=f"only {CLIENTS - 1} of {CLIENTS} clients are alive"),
    ):
        seen(load, 1000)


# -- streamed acts of the storms -----------------------------------------------------------------


class Fake(http.server.BaseHTTPRequestHandler):
    """Streams the parts that its server was given; before a silent one it waits for an abort."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/abort_request":
            self.server.aborts.append(body["rid"])
            self.server.woken.set()
            self.start("Content-Length", "0")
            return
        for number, part in enumerate(self.server.parts):
            if number == self.server.silent:
                self.server.woken.wait(10)
            if number == 0:
                self.start("Transfer-Encoding", "chunked")
            self.chunk(b"data: " + json.dumps(part).encode() + b"\n\n")
        self.chunk(b"")

    def start(self, *header):
        self.send_response(200)
        self.send_header(*header)
        self.end_headers()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def handle(self):
        with contextlib.suppress(ConnectionError):  # clients hang up
            super().handle()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def fake():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        server.parts, server.silent = [TOKEN, DONE], None
        server.aborts, server.woken = [], threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.woken.set()
        server.shutdown()


@pytest.fixture
def end(fake, tmp_path):
    """How a request ends that meets a fate after so many tokens or seconds."""
    client = Server("none", port=fake.server_port, log=tmp_path / "log")
    body = {"rid": "chaos-0.", "stream": True}
    return lambda fate, tokens, seconds: acts.Streamed(client, body, fate).end(tokens, seconds)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (DONE, "finish"),
        (TOKEN, "cut off"),
        (REFUSED, "400"),
        (FAILED, "500"),
        ({"meta_info": {"finish_reason": ABORT}}, "aborted unasked"),
        ({"meta_info": {"finish_reason": {"type": "length"}, "num_retractions": 2}},
         "finish, retracted"),
    ],
)  # fmt: skip
def test_what_a_stream_says_of_its_end_is_told(fake, end, part, told):
    fake.parts = [TOKEN, part]
    assert end("finish", 0, None) == told


@pytest.mark.parametrize("silent", [0, 1], ids=["at once", "after a token"])
@pytest.mark.parametrize("fate", ["hang up", "abort"])
def test_a_request_meets_its_fate_while_the_server_is_silent(fake, end, fate, silent):
    fake.silent, fake.parts = silent, [TOKEN, {"meta_info": {"finish_reason": ABORT}}]
    begin = time.monotonic()
    assert end(fate, 7, 0.05) == fate
    assert time.monotonic() - begin < 5, "the timer woke nobody"
    assert fake.aborts == (["chaos-0."] if fate == "abort" else [])


@pytest.mark.parametrize("fate", ["hang up", "abort"])
def test_a_request_that_ended_before_its_fate_has_finished(fake, end, fate):
    begin = time.monotonic()
    assert end(fate, 7, 30) == "finish"
    assert time.monotonic() - begin < 5 and not fake.aborts


def test_a_hang_up_after_a_token_ends_the_request(fake, end):
    assert end("hang up", 0, None) == "hang up"


def test_an_abort_that_came_too_late_is_none(fake, end):
    assert end("abort", 0, None) == "finish"
    assert fake.aborts == ["chaos-0."]


def test_a_server_that_breaks_off_is_no_hang_up(fake, end):
    fake.parts = [TOKEN, object()]  # its thread fails on what is no JSON
    fake.handle_error = lambda *_: None
    assert end("hang up", 7, 30) == "cut off"


def test_the_seed_draws_when_a_client_gives_up(monkeypatch):
    class Drawn:
        def __init__(self, server, body, fate):
            self.end = lambda tokens, seconds: (body["rid"], fate, tokens, seconds)

    monkeypatch.setattr(acts, "Streamed", Drawn)

    def draw():
        return [acts.Draw(f"0-{n}", 2560, 512)._generate()(None) for n in range(200)]

    drawn = draw()
    assert draw() == drawn
    early = [seconds for _, fate, _, seconds in drawn if fate != "finish"]
    timed = [seconds for seconds in early if seconds is not None]
    assert len(early) / 3 < len(timed) < len(early) * 2 / 3
    assert all(0 <= seconds <= acts.EARLY_SECONDS for seconds in timed)
    rids = [rid for rid, *_ in drawn]
    assert not any(one.startswith(other) for one, other in itertools.permutations(rids, 2))


@pytest.mark.parametrize(
    ("end", "may"),
    [
        ("generate: finish, retracted", True),
        ("generate: hang up", True),
        ("generate: 400", False),
        ("generate: 500, retracted", False),
        ("generate: aborted unasked", False),
        ("generate: cut off", False),
        ("endless answer: 400", True),
        ("endless answer: 500", False),
        ("several prompts: 200", True),
        ("several prompts: 400", False),
        ("completion: 503", False),
        ("nonsense settings: 200", False),
        ("prompt beyond capacity: 400", True),
        ("malformed body: wrong type: 422", True),
        ("malformed body: wrong type: 500", False),
        (f"malformed body: {acts.SAMPLING}: 500", True),
        ("wrong path: 405", True),
    ],
)
def test_a_call_may_end_as_its_kind_may(end, may):
    assert storms.sound(end) == may
