"""Public face of the transfer op: everything that moves K and V.

Shapes of frames, backups and digests are those of :class:`arkvale_kernels.layout.PagedLayer`.
Kernels reach the host backup by its address, so no host code is in the loop.
"""

from __future__ import annotations

import torch

from arkvale_kernels import checks
from arkvale_kernels.digest.api import check_kind
from arkvale_kernels.layout import NewTokens, PagedLayer, Recalls
from arkvale_kernels.transfer import reference


def write_tokens(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    places: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write tokens into frames.

    Args:
        places: ``[tokens]`` int64 index of each token among all that the frames hold.
        k, v: ``[tokens, lane heads, head_dim]``.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit together.
    """
    _check_write(k_frames, v_frames, places, k, v)
    if k.is_cuda:
        from arkvale_kernels.transfer import kernel

        return kernel.write_tokens(k_frames, v_frames, places, k, v)
    return reference.write_tokens(k_frames, v_frames, places, k, v)


def move_pages(
    layer: PagedLayer,
    new: NewTokens | None,
    recalls: Recalls | None,
    clock: torch.Tensor,
    *,
    digest: str,
) -> None:
    """Everything that one decode step moves, in one launch.

    New tokens go into the frames of their open pages; a page that becomes full is sealed: digested,
    backed up and free to leave.  Recalled pages are read back into the frames they were given.

    Args:
        new: one token per row, or ``None``; rows on page 0 are inert.
        recalls: pages and their frames, or ``None``.
        clock: ``[]`` int64.
        digest: kind of digest.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit together.
    """
    _check_move(layer, new, recalls, clock, digest)
    if layer.k_frames.is_cuda:
        from arkvale_kernels.transfer import kernel

        return kernel.move_pages(layer, new, recalls, clock, digest)
    return reference.move_pages(layer, new, recalls, clock, digest)


def seal_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    first_tokens: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    digest: str,
) -> None:
    """Digest and back up the pages that a chunk holds whole, once in their life, and write those
    that have frames.

    Args:
        lane_pages: ``[pages * groups]`` int, the groups of a page side by side.
        first_tokens: ``[pages]`` int row of ``k`` where each page begins.
        k, v: ``[tokens, KV heads, head_dim]`` of the chunk.
        digest: kind of digest.
    """
    _check_layer(layer)
    check_kind(digest)
    page_size, heads, head_dim = layer.k_frames.shape[1:]
    checks.check_shape("k", k, (None, None, head_dim))
    checks.check_shape("v", v, tuple(k.shape))
    if k.shape[1] == 0 or k.shape[1] % heads:
        raise ValueError(f"k must hold a multiple of {heads} heads, got shape {tuple(k.shape)}")
    checks.check_shape("first_tokens", first_tokens, (None,))
    groups = k.shape[1] // heads
    checks.check_shape("lane_pages", lane_pages, (first_tokens.shape[0] * groups,))
    checks.check_integers(lane_pages=lane_pages, first_tokens=first_tokens)
    checks.check_dense(k=k, v=v, lane_pages=lane_pages, first_tokens=first_tokens)
    checks.check_same_dtype("k", k, "k_frames", layer.k_frames)
    checks.check_same_dtype("v", v, "k_frames", layer.k_frames)
    checks.check_device(layer.k_frames, k=k, v=v, lane_pages=lane_pages, first_tokens=first_tokens)
    checks.check_ids("lane_pages", lane_pages, layer.host.shape[0], least=1)
    checks.check_ids("first_tokens", first_tokens, k.shape[0] - page_size + 1)
    if k.is_cuda:
        from arkvale_kernels.transfer import kernel

        return kernel.seal_pages(layer, lane_pages, first_tokens, k, v, digest)
    return reference.seal_pages(layer, lane_pages, first_tokens, k, v, digest)


def seal_frames(
    layer: PagedLayer, lane_pages: torch.Tensor, clock: torch.Tensor, *, digest: str
) -> None:
    """Digest and back up open pages ``[pages]`` int that just became full in their frames, which
    may leave from now on."""
    _check_layer(layer)
    _check_clock(layer, clock)
    check_kind(digest)
    _check_listed(layer, lane_pages)
    checks.check_ids("lane_pages", lane_pages, layer.host.shape[0], least=1)
    if layer.k_frames.is_cuda:
        from arkvale_kernels.transfer import kernel

        return kernel.seal_frames(layer, lane_pages, clock, digest)
    return reference.seal_frames(layer, lane_pages, clock, digest)


def gather_pages(
    layer: PagedLayer,
    lane_pages: torch.Tensor,
    *,
    groups: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pages from wherever they are: the frame if resident, else the host backup.

    Args:
        lane_pages: ``[pages * groups]`` int, the groups of a page side by side.
        groups: lanes of the layer.
        out: staging buffers, each at least ``[pages * page_size, KV heads, head_dim]``, contiguous.

    Returns:
        K and V, each ``[pages * page_size, KV heads, head_dim]`` on the device.
    """
    _check_layer(layer)
    _check_listed(layer, lane_pages)
    checks.check_ids("lane_pages", lane_pages, layer.host.shape[0])
    if groups < 1 or lane_pages.shape[0] % groups:
        raise ValueError(f"groups must divide {lane_pages.shape[0]} lane pages, got {groups}")
    page_size, heads, head_dim = layer.k_frames.shape[1:]
    tokens = lane_pages.shape[0] // groups * page_size
    shape = (tokens, heads * groups, head_dim)
    if out is None:
        out = layer.k_frames.new_empty(shape), layer.k_frames.new_empty(shape)
    for name, part in zip(("out[0]", "out[1]"), out, strict=True):
        checks.check_shape(name, part[:tokens], shape)
        checks.check_dense(**{name: part})
        checks.check_same_dtype(name, part, "k_frames", layer.k_frames)
        checks.check_device(layer.k_frames, **{name: part})
    staged = out[0][:tokens], out[1][:tokens]
    if staged[0].is_cuda:
        from arkvale_kernels.transfer import kernel

        kernel.gather_pages(layer, lane_pages, groups, staged)
    else:
        reference.gather_pages(layer, lane_pages, groups, staged)
    return staged


@checks.by_layout
def _check_write(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    places: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    _check_frames(k_frames, v_frames)
    _check_tokens(k_frames, "", places, k, v)


@checks.by_layout
def _check_move(
    layer: PagedLayer,
    new: NewTokens | None,
    recalls: Recalls | None,
    clock: torch.Tensor,
    digest: str,
) -> None:
    _check_layer(layer)
    _check_clock(layer, clock)
    check_kind(digest)
    if new is not None:
        _check_new(layer, new)
    if recalls is not None:
        _check_recalls(layer, recalls)


def _check_frames(k_frames: torch.Tensor, v_frames: torch.Tensor) -> None:
    checks.check_shape("k_frames", k_frames, (None, None, None, None))
    checks.check_shape("v_frames", v_frames, tuple(k_frames.shape))
    checks.check_dtype("k_frames", k_frames, *checks.FLOATS)
    checks.check_same_dtype("v_frames", v_frames, "k_frames", k_frames)
    checks.check_dense(k_frames=k_frames, v_frames=v_frames)
    checks.check_device(k_frames, v_frames=v_frames)


@checks.by_layout
def _check_layer(layer: PagedLayer) -> None:
    _check_frames(layer.k_frames, layer.v_frames)
    frame, pages = tuple(layer.k_frames.shape[1:]), layer.host.shape[0]
    frame_of, heat = layer.residency.frame_of, layer.residency.heat
    checks.check_shape("host", layer.host, (None, 2, *frame))
    checks.check_shape("digests", layer.digests, (pages, 2, *frame[1:]))
    checks.check_shape("frame_of", frame_of, (pages,))
    checks.check_shape("heat", heat, (layer.k_frames.shape[0],))
    checks.check_dense(host=layer.host, digests=layer.digests, frame_of=frame_of, heat=heat)
    checks.check_same_dtype("host", layer.host, "k_frames", layer.k_frames)
    if layer.k_frames.is_cuda and layer.host.data_ptr() % 16:
        raise ValueError("host must start at a multiple of 16 bytes, which its kernels rely on")
    checks.check_dtype("digests", layer.digests, layer.k_frames.dtype, torch.float8_e4m3fn)
    checks.check_device(layer.k_frames, digests=layer.digests, frame_of=frame_of, heat=heat)


def _check_clock(layer: PagedLayer, clock: torch.Tensor) -> None:
    checks.check_shape("clock", clock, ())
    checks.check_dtype("clock", clock, torch.int64)
    checks.check_device(layer.k_frames, clock=clock)


def _check_listed(layer: PagedLayer, lane_pages: torch.Tensor) -> None:
    checks.check_shape("lane_pages", lane_pages, (None,))
    checks.check_integers(lane_pages=lane_pages)
    checks.check_dense(lane_pages=lane_pages)
    checks.check_device(layer.k_frames, lane_pages=lane_pages)


def _check_recalls(layer: PagedLayer, recalls: Recalls) -> None:
    pages, frames, counts = recalls
    checks.check_shape("recalls.lane_pages", pages, (None,))
    checks.check_shape("recalls.lane_frames", frames, tuple(pages.shape))
    named = {"recalls.lane_pages": pages, "recalls.lane_frames": frames}
    groups = 1
    if counts is not None:
        checks.check_shape("recalls.counts", counts, (None,))
        groups = counts.shape[0]
        if groups == 0 or pages.shape[0] % groups:
            raise ValueError(
                f"recalls.counts must have a length that divides {pages.shape[0]} recalls, "
                f"got shape {tuple(counts.shape)}"
            )
        named["recalls.counts"] = counts
    checks.check_integers(**named)
    checks.check_dense(**named)
    checks.check_device(layer.k_frames, **named)
    for name, ids, limit in (
        ("recalls.lane_pages", pages, layer.host.shape[0]),
        ("recalls.lane_frames", frames, layer.k_frames.shape[0]),
    ):
        checks.check_ids(name, ids.view(groups, -1), limit, counts=counts)


def _check_new(layer: PagedLayer, new: NewTokens) -> None:
    checks.check_shape("new.lane_pages", new.lane_pages, (None,))
    checks.check_rows("new.lane_pages", new.lane_pages.unsqueeze(1))
    count, places = new.lane_pages.shape[0], new.places
    named = {"new.lane_pages": new.lane_pages, "new.offsets": new.offsets}
    checks.check_shape("new.offsets", new.offsets, (count,))
    checks.check_integers(**named)
    checks.check_dense(**named)
    checks.check_device(layer.k_frames, **named)
    checks.check_ids("new.lane_pages", new.lane_pages, layer.host.shape[0])
    checks.check_ids("new.offsets", new.offsets, layer.k_frames.shape[1])
    if places is not None:
        checks.check_shape("new.places", places, (count,))
    _check_tokens(layer.k_frames, "new.", places, new.k, new.v, count)


def _check_tokens(
    k_frames: torch.Tensor,
    prefix: str,
    places: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    count: int | None = None,
) -> None:
    tokens = {f"{prefix}k": k, f"{prefix}v": v}
    if places is not None:
        name, count = f"{prefix}places", places.shape[0]
        checks.check_shape(name, places, (None,))
        checks.check_dtype(name, places, torch.int64)
        checks.check_dense(**{name: places})
        checks.check_device(k_frames, **{name: places})
        checks.check_ids(name, places, k_frames.shape[0] * k_frames.shape[1])
    for name, part in tokens.items():
        checks.check_shape(name, part, (count, *k_frames.shape[2:]))
        checks.check_same_dtype(name, part, "k_frames", k_frames)
    checks.check_dense(**tokens)
    checks.check_device(k_frames, **tokens)
