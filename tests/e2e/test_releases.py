"""The smoke subset on every other supported SGLang: exact, evicting, clean after."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from arkvale_sglang.cli.stream import Stream
from arkvale_sglang.integration import compat
from support.serving import generate, generate_together, prompt, wait_idle

ROOT = Path(__file__).resolve().parents[2]
OTHERS = [release for release in compat.SUPPORTED if release != compat.version()]
POLICY = (
    "--kv-policy", "arkvale", "--arkvale-budget", "512", "--arkvale-device-tokens", "768",
    "--arkvale-host-memory", "0.25", "--arkvale-oversubscription", "4",
    "--arkvale-check-invariants", "--arkvale-dense-layers", "1", "--chunked-prefill-size", "256",
    "--enable-metrics", "--decode-log-interval", "10",
)  # fmt: skip
TOGETHER = [prompt(length, 400 + length) for length in (300, 500, 400)]
"""The second is beyond its budget at the end, but asks for everything."""
LONG = prompt(2300, 450)


def answers_of(server, wishes=None) -> list[dict]:
    """What a server answers to all prompts, in float32."""
    return [*generate_together(server, TOGETHER, 24, wishes=wishes), generate(server, LONG, 1)]


@pytest.fixture(scope="module")
def expected(tiny, serve):
    """The tokens of stock SGLang, the installed release: no other computes anything else."""
    stock = serve(tiny("llama", dtype="float32"), "--max-total-tokens", "16384")
    tokens = [answer["output_ids"] for answer in answers_of(stock)]
    stock.stop()
    return tokens


@pytest.mark.parametrize("release", OTHERS)
def test_policy_equals_stock_on_another_release(release, tiny, serve, expected):
    python = ROOT / f".venv-{release}/bin/python"
    assert python.exists(), f"run: python3 setup_env.py --release {release}"
    doctor = subprocess.Popen(  # meanwhile
        [python, "-m", "arkvale_sglang.cli.main", "doctor", "--json"], stdout=subprocess.PIPE
    )
    server = serve(tiny("llama", dtype="float32"), *POLICY, python=str(python))
    answer = json.loads(doctor.communicate(timeout=170)[0])
    checks = {check["name"]: check for check in answer["checks"]}
    assert answer["can_run"] and checks["sglang"]["found"] == release
    assert server.get("/server_info")["version"] == release
    wishes = [None, {"policy": "full"}, {"budget": 512, "top_k": 64}]
    answers = answers_of(server, wishes)
    assert [each["output_ids"] for each in answers] == expected
    got = [each["meta_info"]["arkvale"] for each in answers]
    assert got[1] == {"policy": "full"} and [got[0]["top_k"], got[2]["top_k"]] == [256, 64]
    completion = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert server.post("/v1/completions", completion)["metadata"]["arkvale"] == got[0]
    report = wait_idle(server)
    assert report["pages_recalled"] > 50 and report["violations"] == []
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
    server.stop()
