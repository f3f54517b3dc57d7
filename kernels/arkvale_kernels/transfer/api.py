"""Public face of the transfer op.

A page's K and V lie together in the host backup, so that a recall is one burst, and apart in
the frames, as attention kernels want them.  Shapes used throughout:

``k_frames``, ``v_frames``  ``[lane frames + 1, page_size, lane heads, head_dim]``, device; the
                            last row is scratch
``host``                    ``[lane pages, 2, page_size, lane heads, head_dim]``, host memory
"""

from __future__ import annotations

import torch

from arkvale_kernels.checks import check_same_dtype, check_shape
from arkvale_kernels.transfer import reference


def write_tokens(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    lane_frames: torch.Tensor,
    offsets: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Write new tokens into the frames of their pages.

    Args:
        lane_frames: ``[rows]`` int frame of each token's page, -1 sends it to the scratch row.
        offsets: ``[rows]`` int64 place of the token in its page.
        k, v: ``[rows, lane heads, head_dim]``, rows token-major over the lanes of the layer.
    """
    check_shape("k", k, (lane_frames.shape[0], *k_frames.shape[2:]))
    check_shape("v", v, tuple(k.shape))
    check_same_dtype("k", k, "k_frames", k_frames)
    reference.write_tokens(k_frames, v_frames, lane_frames, offsets, k, v)


def back_up_pages(
    host: torch.Tensor, lane_pages: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Copy full pages to the host, once in their life.

    Args:
        lane_pages: ``[pages]`` int64.
        k, v: ``[pages, page_size, lane heads, head_dim]`` on the device.
    """
    check_shape("k", k, (lane_pages.shape[0], *host.shape[2:]))
    check_shape("v", v, tuple(k.shape))
    reference.back_up_pages(host, lane_pages, k, v)


def recall_pages(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    host: torch.Tensor,
    lane_pages: torch.Tensor,
    lane_frames: torch.Tensor,
) -> None:
    """Copy backups into frames: ``lane_pages`` and ``lane_frames`` are both ``[recalls]`` int64."""
    check_shape("lane_frames", lane_frames, tuple(lane_pages.shape))
    reference.recall_pages(k_frames, v_frames, host, lane_pages, lane_frames)


def gather_pages(
    k_frames: torch.Tensor,
    v_frames: torch.Tensor,
    host: torch.Tensor,
    frame_of: torch.Tensor,
    lane_pages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pages from wherever they are: the frame if resident, else the host backup.

    Args:
        frame_of: ``[lane pages]`` int32 of the layer.
        lane_pages: ``[pages]`` int.

    Returns:
        K and V, each ``[pages, page_size, lane heads, head_dim]`` on the device: the staging
        buffer of exact prefill.
    """
    check_shape("lane_pages", lane_pages, (None,))
    return reference.gather_pages(k_frames, v_frames, host, frame_of, lane_pages)
