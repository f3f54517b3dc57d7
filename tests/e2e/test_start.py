"""Starting: what is refused leaves nothing behind, and other ways in than the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arkvale_sglang.cli.plan import Load, Machine, Model, expect
from arkvale_sglang.config.settings import ArkValeConfig
from support.serving import generate, prompt

ROOT = Path(__file__).resolve().parents[2]
POLICY = ("--kv-policy", "arkvale", "--arkvale-host-memory", "0.25")


def launch(model: Path, *flags: str) -> tuple[int, str]:
    """Run a launch that is expected to end by itself; returns its exit code and output."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *flags]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170
    )
    return done.returncode, done.stdout


def error_line(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("error: "))


def config_of(tmp_path: Path, tiny, **changes: object) -> Path:
    """A copy of a tiny model's folder with another configuration."""
    source = tiny("llama", dtype="float32")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def assert_refused(code: int, output: str, *words: str) -> None:
    line = error_line(output)
    assert code not in (0, None)
    assert all(word in line for word in words), line
    assert line.endswith(".") and "Load weight" not in output, "nothing was half-started"


def test_more_host_memory_than_the_machine_has(tiny):
    code, output = launch(
        tiny("llama", dtype="float32"), "--kv-policy", "arkvale", "--arkvale-host-memory", "99999"
    )
    assert_refused(code, output, "--arkvale-host-memory", "lower it")


def test_frames_that_one_request_cannot_fit(tiny):
    code, output = launch(
        tiny("llama", dtype="float32"), *POLICY, "--arkvale-device-tokens", "1024",
        "--arkvale-budget", "2048",
    )  # fmt: skip
    assert_refused(code, output, "--arkvale-device-tokens", "2080")


def test_too_many_dense_layers_and_indivisible_head_groups(tiny):
    model = tiny("llama", dtype="float32")
    code, output = launch(model, *POLICY, "--arkvale-dense-layers", "4")
    assert_refused(code, output, "--arkvale-dense-layers 4", "lower it below 4")
    code, output = launch(model, *POLICY, "--arkvale-head-groups", "3")
    assert_refused(code, output, "--arkvale-head-groups 3", "divisor of 2")


def test_a_latent_attention_model(tmp_path, tiny):
    model = config_of(
        tmp_path, tiny, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2",
        kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )  # fmt: skip
    assert_refused(*launch(model, *POLICY), "MLA", "--kv-policy full")


def test_a_sliding_window_model(tmp_path, tiny):
    model = config_of(
        tmp_path, tiny, architectures=["Gemma2ForCausalLM"], model_type="gemma2", sliding_window=64,
        query_pre_attn_scalar=64,
    )  # fmt: skip
    assert_refused(*launch(model, *POLICY), "sliding-window", "--kv-policy full")


def test_the_start_up_log_has_one_line_with_the_sizes_and_yaml_works(tiny, serve, tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("kv-policy: arkvale\narkvale-budget: 640\narkvale-host-memory: 0.25\n")
    server = serve(tiny("llama", dtype="float32"), "--config", str(path))
    lines = [line for line in server.log.read_text().splitlines() if "arkvale: " in line]
    assert len(lines) == 1
    for word in ("logical pages", "frames", "digests", "staging"):
        assert word in lines[0]
    assert generate(server, prompt(50, 1), 4)["output_ids"]
    assert server.arkvale()["settings"]["budget"] == 640


ENGINE = """
import json, sglang
if __name__ == "__main__":
    engine = sglang.Engine(
        model_path={model!r}, dtype="float32", random_seed=1, kv_policy="arkvale",
        arkvale_budget=512, arkvale_host_memory=0.25, arkvale_device_tokens=1024)
    sampling = dict(max_new_tokens=8, temperature=0, ignore_eos=True)
    out = engine.generate(input_ids={tokens}, sampling_params=sampling)
    state = engine.get_server_info()["internal_states"][0]["arkvale"]
    print("RESULT " + json.dumps([out["output_ids"], state["settings"]["budget"]]))
    engine.shutdown()
"""


def test_the_engine_takes_the_same_settings_by_name(tiny, serve, tmp_path):
    model, tokens = tiny("llama", dtype="float32"), prompt(300, 5)
    script = tmp_path / "engine.py"
    script.write_text(ENGINE.format(model=str(model), tokens=tokens))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=170,
        env={key: value for key, value in os.environ.items() if key != "ARKVALE_CONFIG"},
    )  # fmt: skip
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert result, done.stderr[-2000:]
    output, budget = json.loads(result[0].removeprefix("RESULT "))
    stock = serve(model, "--max-total-tokens", "8192")
    assert budget == 512
    assert output == generate(stock, tokens, 8)["output_ids"]
    with pytest.raises(KeyError):
        stock.arkvale()


def test_a_server_holds_the_bytes_that_were_planned(tiny, serve):
    """The command reads nothing but config.json; the server plans the same sizes, to which
    ``tests/core/test_sizing.py`` holds the store."""
    model = tiny("llama", dtype="float32")
    sizes = {
        "host_memory": 0.25, "device_tokens": 4096, "dense_layers": 1, "head_groups": 2,
        "digest_dtype": "fp8", "budget": 1024,
    }  # fmt: skip
    words = [f"--arkvale-{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    server = serve(model, "--kv-policy", "arkvale", *words)
    machine = Machine(64, 0.25, 100, 10, 0.85)
    shape = dataclasses.replace(Model.from_config(model), dtype=torch.float32)
    planned = expect(ArkValeConfig(**sizes), shape, 0, machine, Load(8192, 1, 0.9)).pool
    report = server.arkvale()
    assert report["bytes"] == planned.bytes
    assert report["logical_pages_total"] == planned.logical_pages
    assert report["frames_total"] == planned.frames * planned.geometry.lanes
