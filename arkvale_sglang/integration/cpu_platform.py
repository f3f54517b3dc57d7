"""SGLang on a plain CPU: an out-of-tree platform for machines without any accelerator.

SGLang's own CPU engine needs AMX kernels; this one needs torch alone.  It serves stock SGLang
(``--kv-policy full``) and the arkvale policy alike.  SGLang loads it in the middle of importing
itself, so the rest of SGLang is imported where it is needed.
"""

from __future__ import annotations

import importlib
import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate() -> str | None:
    """Name the platform class where SGLang has no engine of its own; ``None`` elsewhere."""
    accelerated = torch.accelerator.is_available() or hasattr(torch, "npu")
    own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or _has_cpu_kernels()
    return None if accelerated or own_engine else f"{__name__}:CpuPlatform"


def _has_cpu_kernels() -> bool:
    """Whether SGLang's CPU kernels are installed; its CUDA wheel has the same name but not the op
    asked for, and may fail to load in any way on a machine without a GPU."""
    try:
        importlib.import_module("sgl_kernel")
    except Exception:
        return False
    return hasattr(torch.ops.sgl_kernel, "convert_weight_packed")


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

    def get_torch_profiler_activity_str(self) -> str:
        """What ``/start_profile`` calls this device; SGLang's own answer ends the server."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """The activity of that name."""
        return torch.profiler.ProfilerActivity.CPU

    def is_pin_memory_available(self, device: object = None) -> bool:
        """No: there is no second memory to copy to."""
        return False
