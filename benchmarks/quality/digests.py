"""How well digests find the pages that attention wants, on the model's own queries and keys.

For every answer token of a chat over a long context, pages are ranked by the attention they truly
get and by their digests' scores; the overlap of the two top-k sets is ArkVale's Figure 7.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkvale_kernels.digest import build_digests
from arkvale_kernels.score import score_pages
from arkvale_sglang.config.settings import DIGESTS, HEAD_REDUCES
from arkvale_sglang.runtime.dropping import ALL_SEALED
from needle_model import text
from quality import tasks

PAGE, MOST = 32, 40


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
    """Share of the k pages with most attention that a digest's k best pages hold, for each k."""
    query, keys = part["q"], part["k"]
    steps, heads, head_dim = query.shape
    pages = keys.shape[0] // PAGE
    kv_heads = keys.shape[1]
    keys = keys[: pages * PAGE]
    scaling = head_dim**-0.5
    grouped = query.view(steps, kv_heads, heads // kv_heads, head_dim)
    weights = torch.einsum("sghd,tgd->sght", grouped, keys).mul(scaling).softmax(-1)
    mass = weights.view(steps, heads, pages, PAGE).sum(-1).mean(1)
    truth = mass.argsort(dim=1, descending=True)
    table = torch.arange(pages + 1, dtype=torch.int32).expand(steps, -1).contiguous()
    counts = torch.full((steps,), pages + 1, dtype=torch.int32)
    rows = []
    for digest in DIGESTS:
        built = build_digests(keys.view(pages, PAGE, kv_heads, head_dim), digest, torch.float32)
        built = torch.cat([built, built[:1]])
        for reduce in HEAD_REDUCES:
            scores = score_pages(
                query, built, torch.full((pages + 1,), -1, dtype=torch.int32), table,
                counts, ALL_SEALED, head_reduce=reduce, scaling=scaling,
            )[:, :pages]  # fmt: skip
            guess = scores.argsort(dim=1, descending=True)
            for k in range(1, MOST + 1):
                same = (guess[:, :k, None] == truth[:, None, :k]).any(1).float().mean()
                rows.append(
                    {
                        "layer": int(part["layer"]),
                        "digest": digest,
                        "head_reduce": reduce,
                        "k": k,
                        "overlap": round(same.item(), 4),
                    }
                )
    return rows


def study(model: Path, out: Path, length: int, contexts: int = 2) -> None:
    """Write ``digests.csv``: layer, digest, head_reduce, k, overlap; the mean over contexts."""
    print("\ndigest study ...", flush=True)
    total: dict[tuple[Any, ...], list[float]] = {}
    for part in record(model, length, contexts):
        for row in overlaps(part):
            key = (row["layer"], row["digest"], row["head_reduce"], row["k"])
            total.setdefault(key, []).append(row["overlap"])
    with (out / "digests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "digest", "head_reduce", "k", "overlap"])
        for key, values in total.items():
            writer.writerow([*key, round(sum(values) / len(values), 4)])
