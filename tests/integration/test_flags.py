"""Flags as a user meets them: parsed by SGLang's own parser, refused in one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.integration import flags

load_plugins()
SETTINGS = {
    field.name: field.default
    for field in dataclasses.fields(ArkValeConfig)
    if field.name not in ("page_size", "policy")  # SGLang's own, and a request's alone
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv(flags.CONFIG_ENV, raising=False)


def parse(*arguments: str) -> ServerArgs:
    return prepare_server_args(["--model-path", "nowhere", *arguments])


def test_all_flags_are_listed_with_their_defaults():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = " ".join(parser.format_help().split())
    for name in SETTINGS:
        assert f"--arkvale-{name.replace('_', '-')}" in text
    assert "(default: 4096)" in text and "--kv-policy {full,arkvale}" in text


def test_the_policy_reaches_child_processes_and_sets_what_it_needs():
    args = parse("--kv-policy", "arkvale", "--arkvale-budget", "512", "--arkvale-recall-cap", "3")
    assert flags.current_config() == ArkValeConfig(budget=512, recall_cap=3)
    assert args.page_size == 32
    assert args.attention_backend == flags.attention_backend()


def test_full_is_exactly_stock_sglang():
    assert parse("--kv-policy", "full") == parse()
    assert flags.CONFIG_ENV not in os.environ
    assert parse().page_size is None and parse().attention_backend is None


def test_full_after_arkvale_forgets_the_policy():
    parse("--kv-policy", "arkvale")
    parse("--kv-policy", "full")
    assert flags.current_config() is None


def test_yaml_config_takes_the_flags(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("kv-policy: arkvale\narkvale-budget: 640\narkvale-digest: mean-std\n")
    parse("--config", str(path))
    assert flags.current_config() == ArkValeConfig(budget=640, digest="mean-std")


def test_settings_survive_the_environment():
    config = ArkValeConfig(budget=999, host_memory=0.5, head_groups=2, page_size=16)
    assert ArkValeConfig.from_json(json.dumps(json.loads(config.to_json()))) == config


REFUSED = [
    (["--arkvale-budget", "100"], "--arkvale-budget 100"),
    (["--arkvale-top-k", "5000"], "--arkvale-top-k 5000"),
    (["--page-size", "1"], "page size 1"),
    (["--page-size", "128"], "page size 128"),
    (["--arkvale-window-pages", "0"], "--arkvale-window-pages"),
    (["--arkvale-host-memory", "-1"], "--arkvale-host-memory"),
    (["--arkvale-device-tokens", "8"], "--arkvale-device-tokens"),
    (["--speculative-algorithm", "EAGLE"], "speculative decoding"),
    (["--enable-hierarchical-cache"], "HiCache"),
    (["--enable-lmcache"], "LMCache"),
    (["--tp-size", "2", "--nnodes", "2"], "several machines (--nnodes)"),
    (["--pp-size", "2"], "pipeline parallelism"),
    (["--kv-cache-dtype", "fp8_e5m2"], "quantised KV cache"),
    (["--disaggregation-mode", "prefill"], "disaggregation"),
    (["--enable-mixed-chunk"], "mixed chunks"),
    (["--dp-size", "2"], "run one server per replica behind SGLang's router"),
    (["--use-ray"], "Ray"),
    (["--enable-streaming-session"], "streaming sessions"),
    (["--attention-backend", "triton"], "--attention-backend triton"),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_in_one_sentence(arguments, named):
    with pytest.raises(SystemExit) as refusal:
        parse("--kv-policy", "arkvale", *arguments)
    message = str(refusal.value)
    assert message.startswith("error: ") and named in message
    assert message.endswith(".") and message.count(". ") == 0 and "\n" not in message
    assert refusal.value.code != 0
    assert flags.current_config() is None, "nothing is half-started"


def test_an_unknown_digest_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as refusal:
        parse("--kv-policy", "arkvale", "--arkvale-digest", "sphere")
    assert refusal.value.code != 0
    assert "cuboid-mean" in capsys.readouterr().err


def test_a_policy_flag_without_the_policy_is_refused():
    with pytest.raises(SystemExit, match="--arkvale-budget has no effect"):
        parse("--arkvale-budget", "512")


def test_engine_settings_are_checked_by_the_same_rules():
    settings = {"model_path": "m", "kv_policy": "arkvale", "arkvale_budget": 512}
    assert flags.take_policy(settings) == ArkValeConfig(budget=512)
    assert set(settings) == {"model_path", "page_size", "attention_backend"}
    with pytest.raises(ArkValeError, match="unknown arkvale setting 'budgets'"):
        flags.take_policy({"kv_policy": "arkvale", "arkvale_budgets": 512})


def test_a_setting_that_a_release_lacks_is_no_reason_to_refuse():
    flags.take_policy({"model_path": "m", "kv_policy": "arkvale"})


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_device_named_decides_on_the_backend(monkeypatch, has_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    found = {}
    for device in ("cpu", "cuda", None):
        settings = {"model_path": "m", "kv_policy": "arkvale", "device": device}
        flags.take_policy(settings)
        found[device] = settings["attention_backend"]
    left_open = "arkvale" if has_gpu else "torch_native"
    assert found == {"cpu": "torch_native", "cuda": "arkvale", None: left_open}


def test_the_page_of_flags_lists_each_once_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs/flags.md").read_text()
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    names = [f"arkvale-{name.replace('_', '-')}" for name in SETTINGS]
    assert sorted(name for name, *_ in rows) == sorted(["kv-policy", *names])
    for name, _, default in rows:
        value = SETTINGS.get(name.removeprefix("arkvale-").replace("-", "_"))
        if value not in (None, False) and name != "kv-policy":
            assert default.strip("`") == str(value).removesuffix(".0"), name
