"""ArkVale for SGLang: a KV cache larger than the device, evicted by page and recalled on demand."""

__version__ = "0.1.0"
