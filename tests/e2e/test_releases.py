"""The smoke subset on the oldest and the newest supported SGLang: exact, evicting, clean after."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.serving import generate, generate_together, prompt, wait_idle

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("0.5.17", "0.5.23")
POLICY = (
    "--kv-policy", "arkvale", "--arkvale-budget", "512", "--arkvale-device-tokens", "768",
    "--arkvale-host-memory", "0.25", "--arkvale-oversubscription", "4",
    "--arkvale-check-invariants", "--arkvale-dense-layers", "1", "--chunked-prefill-size", "256",
)  # fmt: skip
TOGETHER = [prompt(length, 400 + length) for length in (300, 210, 400)]
LONG = prompt(2300, 450)


@pytest.mark.parametrize("release", RELEASES)
def test_policy_equals_stock_on_another_release(release, tiny, serve):
    python = ROOT / f".venv-{release}/bin/python"
    assert python.exists(), f"run: python3 setup_env.py --release {release}"
    model = tiny("llama", dtype="float32")
    stock = serve(model, "--max-total-tokens", "16384", python=str(python))
    expected = [answer["output_ids"] for answer in generate_together(stock, TOGETHER, 24)]
    first = generate(stock, LONG, 1)["output_ids"]
    stock.stop()
    server = serve(model, *POLICY, python=str(python))
    info = server.get("/server_info")
    assert info["version"] == release
    wishes = [None, {"policy": "full"}, {"budget": 512, "top_k": 64}]
    answers = generate_together(server, TOGETHER, 24, wishes=wishes)
    assert [answer["output_ids"] for answer in answers] == expected
    got = [answer["meta_info"]["arkvale"] for answer in answers]
    assert got[1] == {"policy": "full"} and [got[0]["top_k"], got[2]["top_k"]] == [256, 64]
    completion = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert server.post("/v1/completions", completion)["metadata"]["arkvale"] == got[0]
    assert generate(server, LONG, 1)["output_ids"] == first
    report = wait_idle(server)
    assert report["pages_recalled"] > 100 and report["violations"] == []
    assert report["frames_used"] == 0
    assert "leak detected" not in server.log.read_text()
