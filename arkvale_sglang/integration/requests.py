"""What a request asks of the policy for itself: checked before it is queued, kept with its batch.

Requests carry it as ``custom_params: {"arkvale": {"budget": 1024, ...}}``, which SGLang takes among
the sampling parameters of all its endpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.integration import flags

logger = logging.getLogger(__name__)

KEY = "arkvale"
_OF_REQUEST = "arkvale_config"
_OF_ROWS = "arkvale_settings"


def _wishes(sampling_params: Any) -> object:
    custom = sampling_params.custom_params
    return custom.get(KEY) if isinstance(custom, dict) else None


def check(result: None, sampling_params: Any, *args: Any, **kwargs: Any) -> None:
    """After SGLang's own check of a request: refuse what cannot be served (HTTP 400)."""
    wishes = _wishes(sampling_params)
    config = flags.current_config()
    if wishes is None:
        return
    if config is None:
        raise ValueError(
            f"custom_params[{KEY!r}] has no effect without --kv-policy arkvale; leave it out or "
            "start the server with it."
        )
    config.for_request(wishes)


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

    def settings_for(request: Any) -> ArkValeConfig:
        """Worked out once for a request: every pass of its batch asks."""
        known: ArkValeConfig | None = getattr(request, _OF_REQUEST, None)
        if known is None:
            try:
                known = config.for_request(_wishes(request.sampling_params))
            except ArkValeError as error:  # came past the check, which the HTTP server makes
                logger.warning("%s; request %s has the server's settings.", error, request.rid)
                known = config
            setattr(request, _OF_REQUEST, known)
        return known

    def new_batch(
        original: Callable[..., Any], cls: type, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(cls, batch, *args, **kwargs)
        settings = [settings_for(request) for request in batch.reqs]
        own = any(each is not config for each in settings)
        if result.sampling_info is not None:
            setattr(result.sampling_info, _OF_ROWS, settings if own else None)
        return result

    return new_batch


def settings_of(forward_batch: Any) -> list[ArkValeConfig] | None:
    """Settings of each row, or ``None`` where all rows have the server's."""
    found: list[ArkValeConfig] | None = getattr(forward_batch.sampling_info, _OF_ROWS, None)
    return found
