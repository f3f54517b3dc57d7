"""What the commands that watch a server say where there is nothing to see, and how they draw."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from arkvale_sglang.cli import plot, record, stream, top
from arkvale_sglang.cli.main import main
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.runtime.publish import STATS, Publisher

HEADER = json.dumps({"format": "arkvale-stream", "version": 1})
POLICY = {"settings": {"budget": 256, "page_size": 16}}


@contextlib.contextmanager
def answering(state: object, code: int = 200) -> Iterator[str]:
    """A server whose ``/server_info`` answers with one thing, or what a function returns; gives
    its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps(state() if callable(state) else state).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(**arkvale) -> dict:
    return {"internal_states": [{"arkvale": {**POLICY, **arkvale}}]}


def said(capsys, *arguments: str) -> str:
    """The one sentence that a command fails with."""
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ")
    return shown.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    "state, code, sentence",
    [
        ({"internal_states": [{}]}, 200, "serves without the policy; start it with --kv-policy"),
        (states(stream=None), 200, "has no stream; start it without --arkvale-stream off."),
        ({}, 401, "wants an API key; give its key with --api-key."),
        ({}, 404, "answers /server_info with HTTP Error 404: Not Found; is it SGLang?"),
        ([], 200, "is no SGLang server; give the address of one."),
        ({"internal_states": [7]}, 200, "is no SGLang server; give the address of one."),
    ],
)
def test_a_server_that_cannot_be_watched_is_told_in_a_sentence(state, code, sentence, capsys):
    with answering(state, code) as url:
        assert sentence in said(capsys, "top", url, "--once")


def test_no_server_at_all(capsys, tmp_path):
    for arguments in (("top",), ("record", str(tmp_path / "file"))):
        command, *rest = arguments
        found = said(capsys, command, "http://127.0.0.1:9", *rest)
        assert "does not answer" in found and found.endswith("is the server up?")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    "url", ["myhost", "localhost:30000", "http://", "http://h:port", "ftp://h"]
)
def test_what_is_no_address_is_told_in_a_sentence(url, capsys):
    found = said(capsys, "top", url)
    assert found == f"{url} is no address of a server; give one like {stream.DEFAULT_URL}."


def test_what_speaks_no_http_is_told_in_a_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        greeting = threading.Thread(target=lambda: other.accept()[0].sendall(b"220 hello\r\n"))
        greeting.start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}"
        assert said(capsys, "top", url) == (f"{url} is no SGLang server; give the address of one.")
        greeting.join()
    assert "is no SGLang server" in said(capsys, "top", "http://my host")


def test_a_stream_on_another_machines_loopback_is_out_of_reach():
    with pytest.raises(ArkValeError, match=r"only its own machine reaches; run this there or"):
        stream._reachable("tcp://127.0.0.1:4000", "http://gpu-box:30000")
    assert stream._reachable("tcp://0.0.0.0:4000", "http://gpu-box:1") == "tcp://gpu-box:4000"
    assert stream._reachable("ipc:///run/a", "http://gpu-box:1") == "ipc:///run/a"


def test_a_server_that_goes_away_ends_a_recording_with_what_came(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "_QUIET_SECONDS", 0.3)
    publisher = Publisher(None)
    path = tmp_path / "file"
    path.write_text(HEADER + '\n{"topic": "st')  # an earlier recording that crashed
    with answering(states(stream=publisher.endpoint)) as url:
        recording = threading.Thread(target=main, args=(["record", url, str(path)],))
        recording.start()
        until(lambda: (publisher.poll(), publisher.wants(STATS))[1])
        publisher.send(STATS, {"time": 1.0})
        until(lambda: path.read_bytes().endswith(b'"time": 1.0}\n'))
    recording.join(30)
    publisher.close()
    assert "1 messages written" in (out := capsys.readouterr().out) and "does not answer" in out
    found = record.read(path)
    assert found.stats == [{"topic": "stats", "sequence": 0, "time": 1.0}]
    assert found.broken == 1 and len(found.servers) == 2


@pytest.fixture
def subscribed(monkeypatch):
    """A subscriber, its publisher, and a list: the server answers with its last entry."""
    monkeypatch.setattr(stream, "_QUIET_SECONDS", 0.05)
    publisher = Publisher(None)
    answers = [states(stream=publisher.endpoint)]

    def answer():
        found = answers[-1]
        return found() if callable(found) else found

    with answering(answer) as url, stream.Stream(url, None, [STATS]) as subscriber:
        until(lambda: (publisher.poll(), publisher.wants(STATS))[1])
        yield subscriber, publisher, answers
    publisher.close()


def test_a_server_too_busy_to_answer_is_waited_for(subscribed, monkeypatch):
    subscriber, publisher, answers = subscribed
    monkeypatch.setattr(stream, "_ANSWER_SECONDS", 0.05)
    asked = []
    answers.append(lambda: asked.append(time.sleep(0.3)))
    assert subscriber.receive(1.0) is None
    until(lambda: asked)
    publisher.send(STATS, {"time": 1.0})
    assert subscriber.receive(30.0).header["time"] == 1.0
    with pytest.raises(ArkValeError, match="does not answer"):
        stream.server_state(subscriber.url)


@pytest.mark.parametrize(
    "endpoint, sentence",
    [
        ("tcp://127.0.0.1:9", "was restarted and has another stream now; run the command again."),
        (None, "has no stream any more, since it was restarted without one or"),
    ],
)
def test_another_stream_at_the_same_address_ends_the_wait(subscribed, endpoint, sentence):
    subscriber, publisher, answers = subscribed
    publisher.send(STATS, {"time": 1.0})
    assert subscriber.receive(30.0).header["time"] == 1.0
    answers.append(states(stream=endpoint))
    with pytest.raises(ArkValeError, match=sentence):
        subscriber.receive(30.0)


# -- files -----------------------------------------------------------------------------------


def page(rid: str, tokens: int, states: list[list[list[int]]]) -> str:
    packed = base64.b64encode(zlib.compress(np.array(states, np.uint8).tobytes())).decode()
    shape = list(np.array(states).shape)
    entry = {"topic": "pages", "rid": rid, "tokens": tokens, "layers": [4], "shape": shape}
    return json.dumps({**entry, "states": packed})


@pytest.mark.parametrize(
    "text, options, sentence",
    [
        ("", (), "is empty; make one with: arkvale record URL FILE."),
        ("a,b\n1,2\n", (), "is no recording; make one with: arkvale record URL FILE."),
        (f"{HEADER}\n", (), "holds no message yet; record while the server answers requests."),
        (page("r", 3, [[[0]]]), ("--request", "z"), "is no recording"),
        (f"{HEADER}\n{page('r', 3, [[[0]]])}", ("--request", "z"), "no step of request 'z'"),
        (f"{HEADER}\n{page('r', 3, [[[0]]])}", ("--layer", "9"), "layer 9 is not in the record"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_told_in_a_sentence(
    text, options, sentence, tmp_path, capsys
):
    path = tmp_path / "file"
    path.write_text(text)
    assert sentence in said(capsys, "plot", str(path), str(tmp_path / "x.png"), *options)
    assert "cannot be read" in said(capsys, "plot", str(tmp_path / "no"), "x.png")


def test_nothing_is_appended_to_a_file_that_is_no_recording(tmp_path, capsys):
    path = tmp_path / "notes"
    path.write_text("mine")
    publisher = Publisher(None)
    with answering(states(stream=publisher.endpoint)) as url:
        assert "is no recording" in said(capsys, "record", url, str(path), "--seconds", "1")
    publisher.close()
    assert path.read_text() == "mine"


def test_to_append_reads_the_begin_of_a_recording_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text(f"{HEADER}\n" + '{"topic": "st')
    monkeypatch.setattr(record, "read", None)
    monkeypatch.setattr(record, "_LONGEST_BEGIN", len(HEADER) + 1)
    with record._opened(path) as file:
        file.write(b"more")
    assert path.read_text() == f"{HEADER}\n" + '{"topic": "st\nmore'
    path.write_text("\n\n")
    with pytest.raises(ArkValeError, match="is empty; make one"):
        record._opened(path)


def test_without_matplotlib_plot_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in said(capsys, "plot", "file", "x.png")


def test_a_grid_holds_the_most_that_any_lane_did(tmp_path):
    path = tmp_path / "file"
    rows = [HEADER, page("r", 32, [[[0, 2], [1, 0]]]), page("r", 33, [[[3, 1, 2], [0, 0, 2]]])]
    path.write_text("\n".join(rows) + "\n" + rows[1][:40])
    found = record.read(path)
    assert found.broken == 1
    assert plot.grid(found.pages, 4).tolist() == [[1, 3], [2, 1], [255, 2]]


# -- the view --------------------------------------------------------------------------------


def stats(time: float, hits: int, **others) -> dict:
    layer = {"layer": 2, "page_hits": hits, "page_misses": 10, "pages_recalled": 10,
             "frames_free": 5, "frames_hot": 10}  # fmt: skip
    rows = [{"rid": f"r{n}", "tokens": 9, "pages": 1, "budget": 64, "ms_per_token": 1.0 * n}
            for n in range(12)]  # fmt: skip
    return {
        "sequence": 0, "time": time, "idle": False, "calm": 0.25, "hit_rate": 0.5,
        "per_second": dict.fromkeys(
            ("pages_recalled", "bytes_recalled", "pages_evicted", "steps", "tokens"), 2e6
        ),
        "totals": {"page_hits": hits, "page_misses": 10},
        "levels": {"frames_total": 20, "frames_used": 15, "frames_free": 5, "frames_hot": 10,
                   "logical_pages_total": 99, "logical_pages_used": 7},
        "layers": [layer], "requests": rows, **others,
    }  # fmt: skip


def test_a_view_shows_rates_of_the_interval_and_the_slowest_first():
    class Server:
        url, state, lost = "http://x", POLICY, 3

    console = top.Console(width=100, record=True, file=__import__("io").StringIO())
    console.print(top.view(Server(), stats(10.0, 90), stats(12.0, 190)))
    shown = console.export_text()
    assert "50.0 %    since the start 95.0 %" in shown and "2.00 MB/s" in shown
    layer = next(line for line in shown.splitlines() if line.strip().startswith("2 "))
    assert layer.count("█") == 20 and layer.count("▒") == 10 and layer.count("·") == 10
    assert layer.split()[2:] == ["100.0", "%", "0", "0", "5"]
    listed = [line.split()[0] for line in shown.splitlines() if line.strip().startswith("r")]
    assert [name for name in listed if name[1:].isdigit()] == [f"r{n}" for n in range(11, 3, -1)]
    assert "3 messages were lost" in shown
