"""Digest op: two vectors per KV head that stand for all keys of a page."""

from arkvale_kernels.digest.api import DIGEST_KINDS, build_digests

__all__ = ["DIGEST_KINDS", "build_digests"]
