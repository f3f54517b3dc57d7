"""SGLang on a plain CPU: an out-of-tree platform for machines without any accelerator.

SGLang's own CPU engine needs AMX kernels; this one needs torch alone.  It serves stock SGLang
(``--kv-policy full``) and the arkvale policy alike.  SGLang loads it in the middle of importing
itself, so the rest of SGLang is imported where it is needed.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate() -> str | None:
    """Name the platform class where there is no accelerator; ``None`` elsewhere."""
    accelerated = torch.cuda.is_available() or torch.xpu.is_available() or hasattr(torch, "npu")
    return None if accelerated else f"{__name__}:CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain CPU with torch operators."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int | None = None) -> str:
        """The one device there is."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Torch attention; the policy takes this name over where asked for."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool (releases until 0.5.22 ask by this name)."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """SGLang's own pool (later releases)."""
        return None

    def get_paged_allocator_cls(self) -> type:
        """The allocator without Triton kernels."""
        from arkvale_sglang.integration.cpu_allocator import CpuPagedAllocator

        return CpuPagedAllocator

    def is_pin_memory_available(self, device: object = None) -> bool:
        """No: there is no second memory to copy to."""
        return False
