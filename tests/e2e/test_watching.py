"""One server, asked for its counters in every way there is while it evicts and recalls."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from arkvale_sglang.cli.main import main
from arkvale_sglang.cli.record import read
from arkvale_sglang.cli.stream import Stream
from arkvale_sglang.integration.metrics import PREFIX
from support.serving import prompt

ROOT = Path(__file__).resolve().parents[2]
ARKVALE = str(Path(sys.executable).parent / "arkvale")
KEY = "a-secret"
FLAGS = (
    "--kv-policy", "arkvale", "--page-size", "16", "--arkvale-budget", "256",
    "--arkvale-host-memory", "0.1", "--arkvale-dense-layers", "1", "--arkvale-head-groups", "2",
    "--arkvale-device-tokens", "640", "--enable-metrics", "--api-key", KEY,
    "--decode-log-interval", "10", "--disable-overlap-schedule",  # one step per token
)  # fmt: skip
NEW = 320
"""Tokens that take longer to decode than the time between two messages of counters."""


@dataclasses.dataclass
class Watched:
    """What was seen of two requests that decode side by side."""

    server: Any
    before: dict[str, Any]
    after: dict[str, Any]
    rids: list[str]
    heard: list[list[Any]]
    """Messages of two subscribers: one to everything, one to stats."""
    recording: Path
    said: str
    """By ``arkvale record``."""


def ask(server, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {KEY}"})
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def state(server) -> dict[str, Any]:
    return ask(server, "/server_info")["internal_states"][0]["arkvale"]


def arkvale(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command, run here: starting Python takes seconds."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(list(arguments))
    return code, said.getvalue()


@pytest.fixture(scope="module")
def watched(tiny, serve, tmp_path_factory) -> Watched:
    server = serve(tiny("llama", dtype="float32"), *FLAGS)
    recording = tmp_path_factory.mktemp("stream") / "chat.jsonl"
    streams = [Stream(server.url, KEY, [""]), Stream(server.url, KEY, ["stats"])]
    heard: list[list[Any]] = [[], []]
    over = threading.Event()

    def listen(stream, into) -> None:
        while not over.is_set():
            message = stream.receive(0.2)
            if message is not None:
                into.append(message)

    listeners = [
        threading.Thread(target=listen, args=pair) for pair in zip(streams, heard, strict=True)
    ]
    for thread in listeners:
        thread.start()
    recorder = subprocess.Popen(
        [ARKVALE, "record", server.url, str(recording), "--api-key", KEY],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (recording.exists() and len(recording.read_bytes().splitlines()) > 1 and all(heard)):
        assert time.monotonic() < deadline, "every subscriber is greeted"
        time.sleep(0.2)
    before = state(server)
    sampling = {"max_new_tokens": NEW + 1, "temperature": 0, "ignore_eos": True}
    prompts = [prompt(length, length) for length in (500, 370)]
    params = [sampling, {**sampling, "custom_params": {"arkvale": {"budget": 128}}}]
    body = {"input_ids": prompts, "sampling_params": params, "rid": ["long", "short"]}
    answers = ask(server, "/generate", body)
    deadline = time.monotonic() + 30
    while not heard[1][-1].header["idle"] or heard[1][-1].header["totals"]["pages_sealed"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(0.5)
    recorder.terminate()
    said = recorder.communicate(timeout=60)[0]
    assert recorder.returncode == 0, said
    over.set()
    for thread, stream in zip(listeners, streams, strict=True):
        thread.join()
        stream.__exit__()
    rids = [answer["meta_info"]["id"] for answer in answers]
    return Watched(server, before, state(server), rids, heard, recording, said)


def documented(heading: str, page: str = "docs/metrics.md") -> list[str]:
    """Names in the first column of the tables under a heading, in their order."""
    text = (ROOT / page).read_text().split(f"\n## {heading}\n")
    if len(text) == 1:
        text = (ROOT / page).read_text().split(f"\n### {heading}\n")
    section = re.split(r"\n##+ ", text[1])[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def exposed(server) -> dict[str, Any]:
    """Metric families of the policy by name, as a scraper without a key gets them."""
    with urllib.request.urlopen(f"{server.url}/metrics/", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {family.name: family for family in families if family.name.startswith(PREFIX)}


def test_prometheus_shows_what_is_documented(watched):
    families = exposed(watched.server)
    counters = {name for name, family in families.items() if family.type == "counter"}
    assert {f"{PREFIX}{name}" for name in documented("Counters")} == counters
    assert set(documented("Levels")) == set(families) - counters
    for family in families.values():
        labels = {name for sample in family.samples for name in sample.labels}
        assert {"model_name", "engine_type", "tp_rank"} <= labels, "SGLang's own"


def test_prometheus_shows_the_counters_of_every_layer(watched):
    families = exposed(watched.server)
    for layer in watched.after["layers"]:
        for name in documented("Counters")[:11]:
            samples = families[PREFIX + name].samples
            value = [one.value for one in samples if one.labels["layer"] == str(layer["layer"])]
            assert value == [layer[name]], (name, layer["layer"])
    for name in ("pages_sealed", "tokens_streamed"):
        assert families[PREFIX + name].samples[0].value == watched.after[name]
    assert families[f"{PREFIX}frames"].samples[0].value == watched.after["frames_total"] == 240
    assert watched.after["pages_recalled"] - watched.before["pages_recalled"] > 100


def test_the_dashboard_names_metrics_that_exist(watched):
    board = json.loads((ROOT / "examples/grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions.append(board["templating"]["list"][1]["definition"])
    families = exposed(watched.server)
    known = {sample.name for family in families.values() for sample in family.samples}
    named = {name for text in expressions for name in re.findall(r"[a-z]+:\w+", text)}
    assert all(re.search(r"sglang:arkvale_\w+", text) for text in expressions)
    assert named <= known and len(expressions) > 20


def test_messages_have_the_fields_that_are_documented(watched):
    stats = watched.heard[1][-2].header
    assert set(stats) == set(documented("`stats`"))
    totals = set(documented("Counters")[:11]) | {"pages_sealed", "tokens_streamed"}
    assert set(stats["totals"]) == totals
    assert set(stats["layers"][0]) == {*documented("Counters")[:11], "layer", "frames_free",
                                       "frames_hot"}  # fmt: skip
    pages = next(message for message in watched.heard[0] if message.topic == "pages")
    assert set(pages.header) == set(documented("`pages`"))
    rows = [row for message in watched.heard[1] for row in message.header["requests"]]
    text = (ROOT / "docs/metrics.md").read_text()
    for name in {*rows[0], *stats["per_second"], *stats["levels"]}:
        assert f"`{name}`" in text
    assert {row["rid"]: row["budget"] for row in rows} == {"long": 256, "short": 128}


def test_two_subscribers_hear_the_same(watched):
    everything = [one.header for one in watched.heard[0] if one.topic == "stats"]
    stats = [one.header for one in watched.heard[1]]
    assert stats[-1]["idle"] and stats[-1]["requests"] == []
    assert everything[-1] == stats[-1]
    assert stats[-1]["totals"]["pages_recalled"] == watched.after["pages_recalled"]
    assert stats[-1]["dropped"] == 0


def test_page_states_add_up_to_the_counters(watched):
    """Nothing is shared: a recall is a page of one request, an attended page a hit or a miss."""
    steps = [one for one in watched.heard[0] if one.topic == "pages"]
    assert [one.header["rid"] for one in steps].count("long") == NEW
    states = np.concatenate([np.frombuffer(one.payload, np.uint8) for one in steps])
    grown = {
        name: watched.after[name] - watched.before[name]
        for name in ("page_hits", "page_misses", "pages_recalled")
    }
    assert (states >= 2).sum() == grown["page_hits"] + grown["page_misses"]
    assert (states == 3).sum() == grown["pages_recalled"] == grown["page_misses"]
    for one in steps:
        assert one.header["shape"] == [3, 2, -(-one.header["tokens"] // 16)]


def test_the_recording_holds_the_stream_and_survives_a_crash(watched, tmp_path):
    recording = read(watched.recording)
    heard = [one for one in watched.heard[0] if one.topic == "pages"]
    assert [page["tokens"] for page in recording.pages] == [one.header["tokens"] for one in heard]
    assert all(
        page["states"].tobytes() == one.payload
        for page, one in zip(recording.pages, heard, strict=True)
    )
    assert f"messages written to {watched.recording}" in watched.said and recording.broken == 0
    header = json.loads(watched.recording.read_bytes().splitlines()[0])
    assert set(header) == set(documented("Recordings")) - {"arkvale-stream"}
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(watched.recording.read_bytes()[:-100])
    code, said = arkvale("record", watched.server.url, str(cut), "--api-key", KEY, "--seconds", "1")
    assert code == 0 and said.startswith("1 messages written"), said
    found = read(cut)
    assert found.broken == 1 and len(found.servers) == 2
    assert len(found.stats) == len(recording.stats), "one was cut, one came"


def test_the_recording_is_drawn(watched, tmp_path):
    out = tmp_path / "chat.png"
    code, said = arkvale("plot", str(watched.recording), str(out), "--request", "sho")
    assert code == 0 and f"{NEW} steps of request short" in said
    pixels = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3)
    for colour in ((0xF4, 0xF4, 0xF2), (0xC9, 0xDC, 0xEC), (0x3B, 0x78, 0xB0), (0xD1, 0x49, 0x5B)):
        assert (pixels == colour).all(1).sum() > 500
    code, said = arkvale("plot", str(watched.recording), str(out), "--layer", "2")
    assert code == 0 and "layers [2]" in said and "request long" in said


def test_top_shows_an_idle_server_once(watched):
    code, said = arkvale("top", watched.server.url, "--once", "--api-key", KEY)
    assert code == 0, said
    wanted = watched.after["page_hits"] + watched.after["page_misses"]
    rate = f"since the start {100 * watched.after['page_hits'] / wanted:.1f} %"
    for words in ("idle", rate, "budget 256 tokens", "of 240", "no request decodes"):
        assert words in said
    assert len(re.findall(r"^ +[123]  +[█▒·]{40} ", said, re.M)) == 3


@pytest.mark.parametrize(
    "key, words", [((), "wants an API key"), (("--api-key", "x"), "wants another API key")]
)
@pytest.mark.parametrize("command", ["top", "report", "record"])
def test_without_the_servers_key_there_is_one_sentence(watched, tmp_path, command, key, words):
    file = (str(tmp_path / "file"),) if command == "record" else ()
    code, said = arkvale(command, watched.server.url, *file, *key)
    assert code == 1 and said.startswith("error: ") and words in said and said.count("\n") == 1


def test_the_decode_line_ends_with_what_happened_since_the_one_before(watched):
    lines = [line for line in watched.server.log.read_text().splitlines() if "Decode batch" in line]
    assert lines
    for line in lines:
        assert re.search(
            r", arkvale hit rate: (-|[01]\.\d\d), recall: \d+\.\d MB/s, frames: \d+/240$", line
        )
    assert any(not line.split("recall: ")[1].startswith("0.0") for line in lines)


def test_server_info_names_the_stream(watched):
    assert watched.after["stream"].startswith("tcp://127.0.0.1:")
    assert [layer["layer"] for layer in watched.after["layers"]] == [1, 2, 3]
