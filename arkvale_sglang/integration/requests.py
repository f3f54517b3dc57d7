"""What a request asks of the policy for itself: checked before it is queued, kept with its batch,
told back with its answer.

Requests carry it as ``custom_params: {"arkvale": {"budget": 1024, ...}}``, which SGLang takes among
the sampling parameters of ``/generate``, chats, completions and ``Engine.generate``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError, shown
from arkvale_sglang.integration import compat, flags

logger = logging.getLogger(__name__)

KEY = "arkvale"
"""Of ``custom_params``, ``meta_info`` and an OpenAI response's ``metadata``."""
_OF_REQUEST = "arkvale_config"
_OF_ROWS = "arkvale_settings"


def install(hook: compat.Hook) -> None:
    """Register the hooks of the process in which requests arrive; as for the scheduler's."""
    hook(compat.GENERATE, HookType.AROUND, check)
    hook(compat.WAIT_FOR_RESPONSE, HookType.AROUND, tell)
    hook(compat.CHAT_RESPONSE, HookType.AFTER, tell_openai)
    hook(compat.COMPLETION_RESPONSE, HookType.AFTER, tell_openai)
    hook(compat.VALIDATE_PROMPT, HookType.AFTER, check_prompt)


def _wishes(custom_params: object) -> object:
    """What is asked of the policy; ``None`` for nothing.

    Raises:
        ArkValeError: nobody can tell, since it is no object.
    """
    if custom_params is None:
        return None
    if not isinstance(custom_params, Mapping):
        raise ArkValeError(
            f"custom_params is {shown(custom_params)}; make it an object, or leave it out."
        )
    return custom_params.get(KEY)


def _settings(manager: Any, sampling_params: object) -> ArkValeConfig | None:
    """What a request of these sampling parameters is served with; ``None`` under stock SGLang.

    What are no sampling parameters at all is for SGLang to refuse.

    Raises:
        ArkValeError: the request asks for what cannot be served.
    """
    params = dict(manager.preferred_sampling_params or {})
    if isinstance(sampling_params, Mapping):
        params.update(sampling_params)
    custom_params = params.get("custom_params")
    config = flags.current_config()
    if config is not None:
        return config.for_request(_wishes(custom_params))
    if isinstance(custom_params, Mapping) and custom_params.get(KEY) is not None:
        raise ArkValeError(
            f"custom_params[{KEY!r}] has no effect without --kv-policy arkvale; leave it out or "
            "start the server with it."
        )
    return None


def check(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    """Around the door that all requests come through: refuse what cannot be served (HTTP 400).

    A list of requests is refused as a whole, before any of it is queued.
    """
    params = obj.sampling_params
    for each in params if isinstance(params, list) else [params]:
        _settings(manager, each)
    return original(manager, obj, *args, **kwargs)


def tell(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[dict[str, Any], None]:
    """Around the answers of one request: add the settings it is served with to ``meta_info``."""
    answers = original(manager, obj, *args, **kwargs)
    settings = _settings(manager, obj.sampling_params)
    return answers if settings is None else _with_settings(answers, settings.as_reported())


async def _with_settings(
    answers: AsyncGenerator[dict[str, Any], None], reported: dict[str, str | int]
) -> AsyncGenerator[dict[str, Any], None]:
    async with contextlib.aclosing(answers):
        async for answer in answers:
            answer["meta_info"][KEY] = reported
            yield answer


def tell_openai(
    response: Any, serving: Any, request: Any, ret: list[dict[str, Any]], *args: Any, **kwargs: Any
) -> None:
    """After SGLang built an OpenAI response that is not streamed: the same in its ``metadata``."""
    reported = ret[0]["meta_info"].get(KEY)
    if reported is not None and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), KEY: reported}


def settings_for(request: Any, config: ArkValeConfig) -> ArkValeConfig:
    """What a scheduler's request is served with on a server of these settings.

    Worked out once for a request: every pass of its batch asks.
    """
    known: ArkValeConfig | None = getattr(request, _OF_REQUEST, None)
    if known is None:
        try:
            known = config.for_request(_wishes(request.sampling_params.custom_params))
        except ArkValeError as error:  # came past the check, which the HTTP server makes
            logger.warning("%s; request %s has the server's settings.", error, request.rid)
            known = config
        setattr(request, _OF_REQUEST, known)
    return known


def check_prompt(
    result: None, manager: Any, obj: Any, input_ids: list[int] | None, *args: Any, **kwargs: Any
) -> None:
    """After SGLang's own check of a prompt, which lets through token ids that no embedding has and
    that would end the scheduler."""
    if not input_ids or flags.current_config() is None:
        return
    known = manager.model_config.vocab_size
    for token in (min(input_ids), max(input_ids)):
        if not 0 <= token < known:
            raise ValueError(
                f"the prompt has the token id {token}, but the model knows 0 to {known - 1}; send "
                "ids of its vocabulary."
            )


def attach(config: ArkValeConfig) -> Callable[..., Any]:
    """A hook that keeps each row's settings with the forward batch, if any row has its own.

    They ride on the batch's sampling information: SGLang copies forward batches field by field.
    """

    def new_batch(
        original: Callable[..., Any], cls: type, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(cls, batch, *args, **kwargs)
        settings = [settings_for(request, config) for request in batch.reqs]
        own = any(each is not config for each in settings)
        if result.sampling_info is not None:
            setattr(result.sampling_info, _OF_ROWS, settings if own else None)
        return result

    return new_batch


def settings_of(forward_batch: Any) -> list[ArkValeConfig] | None:
    """Settings of each row, or ``None`` where all rows have the server's."""
    found: list[ArkValeConfig] | None = getattr(forward_batch.sampling_info, _OF_ROWS, None)
    return found
