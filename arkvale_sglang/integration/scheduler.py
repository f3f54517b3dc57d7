"""Hooks in SGLang's scheduler process: sizes, pools, admission, state, and the self-check."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.model_executor import pool_configurator
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.sizing import PoolPlan, plan_pool
from arkvale_sglang.integration import compat, flags, model_check, ranks, requests
from arkvale_sglang.integration.backend import ArkValeBackend, choose_attention
from arkvale_sglang.integration.pool import (
    ArkValeKVPool,
    allocator_class,
    expected_tokens,
    tokens_of,
)
from arkvale_sglang.integration.watching import Watching
from arkvale_sglang.policy.admission import FrameAdmission

logger = logging.getLogger(__name__)


def install(config: ArkValeConfig, hook: compat.Hook) -> None:
    """Register every hook of the scheduler process with ``hook(point, kind, function)``."""
    wiring = Wiring(config)
    watching = wiring.watching
    around, after = HookType.AROUND, HookType.AFTER
    hook(compat.PAD_HEADS, around, _heads_as_they_are)
    hook(compat.POOL_CONFIGURATOR, around, wiring.create_configurator)
    hook(compat.MAX_REQUESTS, around, wiring.max_requests)
    hook(compat.BUILD_POOL, around, wiring.build_pool)
    hook(compat.BUILD_PLATFORM_POOL, around, wiring.build_pool)
    hook(compat.BUILD_ALLOCATOR, around, wiring.build_allocator)
    hook(compat.ALLOCATE_POOLS, after, wiring.check_pools)
    hook(compat.INIT_BACKENDS, after, wiring.check_backend)
    hook(compat.ADD_REQUEST, around, wiring.add_request)
    hook(compat.CHECK_DECODE_MEMORY, around, wiring.check_decode_memory)
    hook(compat.NEW_FORWARD_BATCH, around, requests.attach(config))
    hook(compat.INIT_METRICS, after, watching.take_context)
    hook(compat.FORWARD, after, watching.after_pass)
    hook(compat.ON_IDLE, HookType.BEFORE, watching.before_idling)
    hook(compat.INTERNAL_STATE, after, wiring.internal_state)
    hook(compat.CHECK_POOLS, after, wiring.check_invariants)
    hook(compat.FUSED_KV_WRITE, HookType.REPLACE, _no_fused_kv_write)
    if torch.cuda.is_available():
        from arkvale_sglang.integration import cuda_graph

        cuda_graph.install(hook)
    for name in flags.BACKENDS:  # the device that decides between them is not known here
        attention_registry.ATTENTION_BACKENDS[name] = ArkValeBackend


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """End the server with the sentence of a refusal, told the way SGLang's own failures are."""
    try:
        yield
    except ArkValeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        server = multiprocessing.parent_process()
        if server is not None and server.pid is not None:
            os.kill(server.pid, signal.SIGQUIT)
        raise SystemExit(1) from None


def _heads_as_they_are(
    original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int
) -> Any:
    """Where ranks outnumber KV heads, a plain CPU gives each a copy, as a GPU does; SGLang would
    pad the heads, which only its own CPU kernels can load."""
    if current_platform.is_out_of_tree() and model_config.get_num_kv_heads(1) % tp_size:
        return model_config
    return original(model_config, load_config, tp_size)


def _end(error: ArkValeError) -> None:
    """The same for what is found while requests run."""
    with _one_sentence():
        raise error


def _no_fused_kv_write(forward_batch: Any) -> bool:
    """Models must not write K and V by slot themselves: slots are logical."""
    return False


class Configurator(pool_configurator.MemoryPoolConfigurator):
    """Turns SGLang's memory budget into a plan of logical pages and frames."""

    def __init__(self, wiring: Wiring, kvc: Any):
        self._wiring, self._kvc = wiring, kvc

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> Any:
        """From SGLang's byte budget."""
        self._wiring.available_bytes = available_bytes
        return self._plan(None)

    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> Any:
        """Under a cap on tokens (`--max-total-tokens`)."""
        return self._plan(max_total_num_tokens)

    def _plan(self, max_tokens: int | None) -> Any:
        """Size once more; SGLang asks several times and must get the same answer."""
        wiring, kvc = self._wiring, self._kvc
        model, layers = kvc.model_config, kvc.layer_info.num_effective_layers
        with _one_sentence():
            model_check.check_kv_dtype(model.dtype, kvc.kv_cache_dtype)
            geometry = model_check.geometry_of(
                wiring.config, model, layers, ranks.count(), kvc.kv_cache_dtype
            )
            memory = ranks.agree(wiring.available_bytes, wiring.host_free, kvc.device == "cpu")
            wiring.plan = plan_pool(wiring.config, geometry, memory, max_tokens)
        return pool_configurator.MemoryPoolConfig(max_total_num_tokens=wiring.plan.logical_tokens)


class Wiring:
    """State that the hooks share: the plan once sized, the cache once built."""

    def __init__(self, config: ArkValeConfig):
        self.config = config
        self.available_bytes = 0
        self.host_free = psutil.virtual_memory().available
        self.plan: PoolPlan
        self.pool: ArkValeKVPool
        self.allocator: Any
        self.watching = Watching(config)

    def create_configurator(self, original: Callable[..., Any], kvc: Any) -> Configurator:
        """Replace the sizing of SGLang's pool."""
        return Configurator(self, kvc)

    def max_requests(self, original: Callable[..., int], kvc: Any, token_capacity: int) -> int:
        """Every running request pins one open page, so frames bound their number too."""
        most = FrameAdmission(self.config, self.plan).most_requests
        requests = original(kvc, token_capacity)
        return requests if most is None else min(requests, most)

    def build_pool(
        self, original: Callable[..., Any], kvc: Any, *, max_total_num_tokens: int, **kwargs: Any
    ) -> ArkValeKVPool:
        """Build the cache where SGLang would build its pool."""
        geometry, layers = self.plan.geometry, kvc.layer_info
        with _one_sentence():
            self.pool = ArkValeKVPool(
                max_total_num_tokens,
                page_size=self.config.page_size,
                dtype=kvc.kv_cache_dtype,
                head_num=geometry.kv_heads,
                head_dim=geometry.head_dim,
                layer_num=layers.num_effective_layers,
                device=kvc.device,
                enable_memory_saver=False,
                start_layer=layers.start_layer,
                end_layer=layers.end_layer,
                plan=self.plan,
                config=self.config,
            )
        if self.pool.cache.checksums is not None:
            self.pool.cache.checksums.fail = _end
        return self.pool

    def build_allocator(
        self,
        original: Callable[..., Any],
        kvc: Any,
        *,
        sizes: Any,
        token_to_kv_pool: ArkValeKVPool,
        **kwargs: Any,
    ) -> Any:
        """Build the allocator of logical slots."""
        base = PagedTokenToKVPoolAllocator
        if current_platform.is_out_of_tree():
            base = current_platform.get_paged_allocator_cls()
        self.allocator = allocator_class(base)(
            sizes.max_total_num_tokens,
            page_size=self.config.page_size,
            dtype=kvc.kv_cache_dtype,
            device=kvc.device,
            kvcache=token_to_kv_pool,
            need_sort=False,
        )
        return self.allocator

    def check_pools(self, result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
        """The self-check, first half: the pools that SGLang keeps are ours, and the model fits."""
        with _one_sentence():
            model_check.check_loaded(runner.model)
            device = self.pool.cache.store.device
            choose_attention(self.config, self.plan.geometry, device)
        pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
        if pool is not self.pool or getattr(allocator, "cache", None) is not self.pool.cache:
            raise RuntimeError(
                f"--kv-policy arkvale was asked for but SGLang {compat.version()} built "
                f"{type(pool).__name__} and {type(allocator).__name__}; report this, and serve "
                "with --kv-policy full meanwhile."
            )
        logger.info("arkvale: %s", self.plan.describe())

    def check_backend(self, result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
        """The self-check, second half: attention goes through our backend.  Watching begins."""
        backend = runner.attn_backend
        if not isinstance(backend, ArkValeBackend):
            raise RuntimeError(
                f"--kv-policy arkvale was asked for but attention runs on "
                f"{type(backend).__name__}; remove other attention backend settings."
            )
        with _one_sentence():
            self.watching.start(self.pool.cache)

    def add_request(
        self, original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Admit a waiting request only while the frames can serve all who then run.

        Each counts with the growth that SGLang itself expects of it; its estimate rises with every
        retraction, so requests are not admitted only to be retracted a page later.  ``OTHER`` ends
        the pass without marking the batch full: that mark would stay until a running request
        leaves, and keep out shorter ones that come to the head of the queue meanwhile.
        """
        running = (*adder.running_batch.reqs, *adder.can_run_list, req)
        if not self._frames_hold(running, expected_tokens(running, adder.new_token_ratio)):
            return AddReqResult.OTHER
        return original(adder, req, *args, **kwargs)

    def check_decode_memory(
        self, original: Callable[..., bool], batch: Any, selected_indices: list[int] | None = None
    ) -> bool:
        """Whether slots and frames suffice for the next decode step; ``False`` retracts."""
        running = batch.reqs
        if selected_indices is not None:
            running = [batch.reqs[index] for index in selected_indices]
        enough = original(batch, selected_indices=selected_indices)
        return enough and self._frames_hold(running, tokens_of(running))

    def _frames_hold(self, running: Sequence[Any], tokens: Iterable[int]) -> bool:
        """Whether frames suffice for the next step of requests that hold so many tokens each."""
        settings = [requests.settings_for(request, self.config) for request in running]
        return self.pool.cache.admission.holds(tokens, settings)

    def internal_state(self, result: Any, scheduler: Any, recv_req: Any) -> Any:
        """Show settings and counters under ``internal_states[0]["arkvale"]`` of /server_info."""
        result.internal_state["arkvale"] = {
            **self.pool.cache.report(),
            "stream": self.watching.endpoint,
            "watching_seconds": self.watching.seconds,
        }
        return result

    def check_invariants(self, result: tuple[bool, list[str]], *args: Any, **kwargs: Any) -> Any:
        """Add our laws to SGLang's idle leak check."""
        if not self.config.check_invariants:
            return result
        self.pool.cache.settle()
        live = self.allocator.live_page_ids()
        found = [f"arkvale: {violation}" for violation in self.pool.cache.store.violations(live)]
        leaked, messages = result
        return leaked or bool(found), [*messages, *found]
