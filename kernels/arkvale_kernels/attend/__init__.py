"""Attend op: exact attention over chosen frames, over a chunk, and the merge of partial results."""

from arkvale_kernels.attend.api import attend_chunk, attend_frames, attend_part, merge_parts

__all__ = ["attend_chunk", "attend_frames", "attend_part", "merge_parts"]
