"""Transfers as kernels: the host backup is read and written by its address, without the host.

Work is cut into units that a fixed number of programs share, so that a launch has the same shape
whatever it has to move, and leaves processors to what runs beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arkvale_kernels.layout import SCORE_BITS, NewTokens, PagedLayer, Recalls
from arkvale_kernels.triton_helpers import as_bytes, as_stored, multiprocessors, page_bounds

_SCORE_BITS = tl.constexpr(SCORE_BITS)
_BURST = 4096
"""Elements of one copy unit: 8 KiB of 16-bit values, 16 bytes per thread and load."""


@triton.jit
def _host(address, like):
    """The backup as a pointer; allocations are aligned, but an integer does not say so."""
    pointer = address.to(tl.int64).to(tl.pointer_type(like.dtype.element_ty))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _seal_head(k_values, v_values, host_address, digests, like, page, head, heads: tl.constexpr,
               head_dim: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr,
               FP8: tl.constexpr):  # fmt: skip
    """Back up and digest one head of a page whose K and V ``[PAGE, DIM]`` are in registers."""
    dim = tl.arange(0, DIM)
    token = tl.arange(0, PAGE)
    inside = dim < head_dim
    host = _host(host_address, like) + page * (2 * PAGE * heads * head_dim)
    places = (token * heads + head)[:, None] * head_dim + dim[None, :]
    tl.store(host + places, k_values, mask=inside[None, :])
    tl.store(host + PAGE * heads * head_dim + places, v_values, mask=inside[None, :])
    upper, lower = page_bounds(k_values.to(tl.float32), inside, PAGE, KIND)
    out = digests + (page * 2 * heads + head) * head_dim + dim
    tl.store(out, as_stored(upper, digests, FP8), mask=inside)
    tl.store(out + heads * head_dim, as_stored(lower, digests, FP8), mask=inside)


@triton.jit
def _append_head(k_frames, v_frames, host_address, digests, frame_of, heat, new_pages, new_offsets,
                 new_k, new_v, clock, row, head, heads: tl.constexpr, head_dim: tl.constexpr, PAGE:
                 tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr,
                 FP8: tl.constexpr):  # fmt: skip
    """Write one head of a row's new token; seal the page if it is full now."""
    page = tl.load(new_pages + row).to(tl.int64)
    frame = tl.load(frame_of + page)
    if (page > 0) & (frame >= 0):
        offset = tl.load(new_offsets + row).to(tl.int32)
        dim = tl.arange(0, DIM)
        inside = dim < head_dim
        source = (row.to(tl.int64) * heads + head) * head_dim + dim
        k_new = tl.load(new_k + source, mask=inside, other=0.0)
        v_new = tl.load(new_v + source, mask=inside, other=0.0)
        base = frame.to(tl.int64) * (PAGE * heads * head_dim)
        target = base + (offset * heads + head) * head_dim + dim
        tl.store(k_frames + target, k_new, mask=inside)
        tl.store(v_frames + target, v_new, mask=inside)
        if offset == PAGE - 1:
            token = tl.arange(0, PAGE)
            places = base + (token * heads + head)[:, None] * head_dim + dim[None, :]
            # The token just written may not be readable yet, so it comes from its register.
            older = inside[None, :] & (token < PAGE - 1)[:, None]
            is_new = (token == PAGE - 1)[:, None]
            k = tl.where(is_new, k_new[None, :], tl.load(k_frames + places, mask=older, other=0.0))
            v = tl.where(is_new, v_new[None, :], tl.load(v_frames + places, mask=older, other=0.0))
            _seal_head(
                k, v, host_address, digests, k_frames, page, head, heads, head_dim, PAGE, DIM,
                KIND, FP8,
            )  # fmt: skip
            if head == 0:
                tl.store(heat + frame, tl.load(clock) << _SCORE_BITS)


@triton.jit
def _recall(k_frames, v_frames, host_address, recall_pages, recall_frames, recall_counts, share,
            program, programs, groups: tl.constexpr, half: tl.constexpr, BURST: tl.constexpr,
            COUNTED: tl.constexpr):  # fmt: skip
    """Copy backups into frames, burst by burst; a page is two halves of ``half`` elements."""
    bursts: tl.constexpr = (half + BURST - 1) // BURST
    host = _host(host_address, k_frames)
    for group in range(groups):
        count = share
        if COUNTED:
            count = tl.load(recall_counts + group)
        for unit in range(program, count * bursts * 2, programs):
            entry = group * share + unit // (2 * bursts)
            page = tl.load(recall_pages + entry).to(tl.int64)
            frame = tl.load(recall_frames + entry).to(tl.int64)
            part = unit % (2 * bursts)
            element = (part % bursts) * BURST + tl.arange(0, BURST)
            inside = element < half
            source = host + page * (2 * half) + element
            if part < bursts:
                values = tl.load(source, mask=inside, cache_modifier=".cg")
                tl.store(k_frames + frame * half + element, values, mask=inside)
            else:
                values = tl.load(source + half, mask=inside, cache_modifier=".cg")
                tl.store(v_frames + frame * half + element, values, mask=inside)


@triton.jit
def _move_pages(k_frames, v_frames, host_address, digests, frame_of, heat, clock, new_pages,
                new_offsets, new_k, new_v, rows, recall_pages, recall_frames, recall_counts, share,
                groups: tl.constexpr, heads: tl.constexpr, head_dim: tl.constexpr, PAGE:
                tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, FP8: tl.constexpr, BURST:
                tl.constexpr, COUNTED: tl.constexpr, APPENDS: tl.constexpr,
                RECALLS: tl.constexpr):  # fmt: skip
    """The first ``rows * heads`` programs append, the others recall."""
    program = tl.program_id(0)
    appending = 0
    if APPENDS:
        appending = rows * heads
        if program < appending:
            _append_head(
                k_frames, v_frames, host_address, digests, frame_of, heat, new_pages,
                new_offsets, new_k, new_v, clock, program // heads, program % heads, heads,
                head_dim, PAGE, DIM, KIND, FP8,
            )  # fmt: skip
    if RECALLS:
        if program >= appending:
            _recall(
                k_frames, v_frames, host_address, recall_pages, recall_frames, recall_counts,
                share, program - appending, tl.num_programs(0) - appending, groups,
                PAGE * heads * head_dim, BURST, COUNTED,
            )  # fmt: skip


@triton.jit
def _write_tokens(k_frames, v_frames, places, k, v, elements: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(places + token) * elements
    for first in tl.static_range(0, elements, BLOCK):
        element = first + tl.arange(0, BLOCK)
        inside = element < elements
        source = token * elements + element
        tl.store(k_frames + target + element, tl.load(k + source, mask=inside), mask=inside)
        tl.store(v_frames + target + element, tl.load(v + source, mask=inside), mask=inside)


@triton.jit
def _seal_pages(k_frames, v_frames, host_address, digests, frame_of, heat, clock, lane_pages,
                first_tokens, k, v, units, groups: tl.constexpr, heads: tl.constexpr, head_dim:
                tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, KIND: tl.constexpr, FP8:
                tl.constexpr, IN_FRAMES: tl.constexpr):  # fmt: skip
    """One unit is one head of one lane page, read from its frame or from the chunk."""
    dim = tl.arange(0, DIM)
    inside = dim < head_dim
    token = tl.arange(0, PAGE)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        lane_page, head = unit // heads, unit % heads
        page = tl.load(lane_pages + lane_page).to(tl.int64)
        frame = tl.load(frame_of + page).to(tl.int64)
        places = ((frame * PAGE + token) * heads + head)[:, None] * head_dim + dim[None, :]
        if IN_FRAMES:
            k_values = tl.load(k_frames + places, mask=inside[None, :], other=0.0)
            v_values = tl.load(v_frames + places, mask=inside[None, :], other=0.0)
            if head == 0:
                tl.store(heat + frame, tl.load(clock) << _SCORE_BITS)
        else:
            first = tl.load(first_tokens + lane_page // groups).to(tl.int64)
            kv_head = (lane_page % groups) * heads + head
            source = ((first + token) * (groups * heads) + kv_head)[:, None] * head_dim
            k_values = tl.load(k + source + dim[None, :], mask=inside[None, :], other=0.0)
            v_values = tl.load(v + source + dim[None, :], mask=inside[None, :], other=0.0)
            if frame >= 0:
                tl.store(k_frames + places, k_values, mask=inside[None, :])
                tl.store(v_frames + places, v_values, mask=inside[None, :])
        _seal_head(
            k_values, v_values, host_address, digests, k_frames, page, head, heads, head_dim,
            PAGE, DIM, KIND, FP8,
        )  # fmt: skip


@triton.jit
def _gather_pages(k_frames, v_frames, host_address, frame_of, lane_pages, out_k, out_v, units,
                  groups: tl.constexpr, row: tl.constexpr, PAGE: tl.constexpr, BURST:
                  tl.constexpr):  # fmt: skip
    """One unit is a burst of one half of a lane page; ``row`` is a token's elements in a lane."""
    half: tl.constexpr = PAGE * row
    bursts: tl.constexpr = (half + BURST - 1) // BURST
    host = _host(host_address, k_frames)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        lane_page, part = unit // (2 * bursts), unit % (2 * bursts)
        page = tl.load(lane_pages + lane_page).to(tl.int64)
        frame = tl.load(frame_of + page).to(tl.int64)
        element = (part % bursts) * BURST + tl.arange(0, BURST)
        inside = element < half
        backup = host + page * (2 * half) + element
        token = lane_page // groups * PAGE + (element // row).to(tl.int64)
        target = (token * groups + lane_page % groups) * row + element % row
        if part < bursts:
            if frame >= 0:
                values = tl.load(k_frames + frame * half + element, mask=inside)
            else:
                values = tl.load(backup, mask=inside, cache_modifier=".cg")
            tl.store(out_k + target, values, mask=inside)
        else:
            if frame >= 0:
                values = tl.load(v_frames + frame * half + element, mask=inside)
            else:
                values = tl.load(backup + half, mask=inside, cache_modifier=".cg")
            tl.store(out_v + target, values, mask=inside)


def _shape(layer: PagedLayer) -> dict[str, int]:
    """Compile-time sizes of a layer's pages."""
    page_size, heads, head_dim = layer.k_frames.shape[1:]
    dim = triton.next_power_of_2(head_dim)
    return {"heads": heads, "head_dim": head_dim, "PAGE": page_size, "DIM": dim}


def _warps(shape: dict[str, int]) -> int:
    """So that a head of a page takes 32 values of K and of V in each thread."""
    return max(2, shape["PAGE"] * shape["DIM"] // 1024)


def _burst(elements: int) -> int:
    return min(_BURST, triton.next_power_of_2(elements))


def write_tokens(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    places: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.write_tokens`."""
    if places.shape[0] == 0:
        return
    elements = k_frames.shape[2] * k_frames.shape[3]
    _write_tokens[(places.shape[0],)](
        k_frames,
        v_frames,
        places,
        k,
        v,
        elements=elements,
        BLOCK=min(2048, triton.next_power_of_2(elements)),
        num_warps=4,
    )


def move_pages(
    layer: PagedLayer,
    new: NewTokens | None,
    recalls: Recalls | None,
    clock: torch.Tensor,
    digest: str,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.move_pages`."""
    shape = _shape(layer)
    appending = new.lane_pages.shape[0] * shape["heads"] if new is not None else 0
    groups, recalling, recalled = 1, 0, (clock, clock, clock)
    if recalls is not None and recalls.lane_pages.shape[0]:
        counts = recalls.counts
        groups = counts.shape[0] if counts is not None else 1
        recalling = 2 * multiprocessors(layer.k_frames.device)
        recalled = (recalls.lane_pages, recalls.lane_frames, clock if counts is None else counts)
    if appending + recalling == 0:
        return
    _move_pages[(appending + recalling,)](
        layer.k_frames,
        layer.v_frames,
        layer.host.data_ptr(),
        as_bytes(layer.digests),
        layer.residency.frame_of,
        layer.residency.heat,
        clock,
        *(new[:4] if new is not None else (clock, clock, layer.k_frames, layer.k_frames)),
        0 if new is None else new.lane_pages.shape[0],
        *recalled,
        0 if recalls is None else recalls.lane_pages.shape[0] // groups,
        groups=groups,
        **shape,
        KIND=digest,
        FP8=layer.digests.dtype.itemsize == 1,
        BURST=_burst(shape["PAGE"] * shape["heads"] * shape["head_dim"]),
        COUNTED=recalls is not None and recalls.counts is not None,
        APPENDS=appending > 0,
        RECALLS=recalling > 0,
        num_warps=_warps(shape),
    )


def seal_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    first_tokens: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    digest: str,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.seal_pages`."""
    groups = k.shape[1] // layer.k_frames.shape[2]
    _seal(layer, lane_pages, (lane_pages, first_tokens, k, v), digest, groups)


def seal_frames(
    layer: PagedLayer, lane_pages: torch.Tensor, clock: torch.Tensor, digest: str
) -> None:
    """See :func:`arkvale_kernels.transfer.api.seal_frames`."""
    _seal(layer, clock, (lane_pages, lane_pages, layer.k_frames, layer.v_frames), digest, 0)


def _seal(
    layer: PagedLayer,
    clock: torch.Tensor,
    pages: tuple[torch.Tensor, ...],
    digest: str,
    groups: int,
) -> None:
    """``pages``: lane pages, first tokens, K and V; no ``groups`` where those are the frames."""
    shape = _shape(layer)
    units = pages[0].shape[0] * shape["heads"]
    if units == 0:
        return
    _seal_pages[(min(units, multiprocessors(layer.k_frames.device)),)](
        layer.k_frames,
        layer.v_frames,
        layer.host.data_ptr(),
        as_bytes(layer.digests),
        layer.residency.frame_of,
        layer.residency.heat,
        clock,
        *pages,
        units,
        groups=max(groups, 1),
        **shape,
        KIND=digest,
        FP8=layer.digests.dtype.itemsize == 1,
        IN_FRAMES=groups == 0,
        num_warps=_warps(shape),
    )


def gather_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    groups: int,
    out: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """See :func:`arkvale_kernels.transfer.api.gather_pages`."""
    shape = _shape(layer)
    row = shape["heads"] * shape["head_dim"]
    burst = _burst(shape["PAGE"] * row)
    units = lane_pages.shape[0] * 2 * triton.cdiv(shape["PAGE"] * row, burst)
    if units == 0:
        return
    _gather_pages[(min(units, 2 * multiprocessors(layer.k_frames.device)),)](
        layer.k_frames,
        layer.v_frames,
        layer.host.data_ptr(),
        layer.residency.frame_of,
        lane_pages,
        *out,
        units,
        groups=groups,
        row=row,
        PAGE=shape["PAGE"],
        BURST=burst,
        num_warps=4,
    )
