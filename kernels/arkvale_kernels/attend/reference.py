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
    """See :func:`arkvale_kernels.attend.api.attend_frames`."""
    page_size = k_frames.shape[1]
    if common_length:
        lane_frames = lane_frames[:, : -(-common_length // page_size)]
        if lane_frames.amin() >= 0:
            return _attend_whole(query, k_frames, v_frames, lane_frames, scaling, common_length)

    rows, query_heads, head_dim = query.shape
    kv_heads = k_frames.shape[2]
    folded = query.view(rows, kv_heads, query_heads // kv_heads, head_dim)
    shape = rows, -1, kv_heads, head_dim
    inside = _inside(lane_frames, lengths, page_size)
    k, v = (
        held.view(shape).transpose(1, 2)
        for held in _read((k_frames, v_frames), lane_frames, inside)
    )
    mask = torch.zeros(inside.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(~inside, -torch.inf).view(rows, 1, 1, -1)
    out, lse = _attend(folded, k, v, scaling, mask.expand(-1, kv_heads, folded.shape[2], -1))
    empty = ~inside.flatten(1).any(1)
    out = out.reshape(query.shape).masked_fill(empty.view(rows, 1, 1), 0.0)
    return out, lse.reshape(rows, query_heads).masked_fill(empty.view(rows, 1), -torch.inf)


def _attend_whole(
    query: torch.Tensor,
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    scaling: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length without a gap: no mask is needed.

    Long lists are read in blocks of ``COPY_BYTES``.
    """
    rows, query_heads, head_dim = query.shape
    page_size, kv_heads = k_frames.shape[1:3]
    folded = query.view(rows, kv_heads, query_heads // kv_heads, head_dim)
    page_bytes = rows * k_frames[0].numel() * k_frames.itemsize
    block = max(1, COPY_BYTES // page_bytes)
    whole = None
    for first in range(0, lane_frames.shape[1], block):
        listed = lane_frames[:, first : first + block].reshape(-1)
        k, v = (
            frames.flatten(1)
            .index_select(0, listed)
            .view(rows, -1, kv_heads, head_dim)[:, : length - first * page_size]
            .transpose(1, 2)
            for frames in (k_frames, v_frames)
        )
        out, lse = _attend(folded, k, v, scaling)
        part = out.reshape(query.shape), lse.reshape(rows, query_heads)
        whole = part if whole is None else merge_parts(whole, part)
    assert whole is not None
    return whole[0].to(query.dtype), whole[1]


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
        pages = frames.flatten(1).index_select(0, listed)
        tokens = pages.index_select(0, partial).unflatten(1, (frames.shape[1], -1))
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
