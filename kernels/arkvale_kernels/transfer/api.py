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
    lane_frames: torch.Tensor,
    offsets: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write tokens into frames.

    Args:
        lane_frames: ``[tokens]`` int frame of each token's page, -1 sends it to the scratch row.
        offsets: ``[tokens]`` int place of the token in its page.
        k, v: ``[tokens, lane heads, head_dim]``.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit together.
    """
    _check_frames(k_frames, v_frames)
    _check_tokens(k_frames, lane_frames, offsets, k, v)
    checks.check_ids("lane_frames", lane_frames, k_frames.shape[0], least=-1)
    if k.is_cuda:
        from arkvale_kernels.transfer import kernel

        return kernel.write_tokens(k_frames, v_frames, lane_frames, offsets, k, v)
    return reference.write_tokens(k_frames, v_frames, lane_frames, offsets, k, v)


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
    _check_layer(layer)
    check_kind(digest)
    if new is not None:
        checks.check_rows("new.lane_pages", new.lane_pages.unsqueeze(1))
        _check_tokens(layer.k_frames, *new)
        checks.check_ids("new.lane_pages", new.lane_pages, layer.host.shape[0])
    if recalls is not None:
        checks.check_shape("recalls.lane_pages", recalls.lane_pages, (None,))
        checks.check_shape(
            "recalls.lane_frames", recalls.lane_frames, tuple(recalls.lane_pages.shape)
        )
        checks.check_device(layer.k_frames, lane_pages=recalls.lane_pages)
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
    checks.check_shape("k", k, (None, None, layer.k_frames.shape[3]))
    checks.check_shape("v", v, tuple(k.shape))
    checks.check_dense(k=k, v=v, lane_pages=lane_pages, first_tokens=first_tokens)
    groups = k.shape[1] // layer.k_frames.shape[2]
    checks.check_shape("lane_pages", lane_pages, (first_tokens.shape[0] * groups,))
    checks.check_same_dtype("k", k, "k_frames", layer.k_frames)
    checks.check_ids("lane_pages", lane_pages, layer.host.shape[0], least=1)
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
    check_kind(digest)
    checks.check_shape("lane_pages", lane_pages, (None,))
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
    checks.check_shape("lane_pages", lane_pages, (None,))
    checks.check_integers(lane_pages=lane_pages)
    checks.check_ids("lane_pages", lane_pages, layer.host.shape[0])
    page_size, heads, head_dim = layer.k_frames.shape[1:]
    tokens = lane_pages.shape[0] // groups * page_size
    shape = (tokens, heads * groups, head_dim)
    if out is None:
        out = layer.k_frames.new_empty(shape), layer.k_frames.new_empty(shape)
    for name, part in zip(("out[0]", "out[1]"), out, strict=True):
        checks.check_shape(name, part[:tokens], shape)
        checks.check_dense(**{name: part})
    staged = out[0][:tokens], out[1][:tokens]
    if staged[0].is_cuda:
        from arkvale_kernels.transfer import kernel

        kernel.gather_pages(layer, lane_pages, groups, staged)
    else:
        reference.gather_pages(layer, lane_pages, groups, staged)
    return staged


def _check_frames(k_frames: torch.Tensor, v_frames: torch.Tensor) -> None:
    checks.check_shape("k_frames", k_frames, (None, None, None, None))
    checks.check_shape("v_frames", v_frames, tuple(k_frames.shape))
    checks.check_same_dtype("v_frames", v_frames, "k_frames", k_frames)
    checks.check_dense(k_frames=k_frames, v_frames=v_frames)


def _check_layer(layer: PagedLayer) -> None:
    _check_frames(layer.k_frames, layer.v_frames)
    frame = tuple(layer.k_frames.shape[1:])
    checks.check_shape("host", layer.host, (None, 2, *frame))
    checks.check_shape("digests", layer.digests, (layer.host.shape[0], 2, *frame[1:]))
    checks.check_dense(host=layer.host, digests=layer.digests)
    checks.check_same_dtype("host", layer.host, "k_frames", layer.k_frames)


def _check_tokens(
    k_frames: torch.Tensor,
    places: torch.Tensor,
    offsets: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    checks.check_shape("k", k, (places.shape[0], *k_frames.shape[2:]))
    checks.check_shape("v", v, tuple(k.shape))
    checks.check_shape("offsets", offsets, (places.shape[0],))
    checks.check_integers(places=places, offsets=offsets)
    checks.check_dense(k=k, v=v, places=places, offsets=offsets)
    checks.check_same_dtype("k", k, "k_frames", k_frames)
    checks.check_same_dtype("v", v, "k_frames", k_frames)
    checks.check_device(k_frames, k=k, v=v, places=places, offsets=offsets)
    checks.check_ids("offsets", offsets, k_frames.shape[1])
