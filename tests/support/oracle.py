"""An independent reading of the formulas, in float64 numpy, one page or one head at a time.

Shares no code with the implementation and imports none of it.
"""

from __future__ import annotations

import numpy as np


def digests(keys: np.ndarray, kind: str) -> np.ndarray:
    """``[pages, page_size, heads, dim]`` -> ``[pages, (upper, lower), heads, dim]``."""
    result = np.empty((keys.shape[0], 2, *keys.shape[2:]))
    for page, held in enumerate(keys):
        center = (held.max(0) + held.min(0)) / 2
        away = np.abs(held - center)
        if kind == "cuboid-max":
            radius = away.max(0)
        elif kind == "cuboid-mean":
            radius = away.mean(0)
        elif kind == "cuboid-center":
            radius = (away.max(0) + away.min(0)) / 2
        elif kind == "mean-std":
            center, radius = held.mean(0), held.std(0)
        else:
            raise AssertionError(kind)
        result[page] = center + radius, center - radius
    return result


def page_scores(
    query: np.ndarray, digest: np.ndarray, candidates: list[int], reduce: str, scaling: float
) -> dict[int, float]:
    """Score of each candidate page for one lane: ``query [query heads, dim]``,
    ``digest [pages, 2, KV heads, dim]``."""
    if not candidates:
        return {}
    per_kv = query.shape[0] // digest.shape[2]
    by_head = np.zeros((query.shape[0], len(candidates)))
    for head, q in enumerate(query):
        for place, page in enumerate(candidates):
            upper, lower = digest[page, 0, head // per_kv], digest[page, 1, head // per_kv]
            by_head[head, place] = sum(
                max(a * b, a * c) for a, b, c in zip(q, upper, lower, strict=True)
            )
    if reduce == "mean":
        scores = by_head.mean(0)
    elif reduce == "max":
        scores = by_head.max(0)
    else:
        shifted = np.exp(scaling * (by_head - by_head.max(1, keepdims=True)))
        scores = (shifted / shifted.sum(1, keepdims=True)).mean(0)
    return dict(zip(candidates, scores, strict=True))


def select(
    pages: int,
    scores: dict[int, float],
    resident: set[int],
    *,
    budget: int,
    sinks: int,
    window: int,
    must: int,
    cap: int | None = None,
) -> set[int]:
    """Indices of the pages a row attends to, by the rule read aloud."""
    if pages <= budget:
        ranked = list(range(pages - 1))
        wanted = ranked
    else:
        forced = [page for page in range(pages - 1) if page < sinks or page >= pages - window]
        others = sorted(scores, key=lambda page: -scores[page])
        wanted = forced + others[:must]
        ranked = forced + others
    missing = [page for page in wanted if page not in resident]
    if cap is not None:
        scored = [page for page in missing if pages > budget and page not in forced]
        missing = [page for page in missing if page not in scored[cap:]]
    chosen = [page for page in wanted if page in resident or page in missing]
    fill = [page for page in ranked if page in resident]
    if cap is None:
        fill += [page for page in ranked if page not in resident]
    for page in fill:
        if len(chosen) >= budget - 1:
            break
        if page not in chosen:
            chosen.append(page)
    return {*chosen, pages - 1}


def attention(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, scaling: float
) -> np.ndarray:
    """One query ``[query heads, dim]`` over ``[tokens, KV heads, dim]``."""
    per_kv = query.shape[0] // keys.shape[1]
    out = np.empty((query.shape[0], values.shape[2]))
    for head, q in enumerate(query):
        logits = keys[:, head // per_kv] @ q * scaling
        weights = np.exp(logits - logits.max())
        out[head] = weights @ values[:, head // per_kv] / weights.sum()
    return out


def attention_over_pages(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    chosen: list[int] | None,
    page_size: int,
    scaling: float,
) -> np.ndarray:
    """Attention over some pages of a sequence (all of them for ``None``)."""
    tokens = np.arange(keys.shape[0])
    if chosen is not None:
        tokens = tokens[np.isin(tokens // page_size, chosen)]
    return attention(query, keys[tokens], values[tokens], scaling)


def causal_attention(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, prefix: int, scaling: float
) -> np.ndarray:
    """Queries ``[tokens, query heads, dim]`` that follow ``prefix`` tokens of the sequence."""
    per_kv = query.shape[1] // keys.shape[1]
    unseen = np.arange(len(keys)) > prefix + np.arange(len(query))[:, None]
    out = np.empty((*query.shape[:2], values.shape[2]))
    for head in range(query.shape[1]):
        logits = np.einsum("qd,kd->qk", query[:, head], keys[:, head // per_kv]) * scaling
        logits[unseen] = -np.inf
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[:, head] = np.einsum("qk,kd->qd", weights, values[:, head // per_kv])
    return out
