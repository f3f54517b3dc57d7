"""The smoke subset on the oldest and the newest supported SGLang: exact, evicting, clean after."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest

from arkvale_sglang.cli.stream import Stream
from support.serving import generate, generate_together, prompt, wait_idle

ROOT = Path(__file__).resolve().parents[2]
RELEASES = ("0.5.17", "0.5.23")
POLICY = (
    "--kv-policy", "arkvale", "--arkvale-budget", "512", "--arkvale-device-tokens", "768",
    "--arkvale-host-memory", "0.25", "--arkvale-oversubscription", "4",
    "--arkvale-check-invariants", "--arkvale-dense-layers", "1", "--chunked-prefill-size", "256",
    "--enable-metrics", "--decode-log-interval", "10",
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
    found = [answer["output_ids"] for answer in generate_together(server, TOGETHER, 24)]
    assert found == expected
    assert generate(server, LONG, 1)["output_ids"] == first
    report = wait_idle(server)
    assert report["pages_recalled"] > 100 and report["violations"] == []
    with Stream(server.url, None, ["stats"]) as stream:
        heard = stream.receive(30)
    assert heard.header["totals"]["pages_recalled"] == report["pages_recalled"]
    with urllib.request.urlopen(f"{server.url}/metrics/") as answer:
        metrics = answer.read().decode()
    recalled = re.findall(r"^sglang:arkvale_pages_recalled_total{.*} (.*)$", metrics, re.M)
    assert sum(map(float, recalled)) == report["pages_recalled"]
    assert ", arkvale hit rate: " in server.log.read_text()
    assert report["frames_used"] == 0
    assert "leak detected" not in server.log.read_text()
