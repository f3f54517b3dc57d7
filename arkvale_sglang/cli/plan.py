"""What to expect of a model on a device, computed before either is bought: ``arkvale plan``.

Sizes come from the code that sizes a server.  Times come from a model in which a decode step is
bound by memory: everything it reads crosses the device's memory once, and what it recalls crosses
the link to the host besides, not overlapped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import GIB, Memory, PoolPlan, plan_pool
from arkvale_sglang.integration.model_check import FULL_ATTENTION
from arkvale_sglang.policy.admission import FrameAdmission

BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "fp8": 1.0, "int4": 0.5}
EMBEDDING_BYTES = 2.0
"""Least of an embedding's element: quantised checkpoints keep those as they were."""
_OTHERS = {
    "num_local_experts": "experts", "num_experts": "experts", "n_routed_experts": "experts",
    "kv_lora_rank": "latent attention", "sliding_window_pattern": "sliding-window layers",
    "attn_logit_softcapping": "a soft cap on attention logits",
}  # fmt: skip
"""Keys of a configuration that no dense MHA or GQA decoder has."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a Hugging Face ``config.json`` decides about sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype: torch.dtype

    @classmethod
    def from_config(cls, path: Path) -> Model:
        """Read ``config.json``, or the one in a folder.

        Raises:
            ArkValeError: it cannot be read, or describes no dense decoder.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            config: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ArkValeError(
                f"{file} cannot be read as a model's config.json ({error}); name the file or its "
                "folder."
            ) from None
        config = config.get("text_config", config)
        what = next((what for key, what in _OTHERS.items() if config.get(key)), None)
        if set(config.get("layer_types") or ()) - FULL_ATTENTION:
            what = "layers beside full attention"
        if what is not None:
            raise ArkValeError(
                f"{file} describes a model with {what}; arkvale plans only for dense MHA and GQA "
                "decoders."
            )
        try:
            heads = config["num_attention_heads"]
            return cls(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                dtype=getattr(torch, config.get("torch_dtype") or config.get("dtype", "bfloat16")),
            )
        except (KeyError, AttributeError) as error:
            raise ArkValeError(
                f"{file} has no {error}, which a dense MHA or GQA decoder has; arkvale plans only "
                "for those."
            ) from None

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Of a dense decoder with a gated feed-forward, norms left out."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.embeddings

    def weight_bytes(self, weights: str | None, ranks: int) -> int:
        """On one rank, in a type of ``BYTES`` or that of the configuration."""
        each = BYTES[weights] if weights else self.dtype.itemsize
        layers = (self.parameters - self.embeddings) * each
        return int(layers + self.embeddings * max(each, EMBEDDING_BYTES)) // ranks

    def geometry(self, config: ArkValeConfig, ranks: int) -> PageGeometry:
        """Of one rank."""
        return PageGeometry.of(
            config,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            ranks=ranks,
        )


@dataclasses.dataclass(frozen=True)
class Machine:
    """In GiB and GB/s."""

    device_memory: float
    """Of one device."""
    host_memory: float
    """For the backups of all devices, which share it equally."""
    device_bandwidth: float
    link_bandwidth: float
    """Of one device."""
    memory_share: float
    """Of the device's memory, for weights and cache together (SGLang's --mem-fraction-static)."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of it."""

    context: int
    concurrency: int
    hit_rate: float


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What follows, of one rank; bytes and milliseconds."""

    pool: PoolPlan
    weight_bytes: int
    full_requests: int
    """Of the context's length, that full attention holds on the device at once."""
    requests: int
    """That the policy admits at once."""
    recalled_bytes: int
    """Per step of the batch."""
    full_ms: float
    """A step of the batch under full attention, as if its memory sufficed."""
    arkvale_ms: float


def expect(
    config: ArkValeConfig,
    model: Model,
    weight_bytes: int,
    machine: Machine,
    load: Load,
    tp: int = 1,
) -> Expectation:
    """Sizes by the server's own code, times by bytes over bandwidth.

    Raises:
        ArkValeError: weights or cache do not fit.
    """
    geometry = model.geometry(config, tp)
    device = int(machine.device_memory * machine.memory_share * GIB) - weight_bytes
    if device <= 0:
        raise ArkValeError(
            f"{weight_bytes / GIB:.1f} GiB of weights leave nothing of "
            f"{machine.device_memory:g} GiB for a cache; raise --tp or lower --weights."
        )
    host_free = int(machine.host_memory * GIB)
    pool = plan_pool(config, geometry, Memory(device, host_free, shared=False, ranks=tp))
    token_bytes = (geometry.page_host_bytes + geometry.page_dense_bytes) // config.page_size
    admission = FrameAdmission(config, pool)
    requests = min(
        admission.promised // admission.need(load.context),
        pool.logical_tokens // load.context,
        admission.most_requests or pool.logical_pages,
    )
    batch = load.concurrency
    pages = -(-load.context // config.page_size)
    chosen = min(config.budget_pages, pages)
    recalls = chosen < pages and not pool.fits
    absent = min((1 - load.hit_rate) * chosen, config.must_pages) if recalls else 0.0
    recalled = int(batch * absent * geometry.page_host_bytes)
    scanned = pages * geometry.page_digest_bytes if chosen < pages else 0
    row = pages * geometry.page_dense_bytes + chosen * geometry.page_host_bytes + scanned
    bandwidth, link = machine.device_bandwidth * 1e6, machine.link_bandwidth * 1e6
    return Expectation(
        pool=pool,
        weight_bytes=weight_bytes,
        full_requests=device // (load.context * token_bytes),
        requests=requests,
        recalled_bytes=recalled,
        full_ms=(weight_bytes + batch * load.context * token_bytes) / bandwidth,
        arkvale_ms=(weight_bytes + batch * row) / bandwidth + recalled / link,
    )


def lines(expected: Expectation, config: ArkValeConfig, load: Load) -> list[tuple[str, str]]:
    """As people read it."""
    pool = expected.pool
    page = pool.geometry.page_size
    excess = " (do not fit)" if load.concurrency > expected.requests else ""

    def gib(value: float) -> str:
        return f"{value / GIB:,.2f} GiB"

    return [
        ("weights", gib(expected.weight_bytes)),
        ("logical pages", f"{pool.logical_pages:,} ({pool.logical_tokens:,} tokens)"),
        ("host memory for backups", gib(pool.host_bytes)),
        ("frames per lane", f"{pool.frames:,} ({pool.frames * page:,} tokens)"),
        ("frames", gib(pool.frame_bytes)),
        ("dense layers", gib(pool.dense_bytes)),
        ("digests", gib(pool.digest_bytes)),
        ("prefill staging", gib(pool.staging_bytes)),
        ("cache on the device, in all", gib(pool.device_bytes)),
        (f"requests of {load.context:,} tokens at once", f"{expected.requests:,}"),
        ("  under full attention", f"{expected.full_requests:,}"),
        (
            f"recalled per step at {load.hit_rate:.0%} hits",
            f"{expected.recalled_bytes / 1e6:,.2f} MB",
        ),
        (
            f"step of {load.concurrency} requests, predicted{excess}",
            f"{expected.arkvale_ms:,.2f} ms",
        ),
        ("  under full attention, did it fit", f"{expected.full_ms:,.2f} ms"),
        ("  ratio", f"{expected.full_ms / expected.arkvale_ms:.2f}"),
    ]


def flags(config: ArkValeConfig, expected: Expectation, machine: Machine, tp: int) -> str:
    """The server's command line for this plan."""
    pool = expected.pool
    words = [
        "--kv-policy arkvale",
        f"--page-size {config.page_size}",
        f"--mem-fraction-static {machine.memory_share:g}",
        f"--arkvale-host-memory {math.ceil(1e6 * tp * pool.host_bytes / GIB) / 1e6:.10g}",
        f"--arkvale-device-tokens {pool.frames * config.page_size}",
        f"--arkvale-budget {config.budget}",
    ]
    for name in ("top_k", "head_groups", "dense_layers", "digest_dtype"):
        value = getattr(config, name)
        if value != getattr(ArkValeConfig, name):
            words.append(f"--arkvale-{name.replace('_', '-')} {value}")
    return " ".join([*words, *([f"--tp {tp}"] if tp > 1 else [])])


def add_parser(commands: Any) -> None:
    """Add ``arkvale plan`` to the command's parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="compute sizes, batch and step time for a model on a device",
        description=__doc__,
    )
    parser.add_argument(
        "config", type=Path, help="config.json of a Hugging Face model, or its folder"
    )
    parser.add_argument("--device-memory", type=float, required=True, help="GiB of one device")
    parser.add_argument(
        "--host-memory", type=float, required=True, help="GiB for backups, of all devices"
    )
    parser.add_argument("--device-bandwidth", type=float, required=True, help="GB/s of its memory")
    parser.add_argument("--link-bandwidth", type=float, required=True, help="GB/s from the host")
    parser.add_argument("--memory-share", type=float, default=0.85, help="as --mem-fraction-static")
    parser.add_argument("--context", type=int, required=True, help="tokens of a request")
    parser.add_argument("--concurrency", type=int, default=1, help="requests in a step")
    parser.add_argument("--hit-rate", type=float, default=0.95, help="chosen pages on the device")
    parser.add_argument("--weights", choices=BYTES, help="default: the type in config.json")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share it, a device each")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--budget", type=int, default=ArkValeConfig.budget)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--head-groups", type=int, default=ArkValeConfig.head_groups)
    parser.add_argument("--dense-layers", type=int, default=ArkValeConfig.dense_layers)
    parser.add_argument("--digest-dtype", default=ArkValeConfig.digest_dtype)
    parser.add_argument("--device-tokens", type=int, help="as --arkvale-device-tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the cache")
    parser.set_defaults(run=run)


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers that no machine or load has."""
    for name in (
        "device_memory", "host_memory", "device_bandwidth", "link_bandwidth", "memory_share",
        "context", "concurrency", "tp",
    ):  # fmt: skip
        if not getattr(options, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise ArkValeError(f"{flag} is {getattr(options, name)}; make it positive.")
    for name in ("memory_share", "hit_rate"):
        if not 0 <= getattr(options, name) <= 1:
            flag = f"--{name.replace('_', '-')}"
            raise ArkValeError(f"{flag} is {getattr(options, name)}; make it a share from 0 to 1.")


def run(options: argparse.Namespace) -> str:
    """The text that ``arkvale plan`` prints."""
    _check(options)
    config = ArkValeConfig(
        page_size=options.page_size, budget=options.budget, top_k=options.top_k,
        head_groups=options.head_groups, dense_layers=options.dense_layers,
        digest_dtype=options.digest_dtype, host_memory=options.host_memory,
        device_tokens=options.device_tokens,
    )  # fmt: skip
    model = Model.from_config(options.config)
    if options.dtype:
        model = dataclasses.replace(model, dtype=getattr(torch, options.dtype))
    machine = Machine(
        options.device_memory, options.host_memory, options.device_bandwidth,
        options.link_bandwidth, options.memory_share,
    )  # fmt: skip
    load = Load(options.context, options.concurrency, options.hit_rate)
    weight_bytes = model.weight_bytes(options.weights, options.tp)
    expected = expect(config, model, weight_bytes, machine, load, options.tp)
    table = "\n".join(f"  {name:40s} {value:>28s}" for name, value in lines(expected, config, load))
    head = f"  on each of {options.tp} ranks\n" if options.tp > 1 else ""
    dtype = f" --dtype {options.dtype}" if options.dtype else ""
    return f"{head}{table}\n\n  {flags(config, expected, machine, options.tp)}{dtype}"
