"""Attention in torch: the fused CPU kernel that also returns the log-sum-exp, else plain ops.

The query heads of one KV head are folded into the query length, so GQA repeats no key.
"""

from __future__ import annotations

import torch

from arkvale_kernels.layout import COPY_BYTES

_fused_cpu = torch._scaled_dot_product_flash_attention_for_cpu


def _attend(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, heads, length, head_dim]`` each -> output, log-sum-exp ``[rows, heads, length]``."""
    if query.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf).float()
    if query.device.type == "cpu":
        length = query.shape[2]
        if length == 1 and query.dtype.itemsize == 2:
            # In 16 bits the kernel takes half as long for two queries as it does for one.
            query = query.expand(-1, -1, 2, -1)
            mask = mask if mask is None else mask.expand(-1, -1, 2, -1)
        out, lse = _fused_cpu(query, k, v, 0.0, causal, attn_mask=mask, scale=scaling)
        return out[:, :, :length], lse[:, :, :length]
    logits = torch.matmul(query.float(), k.float().transpose(-1, -2)) * scaling
    if causal:
        length = query.shape[2]
        logits = logits + torch.full((length, length), -torch.inf, device=k.device).triu(1)
    if mask is not None:
        logits = logits + mask
    lse = logits.logsumexp(-1)
    return torch.matmul((logits - lse.unsqueeze(-1)).exp(), v.float()).to(query.dtype), lse


def attend_frames(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    common_length: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_frames`; lists are read in blocks."""
    rows, query_heads, head_dim = query.shape
    page_size, kv_heads = k_frames.shape[1:3]
    common, inside = common_length or 0, None
    if common:
        lane_frames = lane_frames[:, : -(-common // page_size)]
    if not common or lane_frames.amin() < 0:
        inside = _inside(lane_frames, lengths, page_size)
    folded = query.view(rows, kv_heads, query_heads // kv_heads, head_dim)
    held = k_frames.flatten(1), v_frames.flatten(1)
    block = max(1, COPY_BYTES // (rows * held[0].shape[1] * held[0].itemsize))
    whole = None
    for first in range(0, max(1, lane_frames.shape[1]), block):
        listed = lane_frames[:, first : first + block]
        if inside is None:
            part = _attend_whole(folded, held, listed, scaling, common - first * page_size)
        else:
            part = _attend_inside(folded, held, listed, scaling, inside[:, first : first + block])
        whole = part if whole is None else merge_parts(whole, part)
    assert whole is not None
    return whole[0].to(query.dtype).reshape(query.shape), whole[1].reshape(rows, query_heads)


def _attend_whole(
    query: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor],
    listed: torch.Tensor,
    scaling: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of ``[rows, pages]`` frames, as many in every row: no mask is needed.

    ``query`` is ``[rows, KV heads, queries, head_dim]``, ``held`` K and V as ``[frames, numbers]``.
    """
    rows, kv_heads, _, head_dim = query.shape
    k, v = (
        frames.index_select(0, listed.reshape(-1))
        .view(rows, -1, kv_heads, head_dim)[:, :length]
        .transpose(1, 2)
        for frames in held
    )
    return _attend(query, k, v, scaling)


def _attend_inside(
    query: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor],
    listed: torch.Tensor,
    scaling: float,
    inside: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of ``[rows, pages]`` frames that ``inside [rows, pages, page_size]`` says."""
    rows, kv_heads, queries, head_dim = query.shape
    shape = rows, -1, kv_heads, head_dim
    k, v = (pages.view(shape).transpose(1, 2) for pages in _read(held, listed, inside))
    mask = torch.zeros(inside.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(~inside, -torch.inf).view(rows, 1, 1, -1)
    out, lse = _attend(query, k, v, scaling, mask.expand(-1, kv_heads, queries, -1))
    empty = ~inside.flatten(1).any(1).view(rows, 1, 1)
    return out.masked_fill(empty.unsqueeze(3), 0.0), lse.masked_fill(empty, -torch.inf)


def _inside(lane_frames: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """``[rows, pages, page_size]`` bool: the tokens that a row attends to."""
    rows, pages = lane_frames.shape
    inside = torch.arange(pages * page_size, device=lengths.device) < lengths.unsqueeze(1)
    return inside.view(rows, pages, page_size) & (lane_frames >= 0).unsqueeze(-1)


def _read(
    both: tuple[torch.Tensor, torch.Tensor], lane_frames: torch.Tensor, inside: torch.Tensor
) -> list[torch.Tensor]:
    """Copy the frames of every row, zeros where ``inside [rows, pages, page_size]`` is false.

    What stands there is what another request left, and a mask on the logits would let its NaN
    through.  A list's entries beyond its length are no frames at all, so frame 0 is read instead.
    """
    listed = lane_frames.masked_fill(~inside.any(2), 0).reshape(-1)
    inside = inside.flatten(0, 1)
    partial = (~inside.all(1)).nonzero().squeeze(1)
    outside = ~inside.index_select(0, partial).unsqueeze(-1)
    found = []
    for frames in both:
        pages = frames.index_select(0, listed)
        tokens = pages.index_select(0, partial).unflatten(1, (inside.shape[1], -1))
        pages.index_copy_(0, partial, tokens.masked_fill_(outside, 0.0).flatten(1))
        found.append(pages)
    return found


def attend_part(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_part`."""
    tokens, query_heads, head_dim = query.shape
    kv_heads = k.shape[1]
    folded = query.view(tokens, kv_heads, query_heads // kv_heads, head_dim)
    folded = folded.permute(1, 2, 0, 3).flatten(1, 2)
    out, lse = _attend(
        folded.unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), scaling
    )
    out = out.reshape(query_heads, tokens, head_dim).transpose(0, 1)
    return out, lse.reshape(query_heads, tokens).transpose(0, 1)


def attend_chunk(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.attend_chunk`."""
    repeats = query.shape[1] // k.shape[1]
    k, v = (kv.transpose(0, 1).unsqueeze(0) for kv in (k, v))
    if repeats > 1:
        k, v = (kv.repeat_interleave(repeats, 1) for kv in (k, v))
    out, lse = _attend(query.transpose(0, 1).unsqueeze(0), k, v, scaling, causal=True)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def merge_parts(
    part: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.attend.api.merge_parts`."""
    total = torch.logaddexp(part[1], other[1])
    # Where neither part has a key, minus infinity less itself would be NaN; and a part of weight 0
    # may hold anything.
    shift = total.masked_fill(total == -torch.inf, 0.0)
    weighed = []
    for out, lse in (part, other):
        weight = (lse - shift).exp().unsqueeze(-1)
        weighed.append((out.float() * weight).masked_fill_(weight == 0, 0.0))
    return weighed[0] + weighed[1], total
