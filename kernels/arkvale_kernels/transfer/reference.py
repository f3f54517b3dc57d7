"""Transfers in plain torch; see ``api.py`` for shapes."""

from __future__ import annotations

import torch


def write_tokens(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    offsets: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.write_tokens`."""
    page_size = k_frames.shape[1]
    frames = lane_frames.masked_fill(lane_frames < 0, k_frames.shape[0] - 1)
    rows = frames * page_size + offsets
    k_frames.flatten(0, 1).index_copy_(0, rows, k)
    v_frames.flatten(0, 1).index_copy_(0, rows, v)


def back_up_pages(
    host: torch.Tensor, lane_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """See :func:`arkvale_kernels.transfer.api.back_up_pages`."""
    target = lane_pages.to(host.device)
    host[:, 0].index_copy_(0, target, k.to(host.device))
    host[:, 1].index_copy_(0, target, v.to(host.device))


def recall_pages(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    host: torch.Tensor,
    lane_pages: torch.Tensor,
    lane_frames: torch.Tensor,
) -> None:
    """See :func:`arkvale_kernels.transfer.api.recall_pages`."""
    if lane_pages.numel() == 0:
        return
    backups = host.index_select(0, lane_pages.to(host.device)).to(k_frames.device)
    k_frames.index_copy_(0, lane_frames, backups[:, 0])
    v_frames.index_copy_(0, lane_frames, backups[:, 1])


def gather_pages(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    host: torch.Tensor,
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`arkvale_kernels.transfer.api.gather_pages`."""
    frames = frame_of.index_select(0, lane_pages)
    absent = frames < 0
    rows = frames.masked_fill(absent, k_frames.shape[0] - 1)
    k, v = k_frames.index_select(0, rows), v_frames.index_select(0, rows)
    evicted = absent.nonzero().squeeze(1)
    if evicted.numel():
        source = lane_pages.index_select(0, evicted).to(host.device)
        backups = host.index_select(0, source).to(k.device)
        k.index_copy_(0, evicted, backups[:, 0])
        v.index_copy_(0, evicted, backups[:, 1])
    return k, v
