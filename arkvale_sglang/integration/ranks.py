"""Tensor parallelism: what the ranks of a server must agree on, and how they do.

Each rank owns its KV heads and decides alone which pages are resident.  Its scheduler takes every
decision for itself, so what these read must be equal: sizes.  They follow from the memory that is
agreed on here; all else that admission counts (live pages, lengths) is the same by itself.
"""

from __future__ import annotations

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.utils.common import get_cpu_ids_by_node

from arkvale_sglang.core.sizing import Memory


def count() -> int:
    """Ranks of this server."""
    return int(parallel_state.get_tp_group().world_size)


def agree(device: int, host_free: int, shared: bool) -> Memory:
    """The memory every rank plans with: the least that any of them measured.

    All ranks must call this, as they do where SGLang sizes its pools; a rank that refuses before
    it ends the server, and with it those who wait.

    Args:
        device, host_free: bytes measured on this rank.
        shared: whether these are the same memory; SGLang then counts all that is free on a node
            of the machine for each rank, and it is divided between those on the node.
    """
    group = parallel_state.get_tp_group()
    ranks = count()
    if ranks == 1:
        return Memory(device, host_free, shared)
    least = torch.tensor([device, host_free])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    device, host_free = least.tolist()
    if shared:
        device //= -(-ranks // len(get_cpu_ids_by_node()))
    return Memory(device, host_free, shared, ranks)
