"""Residency tables in plain torch; see ``api.py`` for shapes and the meaning of heat."""

from __future__ import annotations

import torch

from arkvale_kernels.layout import FREE, PINNED, SCORE_BITS, FrameLists, Recalls, Residency


def heat_of(scores: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
    """The clock above the score's leading bits, in an order that integers understand."""
    bits = scores.contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - SCORE_BITS)
    return ordered.long() + ((clock << SCORE_BITS) + (1 << (SCORE_BITS - 1)))


def resolve_pages(
    residency: Residency,
    lane_pages: torch.Tensor,
    scores: torch.Tensor | None,
    clock: torch.Tensor,
    counts: torch.Tensor,
    groups: int,
    lists: FrameLists | None,
) -> tuple[torch.Tensor, Recalls]:
    """See :func:`arkvale_kernels.residency.api.resolve_pages`; where frames are short the
    warmest misses get them."""
    frame_of, heat = residency.frame_of, residency.heat
    flat = lane_pages.reshape(-1)
    frames = frame_of.index_select(0, flat)
    missing = (frames < 0) & (flat > 0)
    scratch = heat.shape[0] - 1
    touched = frames.masked_fill(frames < 0, scratch).long()
    if scores is None:
        heats = (clock << SCORE_BITS).expand(flat.shape[0])
    else:
        heats = heat_of(scores.reshape(-1), clock)
    heat.scatter_reduce_(0, touched, heats, "amax")

    missed = flat.masked_select(missing).long()
    counts[0] += (frames >= 0).sum()
    recalled = taken = missed
    if missed.numel():
        wanted, warmth = _distinct(missed, heats.masked_select(missing))
        recalled, taken, evicted, refused = _give_frames(residency, wanted, warmth, clock, groups)
        counts[1:] += counts.new_tensor([missed.numel(), recalled.numel(), evicted, refused])
        frames = frame_of.index_select(0, flat)
    _write_lists(lists, frames.view(lane_pages.shape), scratch)
    return frames.view(lane_pages.shape), Recalls(recalled, taken)


def _give_frames(
    residency: Residency,
    wanted: torch.Tensor,
    warmth: torch.Tensor,
    clock: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Pages recalled, the frames they took, how many pages left, how many found no frame.

    ``wanted`` are distinct pages, ``warmth`` their heat.
    """
    frame_of, page_in, heat = residency
    now, stride, refused = clock << SCORE_BITS, frame_of.shape[0] // groups, 0
    taken = _coldest(heat, wanted, stride, groups)
    granted = heat.index_select(0, taken) < now
    if not granted.all():
        order = warmth.argsort(descending=True, stable=True)
        wanted, warmth = wanted[order], warmth[order]
        taken = _coldest(heat, wanted, stride, groups)
        granted = heat.index_select(0, taken) < now
        wanted, warmth, taken = wanted[granted], warmth[granted], taken[granted]
        refused = granted.numel() - wanted.numel()
    leaving = page_in.index_select(0, taken)
    evicted = leaving.masked_select(leaving >= 0)
    frame_of.index_fill_(0, evicted.long(), -1)
    page_in.index_copy_(0, taken, wanted.to(page_in.dtype))
    frame_of.index_copy_(0, wanted, taken.to(frame_of.dtype))
    heat.index_copy_(0, taken, warmth)
    return wanted, taken, evicted.numel(), refused


def _distinct(pages: torch.Tensor, heats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each page once, with the highest of its heats."""
    distinct, which = pages.unique(return_inverse=True)
    warmth = heats.new_zeros(distinct.shape[0]).scatter_reduce_(0, which, heats, "amax")
    return distinct, warmth


def find_frames(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    page_counts: torch.Tensor,
    scratch: int,
    lists: FrameLists | None,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.residency.api.find_frames`."""
    index = torch.arange(lane_pages.shape[1], device=lane_pages.device)
    pages = lane_pages.masked_fill(index >= page_counts.unsqueeze(1), 0)
    frames = frame_of.index_select(0, pages.reshape(-1)).view(pages.shape)
    _write_lists(lists, frames, scratch)
    return frames


def find_places(
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
    offsets: torch.Tensor,
    lane_frames: int,
    page_size: int,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.residency.api.find_places`."""
    frames = frame_of.index_select(1, lane_pages)
    frames = frames.masked_fill_(frames < 0, lane_frames - 1)
    return frames.long() * page_size + offsets


def _write_lists(lists: FrameLists | None, lane_frames: torch.Tensor, scratch: int) -> None:
    if lists is None:
        return
    starts = lists.starts.long()
    index = torch.arange(lane_frames.shape[1], device=lane_frames.device)
    inside = index < (starts[1:] - starts[:-1]).unsqueeze(1)
    place = (starts[:-1].unsqueeze(1) + index).masked_select(inside)
    frames = lane_frames.masked_fill(lane_frames < 0, scratch)
    lists.indices[place] = frames.masked_select(inside).to(lists.indices.dtype)


def _coldest(
    heat: torch.Tensor, wanted: torch.Tensor, page_stride: int, groups: int
) -> torch.Tensor:
    """One distinct frame of its own lane for every wanted lane page, coldest to the first ones.

    Where a lane has fewer frames than wanted pages the surplus gets the pinned scratch row.
    """
    by_lane = heat[:-1].view(groups, -1)
    frames = by_lane.shape[1]
    if groups == 1:
        coldest = by_lane[0].topk(min(frames, wanted.shape[0]), largest=False).indices
        surplus = wanted.shape[0] - coldest.shape[0]
        return torch.nn.functional.pad(coldest, (0, surplus), value=heat.shape[0] - 1)
    lane = wanted // page_stride
    in_lane = torch.nn.functional.one_hot(lane, groups)
    rank = (in_lane.cumsum(0) - 1).gather(1, lane.unsqueeze(1)).squeeze(1)
    coldest = by_lane.topk(min(frames, wanted.shape[0]), dim=1, largest=False).indices
    fits = rank < coldest.shape[1]
    victim = lane * frames + coldest[lane, rank.clamp(max=coldest.shape[1] - 1)]
    return torch.where(fits, victim, heat.shape[0] - 1)


def claim_frames(
    residency: Residency,
    pages: torch.Tensor,
    new_heat: torch.Tensor,
    groups: int,
    evicting: int,
) -> torch.Tensor:
    """See :func:`arkvale_kernels.residency.api.claim_frames`."""
    frame_of, page_in, heat = residency
    layers, page_stride = frame_of.shape[0], frame_of.shape[1] // groups
    frames = (heat.shape[1] - 1) // groups
    claims = min(pages.shape[0], frames)
    lane = torch.arange(groups, device=heat.device).view(groups, 1)
    by_lane = heat[:, :-1].unflatten(1, (groups, frames))
    cold, index = by_lane.topk(claims, dim=2, largest=False, sorted=True)
    may_evict = torch.arange(claims, device=heat.device) < evicting
    granted = ((cold == FREE) | (may_evict & (cold < PINNED))) & (pages[:claims] > 0)

    taken = (index + lane * frames).flatten(1)
    leaving = page_in.gather(1, taken).unflatten(1, (groups, claims)).long()
    arriving = pages[:claims] + lane * page_stride
    evicted = granted & (leaving >= 0)
    # Lane page 0 is padding, so it takes the writes of claims that were not granted.
    frame_of.scatter_(1, leaving.masked_fill(~evicted, 0).flatten(1), -1)
    frames_now = torch.where(granted, taken.unflatten(1, (groups, claims)), -1)
    targets = torch.where(granted, arriving, 0).flatten(1)
    frame_of.scatter_(1, targets, frames_now.flatten(1).to(frame_of.dtype))
    page_in.scatter_(1, taken, torch.where(granted, arriving, leaving).flatten(1).to(page_in.dtype))
    heat.scatter_(1, taken, torch.where(granted, new_heat[:claims], cold).flatten(1))
    return evicted.view(layers, -1).sum(1)


def release_pages(residency: Residency, pages: torch.Tensor, groups: int) -> None:
    """See :func:`arkvale_kernels.residency.api.release_pages`."""
    frame_of, page_in, heat = residency
    layers, page_stride = frame_of.shape[0], frame_of.shape[1] // groups
    lane = torch.arange(groups, device=heat.device).view(groups, 1)
    lane_pages = (pages + lane * page_stride).view(1, -1).expand(layers, -1)
    frames = frame_of.gather(1, lane_pages).long()
    scratch = heat.shape[1] - 1
    freed = frames.masked_fill(frames < 0, scratch)
    frame_of.scatter_(1, lane_pages, -1)
    page_in.scatter_(1, freed, -1)
    heat.scatter_(1, freed, FREE)
    heat[:, scratch] = PINNED
