"""One small server through a storm: aborts, disconnects, retraction, flushes, radix eviction."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import urllib.error

import pytest

from support.serving import flush, generate, generate_together, prompt, wait_idle

PAGES = 160
FLAGS = (
    "--kv-policy", "arkvale", "--page-size", "16", "--arkvale-budget", "512",
    "--arkvale-device-tokens", "768", "--max-total-tokens", str(PAGES * 16),
    "--arkvale-host-memory", "0.25", "--arkvale-oversubscription", "6",
    "--arkvale-check-invariants", "--arkvale-dense-layers", "1", "--chunked-prefill-size", "128",
)  # fmt: skip
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_TEST_RETRACT": "1",  # retracts a running request every few passes
    "SGLANG_TEST_RETRACT_INTERVAL": "11",
}
REFERENCES = [prompt(length, 300 + length) for length in (40, 333, 480)]
SEED = 20240611


@pytest.fixture(scope="module")
def server(tiny, serve):
    return serve(tiny("llama", dtype="float32"), *FLAGS, env=STRICT)


@pytest.fixture(scope="module")
def calm(server):
    """What the reference prompts answer before any storm."""
    return [generate(server, tokens, 24)["output_ids"] for tokens in REFERENCES]


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


def test_a_prompt_beyond_the_logical_pool_is_answered_with_an_error_and_the_server_stays(
    server, calm
):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        generate(server, prompt(PAGES * 16 + 100, 1), 4)
    assert refusal.value.code == 400
    assert generate(server, REFERENCES[0], 24)["output_ids"] == calm[0]


def one_request(server, seed: int) -> int:
    """A request that ends in one of many ways; returns how often it was retracted."""
    retracted = 0
    rng = random.Random(seed)
    shared = prompt(rng.choice((64, 160, 400)), rng.randrange(4))
    tokens = [*shared, *prompt(rng.randrange(1, 200), seed)]
    new = rng.randrange(1, 90)
    body = {
        "input_ids": tokens,
        "rid": f"storm-{seed}",
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
    }
    fate = rng.choice(("finish", "finish", "disconnect", "abort"))
    with contextlib.suppress(urllib.error.HTTPError):
        stream = server.stream(body)
        for count, part in enumerate(stream):
            retracted = part["meta_info"].get("num_retractions", retracted)
            if count >= rng.randrange(1, 12):
                if fate == "disconnect":
                    stream.close()
                    break
                if fate == "abort":
                    server.post("/abort_request", {"rid": body["rid"]})
    return retracted


def test_a_storm_loses_nothing_and_leaks_nothing(server, calm):
    print(f"storm seed {SEED}")
    before, retracted = server.arkvale(), 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(one_request, server, SEED + n) for n in range(90)]
        for done, future in enumerate(concurrent.futures.as_completed(futures)):
            retracted += future.result()
            if done % 20 == 19:
                flush(server)
    report = wait_idle(server)
    assert report["violations"] == []
    assert report["frames_used"] == 0 and report["logical_pages_used"] == 0
    assert report["pages_recalled"] > before["pages_recalled"] and report["pages_refused"] == 0
    assert retracted > 10, "retraction went untested"
    for tokens, expected in zip(REFERENCES, calm, strict=True):
        assert generate(server, tokens, 24)["output_ids"] == expected
    assert "leak detected" not in server.log.read_text()
