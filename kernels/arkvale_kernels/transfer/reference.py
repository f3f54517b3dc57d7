"""Transfers in plain torch; see ``api.py`` for shapes."""

from __future__ import annotations

import torch

from arkvale_kernels.digest.reference import build_digests
from arkvale_kernels.layout import SCORE_BITS, NewTokens, PagedLayer, Recalls
from arkvale_kernels.profile import part
from arkvale_kernels.residency.reference import find_places


def write_tokens(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    places: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.write_tokens`."""
    k_frames.flatten(0, 1).index_copy_(0, places, k)
    v_frames.flatten(0, 1).index_copy_(0, places, v)


def move_pages(
    layer: PagedLayer,
    new: NewTokens | None,
    recalls: Recalls | None,
    clock: torch.Tensor,
    digest: str,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.move_pages`."""
    if new is not None:
        with part("append"):
            _append(layer, new, clock, digest)
    if recalls is not None:
        with part("recall"):
            _recall(layer, recalls)


def _append(layer: PagedLayer, new: NewTokens, clock: torch.Tensor, digest: str) -> None:
    """Write the new tokens and seal the pages that they fill."""
    places = new.places
    if places is None:
        table = layer.residency.frame_of.unsqueeze(0)
        places = find_places(table, new.lane_pages, new.offsets, *layer.k_frames.shape[:2])[0]
    write_tokens(layer.k_frames, layer.v_frames, places, new.k, new.v)
    if not new.fills:
        return
    full = (new.offsets == layer.k_frames.shape[1] - 1) & (new.lane_pages > 0)
    sealing = new.lane_pages.masked_select(full)
    if sealing.numel():
        seal_frames(layer, sealing, clock, digest)


def _recall(layer: PagedLayer, recalls: Recalls) -> None:
    pages, frames = recalls.filled()
    if pages.numel() == 0:
        return
    host, device = layer.host, layer.k_frames.device
    backups = host.index_select(0, pages.to(host.device)).to(device)
    _put(layer.k_frames, frames.long(), backups[:, 0])
    _put(layer.v_frames, frames.long(), backups[:, 1])


def _words(*held: torch.Tensor) -> list[torch.Tensor]:
    """``[pages, ...]`` each as rows of 8-byte words, where all are made of such: torch copies them
    several times faster than rows of 2-byte elements."""
    flat = [pages.flatten(1) for pages in held]
    whole = all(
        pages.itemsize * count % 8 == 0
        for pages in flat
        for count in (pages.shape[1], pages.storage_offset())
    )
    return [pages.view(torch.int64) for pages in flat] if whole else flat


def _put(target: torch.Tensor, index: torch.Tensor, pages: torch.Tensor) -> None:
    rows, new = _words(target, pages)
    rows.index_copy_(0, index, new)


def seal_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    first_tokens: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    digest: str,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.seal_pages`."""
    page_size, heads = layer.k_frames.shape[1:3]
    within = torch.arange(page_size, device=k.device)
    tokens = (first_tokens.unsqueeze(1) + within).flatten()
    whole_k, whole_v = (
        part.index_select(0, tokens)
        .unflatten(0, (-1, page_size))
        .unflatten(2, (-1, heads))
        .transpose(1, 2)
        .flatten(0, 1)
        for part in (k, v)
    )
    _seal(layer, lane_pages, whole_k, whole_v, digest)
    frames = layer.residency.frame_of.index_select(0, lane_pages).long()
    frames = frames.masked_fill_(frames < 0, layer.k_frames.shape[0] - 1)
    _put(layer.k_frames, frames, whole_k)
    _put(layer.v_frames, frames, whole_v)


def seal_frames(
    layer: PagedLayer, lane_pages: torch.Tensor, clock: torch.Tensor, digest: str
) -> None:
    """See :func:`arkvale_kernels.transfer.api.seal_frames`."""
    frames = layer.residency.frame_of.index_select(0, lane_pages).long()
    k, v = layer.k_frames.index_select(0, frames), layer.v_frames.index_select(0, frames)
    _seal(layer, lane_pages, k, v, digest)
    layer.residency.heat.index_copy_(0, frames, (clock << SCORE_BITS).expand(frames.shape[0]))


def _seal(
    layer: PagedLayer, lane_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor, digest: str
) -> None:
    """K and V of whole pages, ``[pages, page_size, lane heads, head_dim]``."""
    digests, pages = build_digests(k, digest, layer.digests.dtype), lane_pages.long()
    if digests.dtype.itemsize == 1:  # torch scatters no 8-bit floats
        layer.digests.view(torch.uint8).index_copy_(0, pages, digests.view(torch.uint8))
    else:
        layer.digests.index_copy_(0, pages, digests)
    target = pages.to(layer.host.device)
    _put(layer.host[:, 0], target, k.to(layer.host.device))
    _put(layer.host[:, 1], target, v.to(layer.host.device))


def gather_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    groups: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """See :func:`arkvale_kernels.transfer.api.gather_pages`."""
    frames = layer.residency.frame_of.index_select(0, lane_pages)
    absent = frames < 0
    rows = frames.masked_fill(absent, layer.k_frames.shape[0] - 1)
    evicted = absent.nonzero().squeeze(1)
    source = lane_pages.index_select(0, evicted).to(layer.host.device)
    for half, (kept, staged) in enumerate(zip((layer.k_frames, layer.v_frames), out, strict=True)):
        pages = staged.view(-1, *kept.shape[1:]) if groups == 1 else None
        pages = torch.index_select(kept, 0, rows, out=pages)
        if evicted.numel():
            backups, target = _words(layer.host[:, half], pages)
            target.index_copy_(0, evicted, backups.index_select(0, source).to(pages.device))
        if groups > 1:
            lanes = pages.unflatten(0, (-1, groups)).transpose(1, 2)
            staged.view(lanes.shape).copy_(lanes)
