"""Requests that bring their own budget and rule to a running server."""

from __future__ import annotations

import json
import urllib.error

import pytest

from support.serving import generate_together, prompt, wait_idle

PAGE, LAYERS, STEPS = 16, 3, 8
FLAGS = (
    "--kv-policy", "arkvale", "--page-size", str(PAGE), "--arkvale-budget", "1024",
    "--arkvale-host-memory", "0.25", "--arkvale-dense-layers", "1", "--arkvale-check-invariants",
    "--disable-overlap-schedule",  # one step per token, so that pages can be counted
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny, serve):
    return serve(tiny("llama", dtype="float32"), *FLAGS)


def attended(server, tokens: list[list[int]], wishes: list[dict | None]) -> int:
    """Pages attended in the decode steps of requests that run side by side."""
    before = wait_idle(server)
    generate_together(server, tokens, STEPS + 1, wishes=wishes)
    after = wait_idle(server)
    counters = ("page_hits", "page_misses")
    return sum(after[name] - before[name] for name in counters)


def test_rows_of_one_batch_attend_to_what_each_asked_for(server):
    tokens = [prompt(length * PAGE + 3, length) for length in (60, 61, 62, 63, 80, 81)]
    wishes = [
        {"budget": 256},
        None,
        {"budget": 512, "selection": "streaming"},
        {"budget": 128, "selection": "h2o"},
        {"policy": "full"},
        {"budget": 512, "top_k": 32},
    ]
    pages = (256 // PAGE) + 62 + (512 // PAGE) + (128 // PAGE) + 81 + (512 // PAGE)
    assert attended(server, tokens, wishes) == pages * LAYERS * STEPS


CHAT = {"messages": [{"role": "user", "content": "a long story " * 60}]}
COMPLETION = {"prompt": "a long story " * 60}
OPENAI = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]


def openai(body: dict, wishes: object, **more: object) -> dict:
    return {
        "model": "tiny", "temperature": 0, "max_tokens": STEPS + 1, "ignore_eos": True,
        "custom_params": {"arkvale": wishes}, **body, **more,
    }  # fmt: skip


@pytest.mark.parametrize(("path", "body"), OPENAI)
def test_openai_requests_carry_wishes_and_are_told_what_they_got(server, path, body):
    before = wait_idle(server)
    answer = server.post(path, openai(body, {"budget": 170}))
    after = wait_idle(server)
    grown = sum(after[name] - before[name] for name in ("page_hits", "page_misses"))
    assert grown == 10 * LAYERS * STEPS
    got = answer["metadata"]["arkvale"]
    assert (got["policy"], got["budget"], got["top_k"]) == ("arkvale", 160, 80)


def test_each_answer_tells_what_its_request_got(server):
    """One by one, as a list, as several samples of one prompt, and in every piece of a stream."""
    wishes = [{"policy": "full"}, {"budget": 512, "top_k": 64, "head_reduce": "max"}, None]
    answers = generate_together(server, [prompt(30, 1)] * 3, 2, wishes=wishes)
    full, own, servers = (answer["meta_info"]["arkvale"] for answer in answers)
    assert full == {"policy": "full"}
    assert own == {
        "policy": "arkvale", "budget": 512, "top_k": 64, "head_reduce": "max",
        "selection": "recall",
    }  # fmt: skip
    assert (servers["budget"], servers["top_k"]) == (1024, 512)
    sampling = {"max_new_tokens": 3, "n": 2, "custom_params": {"arkvale": wishes[0]}}
    body = {"input_ids": prompt(30, 1), "sampling_params": sampling}
    assert [one["meta_info"]["arkvale"] for one in server.post("/generate", body)] == [full] * 2
    pieces = list(server.stream({**body, "sampling_params": {**sampling, "n": 1}}))
    assert pieces and all(piece["meta_info"]["arkvale"] == full for piece in pieces)


NONSENSE = [
    ({"budget": 2048}, "started with --arkvale-budget 1024"),
    ({"budget": "all"}, "give it a whole number"),
    ({"frames": 3}, "no request can set"),
    ({"policy": "full", "budget": 512}, "'budget' beside the policy 'full'"),
    ([], "make it an object"),
]


def refused(server, path: str, body: dict) -> str:
    """The message of the 400 that answers a request."""
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.post(path, body)
    assert refusal.value.code == 400
    answer = json.loads(refusal.value.read())
    return answer.get("error", answer)["message"]


@pytest.mark.parametrize(("wishes", "message"), NONSENSE)
def test_nonsense_is_a_400_that_says_what_to_do(server, wishes, message):
    sampling = {"max_new_tokens": 2, "custom_params": {"arkvale": wishes}}
    body = {"input_ids": prompt(20, 1), "sampling_params": sampling}
    assert message in refused(server, "/generate", body)
    for path, openai_body in OPENAI:
        for more in ({}, {"n": 2}, {"stream": True}):
            assert message in refused(server, path, openai(openai_body, wishes, **more))
    # SGLang has sent its 200 before it looks at a stream of its own endpoint.
    [only] = server.stream(body)
    assert only["error"]["code"] == 400 and message in only["error"]["message"]
    assert attended(server, [prompt(20, 1)], [None]) == 2 * LAYERS * STEPS


def test_of_a_list_with_nonsense_nothing_is_queued(server):
    wait_idle(server)
    before = server.arkvale()["pages_sealed"]
    sane = {"max_new_tokens": 2}
    nonsense = {**sane, "custom_params": {"arkvale": {"policy": "none"}}}
    body = {"input_ids": [prompt(200, 1)] * 3, "sampling_params": [sane, sane, nonsense]}
    assert "choose one of full, arkvale" in refused(server, "/generate", body)
    assert server.arkvale()["pages_sealed"] == before
