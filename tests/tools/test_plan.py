"""``arkvale plan`` computes what a server would hold, and says what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import planning
from arkvale_sglang.cli import main as command
from arkvale_sglang.cli.plan import Load, Machine, Model, expect, flags
from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples/needle_model/model"
MACHINE = Machine(80, 64, 3000, 50, 0.85)
MODEL = planning.MODELS["8B (Llama 3.1)"]
WEIGHTS = 16 * 10**9


def plan(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["arkvale", "plan", *words])
    code = command.main()
    return code, *capsys.readouterr()


FLAGS = (
    "--device-memory", "80", "--host-memory", "64", "--device-bandwidth", "3000",
    "--link-bandwidth", "50", "--context", "131072",
)  # fmt: skip


def test_a_config_gives_the_parameters_that_the_model_has():
    model = Model.from_config(NEEDLE)
    real = AutoModelForCausalLM.from_pretrained(NEEDLE)
    norms = sum(w.numel() for name, w in real.named_parameters() if "norm" in name)
    assert model.parameters == sum(w.numel() for w in real.parameters()) - norms
    assert (model.kv_heads, model.head_dim, model.dtype) == (2, 64, torch.bfloat16)


def test_recall_pays_while_links_and_hits_are_what_they_are():
    config = ArkValeConfig(host_memory=64)
    long = Load(context=131_072, concurrency=4, hit_rate=0.95)
    expected = expect(config, MODEL, WEIGHTS, MACHINE, long)
    pages, geometry = config.budget_pages, expected.pool.geometry
    assert expected.recalled_bytes == pytest.approx(4 * 0.05 * pages * geometry.page_host_bytes)
    token = geometry.page_host_bytes + geometry.page_dense_bytes
    whole = WEIGHTS + 4 * 131_072 * token / config.page_size
    assert expected.full_ms == pytest.approx(whole / 3000e6)
    assert expected.arkvale_ms < expected.full_ms
    all_hits = expect(config, MODEL, WEIGHTS, MACHINE, dataclasses.replace(long, hit_rate=1.0))
    assert all_hits.recalled_bytes == 0
    gained = expected.recalled_bytes / 50e6
    assert expected.arkvale_ms - all_hits.arkvale_ms == pytest.approx(gained)


def test_a_context_within_the_budget_recalls_and_scans_nothing():
    expected = expect(
        ArkValeConfig(host_memory=64), MODEL, WEIGHTS, MACHINE, Load(4096, 1, hit_rate=0.5)
    )
    assert expected.recalled_bytes == 0
    assert expected.arkvale_ms == pytest.approx(expected.full_ms, rel=1e-3)


def test_what_has_a_frame_is_scanned_and_not_recalled():
    config = ArkValeConfig(host_memory=8)
    expected = expect(config, MODEL, WEIGHTS, MACHINE, Load(32_768, 1, hit_rate=0.5))
    assert expected.pool.fits and expected.recalled_bytes == 0
    within = expect(config, MODEL, WEIGHTS, MACHINE, Load(4096, 1, hit_rate=0.5))
    assert expected.arkvale_ms > within.arkvale_ms


def test_it_prints_sizes_and_the_flags_to_serve_with(monkeypatch, capsys):
    code, out, _ = plan(monkeypatch, capsys, str(NEEDLE), *FLAGS, "--dense-layers", "0")
    assert code == 0
    for word in ("logical pages", "digests", "requests of 131,072 tokens", "--kv-policy arkvale"):
        assert word in out
    assert "--arkvale-dense-layers 0" in out and "--arkvale-top-k" not in out


def test_ranks_share_the_heads_and_the_host_memory(monkeypatch, capsys):
    """Two ranks of half the heads hold as many pages as one, each in half the bytes."""
    words = (str(NEEDLE), *FLAGS, "--dense-layers", "0")
    alone, both = (plan(monkeypatch, capsys, *words, *tp)[1] for tp in ((), ("--tp", "2")))
    assert both.startswith("  on each of 2 ranks\n") and both.rstrip().endswith("--tp 2")

    def value(text: str, name: str) -> str:
        return next(line for line in text.splitlines() if line.startswith(f"  {name} ")).split()[-2]

    assert value(alone, "logical pages") == value(both, "logical pages")
    host = "host memory for backups"
    assert float(value(alone, host)) == pytest.approx(64, abs=0.01)
    assert float(value(both, host)) == pytest.approx(32, abs=0.01)
    for text in (alone, both):
        named = re.search(r"--arkvale-host-memory (\S+)", text)[1]
        assert float(named) == pytest.approx(64, abs=0.01), "the flag is of the whole server"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((str(NEEDLE), "--tp", "3"), "--tp-size 3 does not share the model's 2 KV heads"),
        (("nowhere",), "cannot be read as a model's config.json"),
        ((str(NEEDLE), "--budget", "32"), "--arkvale-budget 32 leaves no page"),
        ((str(NEEDLE), "--dense-layers", "3"), "leaves none of the model's 3 layers"),
        ((str(NEEDLE), "--hit-rate", "1.5"), "--hit-rate is 1.5; make it a share"),
        ((str(NEEDLE), "--tp", "0"), "--tp is 0; make it positive"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(monkeypatch, capsys, words, said):
    code, out, err = plan(monkeypatch, capsys, *words, *FLAGS)
    assert code == 1 and out == "" and err.startswith("error: ") and said in err


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(ArkValeError, match="leave nothing of 80 GiB"):
        expect(ArkValeConfig(), MODEL, 80 * 10**9, MACHINE, Load(1024, 1, 1.0))


def test_a_config_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    with pytest.raises(ArkValeError, match="num_attention_heads"):
        Model.from_config(tmp_path)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"num_local_experts": 8}, "experts"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "beside full attention"),
    ],
)
def test_a_model_whose_weights_or_cache_it_cannot_count_is_refused(tmp_path, extra, said):
    config = json.loads((NEEDLE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **extra}))
    with pytest.raises(ArkValeError, match=said):
        Model.from_config(tmp_path)


def test_quantised_weights_keep_their_embeddings():
    """8B: 1.05 of 8.03 billion parameters are embeddings, of 2 bytes each."""
    assert MODEL.weight_bytes("int4", 1) == pytest.approx(0.5 * 6.979e9 + 2 * 1.051e9, rel=1e-3)
    assert MODEL.weight_bytes("bfloat16", 2) == MODEL.parameters


@pytest.mark.parametrize("host", [64.0, 128.0, 37.123456])
def test_the_flags_hold_as_many_pages_as_were_planned(host):
    config = ArkValeConfig(host_memory=host)
    machine = dataclasses.replace(MACHINE, host_memory=host + 1)
    expected = expect(config, MODEL, WEIGHTS, machine, Load(131_072, 1, 0.95))
    named = re.search(r"--arkvale-host-memory (\S+)", flags(config, expected, machine, 1))[1]
    again = dataclasses.replace(config, host_memory=float(named))
    pool = expect(again, MODEL, WEIGHTS, machine, Load(131_072, 1, 0.95)).pool
    assert pool.logical_pages == expected.pool.logical_pages


def test_more_requests_than_fit_are_called_that(monkeypatch, capsys):
    words = (str(NEEDLE), *FLAGS, "--dense-layers", "0", "--concurrency")
    assert "(do not fit)" in plan(monkeypatch, capsys, *words, "100000")[1]
    assert "(do not fit)" not in plan(monkeypatch, capsys, *words, "1")[1]


def test_the_page_is_what_the_code_computes(tmp_path, monkeypatch):
    page = shutil.copy(ROOT / "docs/planning.md", tmp_path)
    monkeypatch.setattr(sys, "argv", ["planning.py", "--docs", str(tmp_path)])
    assert planning.main() == 0
    assert Path(page).read_text() == (ROOT / "docs/planning.md").read_text()
