"""How well digests find the pages that attention wants, on the model's own queries and keys.

For every answer token of a chat over a long context, pages are ranked by the attention they truly
get and by their digests' scores; the overlap of the two top-k sets is ArkVale's Figure 7.  Beside
it stands how much of the attention that k pages can get the estimated ones do get.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkvale_kernels.digest import build_digests
from arkvale_kernels.layout import SelectionRule
from arkvale_kernels.score import score_pages
from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES, ArkValeConfig
from needle_model import text
from quality import tasks

PAGE, MOST = 32, 40
RULE = SelectionRule(budget=5, must=1, sinks=ArkValeConfig.sink_pages, window=2)
"""What competes is all that matters of it here: everything but sinks and window."""


def record(model_path: Path, length: int, contexts: int) -> list[dict[str, torch.Tensor]]:
    """Queries of answer tokens and all keys of each layer: ``[tokens, heads, head_dim]``."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found: list[dict[str, torch.Tensor]] = []

    def attend(
        module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        found.append({name: x[0].transpose(0, 1).contiguous() for name, x in (("q", q), ("k", k))})
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("record", attend)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="record"
    ).eval()
    writer = text.Writer(tokenizer)
    paths = [
        [e for e in tasks.many(writer, length, seed, asked=2) if e.task == "path"][:2]
        for seed in range(contexts)
    ]
    layers: list[dict[str, torch.Tensor]] = []
    for episode in (episode for some in paths for episode in some):
        turn = episode.turns[0]
        answer = " ".join(turn.expected)
        messages = [{"role": "user", "content": turn.message}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        tokens = tokenizer.encode(prompt + answer, add_special_tokens=False)
        found.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens]))
        layers += [
            {"layer": torch.tensor(i), "q": part["q"][start:], "k": part["k"][:start]}
            for i, part in enumerate(found)
        ]
    return layers


def overlaps(part: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Overlap and kept attention of one layer, for every digest, head reduction and k.

    Sinks and window, which every row attends to, take no part.
    """
    query, keys = part["q"], part["k"]
    steps, _, head_dim = query.shape
    pages, kv_heads = keys.shape[0] // PAGE, keys.shape[1]
    keys = keys[: pages * PAGE].view(pages, PAGE, kv_heads, head_dim)
    competing = slice(RULE.sinks, pages + 1 - RULE.window)
    mass = _page_mass(query, keys)[:, competing]
    truth = mass.argsort(dim=1, descending=True)
    table = torch.arange(pages + 1, dtype=torch.int32).expand(steps, -1).contiguous()
    counts = torch.full((steps,), pages + 1, dtype=torch.int32)
    absent = torch.full((pages + 1,), -1, dtype=torch.int32)
    rows = []
    for digest in DIGESTS:
        digests = build_digests(keys, digest, torch.float32)
        digests = torch.cat([digests, digests[:1]])  # the open page has none; it never competes
        for reduce in HEAD_REDUCES:
            scores = score_pages(
                query, digests, absent, table, counts, RULE,
                head_reduce=reduce, scaling=head_dim**-0.5,
            )  # fmt: skip
            guess = scores[:, competing].argsort(dim=1, descending=True)
            for k in range(1, MOST + 1):
                same = (guess[:, :k, None] == truth[:, None, :k]).any(1).float().mean()
                kept, most = (mass.gather(1, best[:, :k]).sum(1) for best in (guess, truth))
                rows.append(
                    {
                        "layer": int(part["layer"]),
                        "digest": digest,
                        "head_reduce": reduce,
                        "k": k,
                        "overlap": same.item(),
                        "kept": (kept / most).mean().item(),
                    }
                )
    return rows


def _page_mass(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[steps, pages]`` attention that each page gets, mean over query heads."""
    steps, heads, head_dim = query.shape
    pages, _, kv_heads, _ = keys.shape
    grouped = query.view(steps, kv_heads, heads // kv_heads, head_dim)
    logits = torch.einsum("sghd,tgd->sght", grouped, keys.flatten(0, 1)) * head_dim**-0.5
    return logits.softmax(-1).view(steps, heads, pages, PAGE).sum(-1).mean(1)


def study(model: Path, out: Path, length: int, contexts: int) -> None:
    """Write ``digests.csv``: layer, digest, head_reduce, k, overlap, kept; means over texts."""
    print("\ndigest study ...", flush=True)
    total: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for part in record(model, length, contexts):
        for row in overlaps(part):
            key = (row["layer"], row["digest"], row["head_reduce"], row["k"])
            total.setdefault(key, []).append((row["overlap"], row["kept"]))
    with (out / "digests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "digest", "head_reduce", "k", "overlap", "kept"])
        for key, values in total.items():
            means = (sum(value) / len(value) for value in zip(*values, strict=True))
            writer.writerow([*key, *(round(mean, 4) for mean in means)])
