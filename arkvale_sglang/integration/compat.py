"""What differs between SGLang releases: where the hooks go, and whether they are still there."""

from __future__ import annotations

import importlib.metadata
import inspect
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

SUPPORTED = ("0.5.17", "0.5.18", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
"""Releases that the suite runs on, oldest first."""

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


class HookPoint(NamedTuple):
    """A function of SGLang that the policy wraps, and the parameters it relies on."""

    target: str
    parameters: tuple[str, ...] = ()
    optional: bool = False
    """Whether some supported release lacks it."""


Hook = Callable[[HookPoint, Any, Callable[..., Any]], None]
"""``hook(point, kind, function)`` registers a function; ``kind`` is SGLang's ``HookType``."""

ADD_CLI_ARGS = HookPoint("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",))
FROM_CLI_ARGS = HookPoint("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",))
CHECK_SERVER_ARGS = HookPoint("sglang.srt.server_args.ServerArgs.check_server_args")
POOL_CONFIGURATOR = HookPoint(
    "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator", ("kvc",)
)
MAX_REQUESTS = HookPoint(f"{_CONFIGURATOR}.resolve_max_num_reqs", ("token_capacity",))
BUILD_POOL = HookPoint(f"{_CONFIGURATOR}._build_mha_kv_pool", ("max_total_num_tokens",))
BUILD_PLATFORM_POOL = HookPoint(  # until 0.5.21; later releases build every pool by BUILD_POOL
    f"{_CONFIGURATOR}._build_oot_mha_kv_pool", ("max_total_num_tokens",), optional=True
)
BUILD_ALLOCATOR = HookPoint(
    f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator", ("sizes", "token_to_kv_pool")
)
PAD_HEADS = HookPoint(
    "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
    ("model_config", "load_config", "tp_size"),
)
ALLOCATE_POOLS = HookPoint(f"{_RUNNER}.alloc_memory_pool")
INIT_BACKENDS = HookPoint(f"{_RUNNER}.init_attention_backends")
ADD_REQUEST = HookPoint("sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", ("req",))
CHECK_DECODE_MEMORY = HookPoint(
    "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem", ("selected_indices",)
)
INIT_METRICS = HookPoint(f"{_SCHEDULER}.init_metrics_collector")
FORWARD = HookPoint(f"{_RUNNER}.forward", ("forward_batch",))
ON_IDLE = HookPoint(f"{_SCHEDULER}.on_idle")
DECODE_LOGGER = "sglang.srt.managers.scheduler_components.metrics_reporter"
"""The logger of SGLang's decode line."""
INTERNAL_STATE = HookPoint(f"{_SCHEDULER}.get_internal_state", ("recv_req",))
CHECK_POOLS = HookPoint(
    "sglang.srt.managers.scheduler_components.invariant_checker."
    "SchedulerInvariantChecker._check_all_pools"
)
NEW_FORWARD_BATCH = HookPoint(
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", ("batch",)
)
GENERATE = HookPoint(f"{_TOKENIZER}.generate_request", ("obj",))
WAIT_FOR_RESPONSE = HookPoint(f"{_TOKENIZER}._wait_one_response", ("obj",))
CHAT_RESPONSE = HookPoint(
    "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response", ("ret",)
)
COMPLETION_RESPONSE = HookPoint(
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion."
    "_build_completion_response",
    ("ret",),
)
VALIDATE_PROMPT = HookPoint(f"{_TOKENIZER}._validate_one_request", ("input_ids",))
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
CAN_RUN_GRAPH = HookPoint(f"{_GRAPHS}.can_run_graph", ("forward_batch",))
CAPTURE_GRAPH = HookPoint(f"{_GRAPHS}.capture_one_shape", ("size",))
GRAPH_KEY = HookPoint(f"{_GRAPHS}._make_graph_key", ("size", "stream_idx", "variant_label"))
FUSED_KV_WRITE = HookPoint("sglang.srt.models.utils.enable_fused_set_kv_buffer", ("forward_batch",))


def version() -> str:
    """The installed SGLang release."""
    return importlib.metadata.version("sglang")


def hook_points() -> dict[str, HookPoint]:
    """Every hook point by its name here, in the order of a server's life."""
    return {name: value for name, value in globals().items() if isinstance(value, HookPoint)}


def problem(point: HookPoint) -> str | None:
    """Why a hook point cannot be used, or ``None``; an optional one may be absent."""
    try:
        function = pkgutil.resolve_name(point.target)
    except (ImportError, AttributeError):
        return None if point.optional else f"{point.target} does not exist"
    except Exception as error:  # of a module that breaks while it is imported
        return f"{point.target} cannot be imported ({type(error).__name__}: {error})"
    parameters = inspect.signature(function).parameters
    missing = [name for name in point.parameters if name not in parameters]
    return f"{point.target} has no parameter {missing[0]!r}" if missing else None


def exists(point: HookPoint) -> bool:
    """Whether the installed release has this hook point."""
    try:
        pkgutil.resolve_name(point.target)
    except (ImportError, AttributeError):
        return False
    return True


def takes_requests() -> bool:
    """Whether requests arrive in this process: it runs the HTTP server or an ``Engine``, which may
    itself be a child."""
    first = multiprocessing.parent_process() is None
    return first or "sglang.srt.managers.tokenizer_manager" in sys.modules


def in_scheduler() -> bool:
    """Whether this child process runs a scheduler; from 0.5.22 on the detokenizer asks too.

    SGLang's entry of a scheduler process lives in the module looked for, and the detokenizer's
    does not import it.
    """
    return "sglang.srt.managers.scheduler" in sys.modules
