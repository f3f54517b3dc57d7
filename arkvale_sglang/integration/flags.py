"""Flags of the policy, and what they ask of SGLang's own settings."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from arkvale_sglang.config.settings import (
    ATTENTIONS,
    DEFAULT_PAGE_SIZE,
    DIGEST_DTYPES,
    DIGESTS,
    HEAD_REDUCES,
    POLICIES,
    SELECTIONS,
    ArkValeConfig,
    ArkValeError,
)

CONFIG_ENV = "ARKVALE_CONFIG"
"""Carries the settings to SGLang's child processes; unset means stock SGLang."""
PREFIX = "arkvale_"
BACKENDS = ("arkvale", "torch_native")
"""Names the policy registers under: on an accelerator, and on a CPU."""
Settings = MutableMapping[str, Any]

_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("budget", {"type": int, "help": "tokens attended per request, layer and step"}),
    (
        "top_k",
        {
            "type": int,
            "help": "of these, tokens' worth of best-scored pages that are guaranteed, recalled "
            "if missing, beside sink and window pages (default: min(1280, budget / 2))",
        },
    ),
    ("sink_pages", {"type": int, "help": "first pages, always attended"}),
    (
        "window_pages",
        {"type": int, "help": "most recent pages, always attended; counts the one being written"},
    ),
    ("digest", {"type": str, "choices": DIGESTS, "help": "how a page's keys are summarised"}),
    (
        "digest_dtype",
        {"type": str, "choices": DIGEST_DTYPES, "help": "how digests are stored"},
    ),
    (
        "attention",
        {
            "type": str,
            "choices": ATTENTIONS,
            "help": "who attends on a GPU (default: flashinfer where it is installed and knows "
            "the model's shape, else triton)",
        },
    ),
    (
        "head_groups",
        {
            "type": int,
            "help": "groups of KV heads per layer that choose their own pages, on each rank",
        },
    ),
    (
        "head_reduce",
        {"type": str, "choices": HEAD_REDUCES, "help": "how the query heads of a group agree"},
    ),
    (
        "selection",
        {
            "type": str,
            "choices": SELECTIONS,
            "help": "how pages are chosen; all but recall drop what they leave out, for comparison",
        },
    ),
    ("dense_layers", {"type": int, "help": "first layers left unmanaged, all on the device"}),
    (
        "host_memory",
        {
            "type": float,
            "help": "GiB of host memory for pages, of the whole server: its ranks share it "
            "equally; sets the logical capacity (default: half of what is free)",
        },
    ),
    (
        "device_tokens",
        {
            "type": int,
            "help": "tokens held by the frames of one lane "
            "(default: from the device memory SGLang would give its pool)",
        },
    ),
    (
        "recall_cap",
        {
            "type": int,
            "help": "most pages recalled by score per request, lane and step, 0 for no recall; "
            "requests within their budget stay exact (default: none)",
        },
    ),
    (
        "oversubscription",
        {
            "type": float,
            "help": "frames promised to running requests per frame that exists; above 1 the rows "
            "of a batch that do not fit together attend in turns within a step",
        },
    ),
    (
        "stream",
        {
            "type": str,
            "help": "ZMQ endpoint for `arkvale top` and `record`, or off (default: a free port of "
            "this machine alone, told by /server_info)",
        },
    ),
    (
        "check_invariants",
        {
            "action": "store_true",
            "help": "check the page tables whenever the server is idle and stop on a violation",
        },
    ),
    (
        "check_transfers",
        {
            "action": "store_true",
            "help": "keep a checksum of every page sent to host memory and stop if one comes back "
            "changed (slow; without CUDA graphs)",
        },
    ),
)

_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("nnodes", lambda value: value > 1, "several machines (--nnodes)"),
    ("pp_size", lambda value: value > 1, "pipeline parallelism (--pp-size)"),
    ("attn_cp_size", lambda value: value > 1, "context parallelism (--attn-cp-size)"),
    ("dcp_size", lambda value: value > 1, "decode context parallelism (--dcp-size)"),
    ("enable_dp_attention", bool, "DP attention (--enable-dp-attention)"),
    ("attn_dp_size", lambda value: value > 1, "DP attention (--attn-dp-size)"),
    ("dp_size", lambda value: value > 1, "several replicas in one server (--dp-size)"),
    ("use_ray", bool, "Ray (--use-ray)"),
    ("enable_streaming_session", bool, "streaming sessions (--enable-streaming-session)"),
    ("speculative_algorithm", bool, "speculative decoding (--speculative-algorithm)"),
    ("dllm_algorithm", bool, "diffusion decoding (--dllm-algorithm)"),
    ("enable_hierarchical_cache", bool, "HiCache (--enable-hierarchical-cache)"),
    ("enable_lmcache", bool, "LMCache (--enable-lmcache)"),
    ("enable_flexkv", bool, "FlexKV (--enable-flexkv)"),
    ("enable_unified_cache_external_linker", bool, "an external cache linker"),
    ("enable_hisparse", bool, "HiSparse (--enable-hisparse)"),
    ("enable_unified_memory", bool, "unified memory (--enable-unified-memory)"),
    ("enable_page_major_kv_layout", bool, "the page-major KV layout"),
    ("enable_kv_cache_sharding", bool, "KV cache sharding (--enable-kv-cache-sharding)"),
    ("radix_cache_backend", bool, "a custom radix cache (--radix-cache-backend)"),
    (
        "disaggregation_mode",
        lambda value: value != "null",
        "prefill/decode disaggregation (--disaggregation-mode)",
    ),
    (
        "kv_cache_dtype",
        lambda value: value not in ("auto", "bf16", "bfloat16"),
        "a quantised KV cache (--kv-cache-dtype)",
    ),
    ("enable_mixed_chunk", bool, "mixed chunks (--enable-mixed-chunk)"),
    ("enable_two_batch_overlap", bool, "two-batch overlap (--enable-two-batch-overlap)"),
    ("enable_pdmux", bool, "PD multiplexing (--enable-pdmux)"),
    ("enable_deterministic_inference", bool, "deterministic inference"),
    ("enable_memory_saver", bool, "the memory saver (--enable-memory-saver)"),
    ("enable_torch_compile", bool, "torch.compile (--enable-torch-compile)"),
    ("cpu_offload_gb", bool, "weight offload (--cpu-offload-gb)"),
    ("kv_canary", lambda value: value != "none", "the KV canary (--kv-canary)"),
    ("prefill_only_disable_kv_cache", bool, "serving without a KV cache"),
)
"""SGLang features that own or move KV slots in ways the policy does not know yet, or whose
processes would each take the host memory of the machine or miss the policy's settings."""
_REMEDIES = dict.fromkeys(
    ("dp_size", "nnodes"), "run one server per replica behind SGLang's router"
)
"""What to do instead where it is more than turning the feature off."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the policy's flags; defaults live in :class:`ArkValeConfig` alone."""
    group = parser.add_argument_group("arkvale (recallable KV eviction)")
    group.add_argument(
        "--kv-policy",
        choices=POLICIES,
        default="full",
        help="which pages of the KV cache stay on the device: all (stock SGLang), or the ones "
        "that matter, with recall from host memory",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(ArkValeConfig)}
    for name, options in _FLAGS:
        help_text = options["help"]
        if defaults[name] not in (None, False):
            help_text += f" (default: {defaults[name]})"
        group.add_argument(
            f"--{PREFIX}{name}".replace("_", "-"),
            **{**options, "default": None, "help": help_text},
        )


def take_policy(settings: Settings) -> ArkValeConfig | None:
    """Take the policy's settings out of SGLang's, adjust the rest, tell the child processes.

    Args:
        settings: SGLang's settings by name, changed in place: ours are removed, and those that
            the policy needs are set where the user left them open.

    Returns:
        The policy's settings, or ``None`` for stock SGLang.

    Raises:
        ArkValeError: settings that contradict each other or that the policy cannot serve.
    """
    policy = settings.pop("kv_policy", None) or "full"
    ours = {
        name.removeprefix(PREFIX): settings.pop(name)
        for name in list(settings)
        if name.startswith(PREFIX)
    }
    os.environ.pop(CONFIG_ENV, None)
    if policy not in POLICIES:
        raise ArkValeError(
            f"--kv-policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}."
        )
    if policy == "full":
        named = sorted(name for name, value in ours.items() if value not in (None, False))
        if named:
            flag = f"--{PREFIX}{named[0]}".replace("_", "-")
            raise ArkValeError(f"{flag} has no effect without --kv-policy arkvale; add it.")
        return None
    page_size = settings.get("page_size") or DEFAULT_PAGE_SIZE
    config = ArkValeConfig.from_mapping({**ours, "page_size": page_size})
    for name, is_set, feature in _REFUSED:
        value = settings.get(name)
        if value is not None and is_set(value):
            remedy = _REMEDIES.get(name, "turn it off")
            raise ArkValeError(
                f"--kv-policy arkvale does not work with {feature} yet; {remedy} or serve with "
                "--kv-policy full."
            )
    _set_engine(settings, page_size)
    if config.selection != "recall" or config.check_transfers:
        # Graphs are captured for recall alone, and a check reads the device.
        settings["disable_cuda_graph"] = True
    os.environ[CONFIG_ENV] = config.to_json()
    return config


def _set_engine(settings: Settings, page_size: int) -> None:
    """Point SGLang at the policy's backend."""
    settings["page_size"] = page_size
    backend = attention_backend(settings.get("device"))
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        value = settings.get(name)
        if value not in (None, backend):
            flag = f"--{name}".replace("_", "-")
            raise ArkValeError(
                f"{flag} {value} would replace the attention that recalls pages; leave it out "
                "under --kv-policy arkvale."
            )
    settings["attention_backend"] = backend
    if backend != "torch_native":
        settings["disable_prefill_cuda_graph"] = True


def attention_backend(device: str | None = None) -> str:
    """The backend name the policy runs under on a device (``--device``; ``None`` if left open).

    On a CPU SGLang picks torch code paths by the name ``torch_native``, so the policy takes that
    name's place there.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return BACKENDS[0] if on_gpu else BACKENDS[1]


def current_config() -> ArkValeConfig | None:
    """The policy's settings in this process, or ``None`` for stock SGLang."""
    text = os.environ.get(CONFIG_ENV)
    return ArkValeConfig.from_json(text) if text else None
