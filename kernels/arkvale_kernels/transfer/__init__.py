"""Transfer op: how keys and values move between new tokens, frames and the host backup."""

from arkvale_kernels.transfer.api import (
    gather_pages,
    move_pages,
    seal_frames,
    seal_pages,
    write_tokens,
)

__all__ = ["gather_pages", "move_pages", "seal_frames", "seal_pages", "write_tokens"]
