"""Requests that bring their own budget and rule to a running server."""

from __future__ import annotations

import json
import urllib.error

import pytest

from support.serving import prompt, wait_idle

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
    sampling = {"max_new_tokens": STEPS + 1, "temperature": 0, "ignore_eos": True}
    params = [
        sampling if wish is None else {**sampling, "custom_params": {"arkvale": wish}}
        for wish in wishes
    ]
    server.post("/generate", {"input_ids": tokens, "sampling_params": params})
    after = wait_idle(server)
    counters = ("page_hits", "page_misses")
    return sum(after[name] - before[name] for name in counters)


def test_rows_of_one_batch_attend_to_what_each_asked_for(server):
    tokens = [prompt(60 * PAGE + 3, seed) for seed in range(4)]
    wishes = [
        {"budget": 256},
        None,
        {"budget": 512, "selection": "streaming"},
        {"budget": 128, "selection": "h2o"},
    ]
    pages = (256 // PAGE) + 61 + (512 // PAGE) + (128 // PAGE)
    assert attended(server, tokens, wishes) == pages * LAYERS * STEPS


def test_a_chat_completion_carries_its_wishes_too(server):
    before = wait_idle(server)
    server.post(
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a long story " * 60}],
            "temperature": 0,
            "max_tokens": STEPS + 1,
            "ignore_eos": True,
            "custom_params": {"arkvale": {"budget": 160}},
        },
    )
    after = wait_idle(server)
    grown = sum(after[name] - before[name] for name in ("page_hits", "page_misses"))
    assert grown == 10 * LAYERS * STEPS


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"budget": 2048}, "started with --arkvale-budget 1024"),
        ({"budget": "all"}, "give it a whole number"),
        ({"frames": 3}, "no request can set"),
        ([], "make it an object"),
    ],
)
def test_nonsense_is_a_400_that_says_what_to_do(server, wishes, message):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        attended(server, [prompt(20, 1)], [wishes])
    assert refusal.value.code == 400
    assert message in json.loads(refusal.value.read())["error"]["message"]
    assert attended(server, [prompt(20, 1)], [None]) == 2 * LAYERS * STEPS
