"""Entry point of the plugin: flags in every process, the cache where the policy is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.integration import compat, flags, requests


def register() -> None:
    """Called by SGLang in each of its processes, before it reads its arguments.

    SGLang logs and swallows the exceptions of a plugin, which would leave a stock server behind an
    arkvale flag, so a hook that cannot be placed ends the process instead.
    """
    _hook(compat.ADD_CLI_ARGS, HookType.AFTER, _add_cli_args)
    _hook(compat.FROM_CLI_ARGS, HookType.AROUND, _from_cli_args)
    _hook(compat.CHECK_SERVER_ARGS, HookType.AFTER, _check_server_args)
    _teach_engine()
    config = flags.current_config()
    if config is not None and not _parses_arguments() and compat.in_scheduler():
        from arkvale_sglang.integration import scheduler

        scheduler.install(config, _hook)
    if compat.takes_requests():
        requests.install(_hook)
    HookRegistry.apply_hooks()
    _verify()


_hooked: list[compat.HookPoint] = []


def _hook(point: compat.HookPoint, kind: HookType, function: Callable[..., Any]) -> None:
    """Register a hook after checking that its target is what we think it is."""
    reason = compat.problem(point)
    if reason is not None:
        raise SystemExit(
            f"arkvale: SGLang {compat.version()} is not supported because {reason}; install a "
            f"release from {compat.SUPPORTED[0]} to {compat.SUPPORTED[-1]}, or see what `arkvale "
            "doctor` says."
        )
    if compat.exists(point):
        HookRegistry.register(point.target, function, kind)
        _hooked.append(point)


def _verify() -> None:
    """End the process if SGLang failed to apply a hook (it only logs that)."""
    missing = [point.target for point in _hooked if point.target not in HookRegistry._patched]
    if missing:
        raise SystemExit(
            f"arkvale: SGLang {compat.version()} did not apply the hook on {missing[0]}; see the "
            "error above."
        )


def _parses_arguments() -> bool:
    """Whether this process is about to read arguments of its own (an inherited variable from an
    outer server must not reach it)."""
    import multiprocessing

    return multiprocessing.parent_process() is None


def _add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    flags.add_flags(parser)


def _from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    try:
        flags.take_policy(vars(args))
    except ArkValeError as error:
        raise SystemExit(f"error: {error}") from None
    return original(cls, args)


def _check_server_args(result: None, server_args: Any) -> None:
    """Before anything is started: refuse what the model makes impossible."""
    config = flags.current_config()
    if config is None:
        return
    from arkvale_sglang.integration import model_check

    try:
        model_check.check_before_start(config, server_args)
    except ArkValeError as error:
        raise SystemExit(f"error: {error}") from None


def _teach_engine() -> None:
    """Let ``sglang.Engine(kv_policy=..., arkvale_budget=...)`` take the flags by name."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    if module is None:
        return
    original = module.Engine.server_args_class

    def server_args(**settings: Any) -> Any:
        flags.take_policy(settings)
        return original(**settings)

    module.Engine.server_args_class = staticmethod(server_args)
