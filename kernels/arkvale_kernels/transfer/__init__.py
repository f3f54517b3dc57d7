"""Transfer op: how keys and values move between new tokens, frames and the host backup."""

from arkvale_kernels.transfer.api import (
    back_up_pages,
    gather_pages,
    recall_pages,
    write_tokens,
)

__all__ = [
    "back_up_pages",
    "gather_pages",
    "recall_pages",
    "write_tokens",
]
