"""Hooks where requests arrive and their answers leave, called as SGLang calls them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.integration import flags, requests

FULL = {"custom_params": {"arkvale": {"policy": "full"}}}
BAD = {"custom_params": {"arkvale": {"policy": "none"}}}


@pytest.fixture(params=["arkvale", "stock"])
def config(request, monkeypatch):
    found = ArkValeConfig() if request.param == "arkvale" else None
    monkeypatch.setattr(flags, "current_config", lambda: found)
    return found


def manager(preferred: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(preferred_sampling_params=preferred)


def told(preferred: dict | None, params: object) -> list[dict]:
    """What the pieces of an answer say of their request."""

    async def pieces(manager, obj):
        for _ in range(2):
            yield {"meta_info": {}}

    async def collect():
        answers = requests.tell(pieces, manager(preferred), SimpleNamespace(sampling_params=params))
        return [answer["meta_info"].get("arkvale") async for answer in answers]

    return asyncio.run(collect())


def test_every_piece_says_what_its_request_got(config):
    got = {} if config is None else FULL
    assert told(None, got) == [{"policy": "full"} if config else None] * 2


def test_what_a_server_prefers_is_what_a_request_without_wishes_asks_for(config):
    if config is not None:
        assert told(FULL, None) == [{"policy": "full"}] * 2
        own = {"custom_params": {"arkvale": {"budget": 1024}}}
        assert [one["budget"] for one in told(FULL, own)] == [1024] * 2
    with pytest.raises(ArkValeError):
        requests.check(print, manager(BAD), SimpleNamespace(sampling_params={}))


@pytest.mark.parametrize("params", [BAD, [{}, BAD]], ids=["one", "list"])
def test_nothing_of_what_holds_nonsense_passes(config, params):
    with pytest.raises(ArkValeError):
        requests.check(print, manager(), SimpleNamespace(sampling_params=params))


def passes(params: object) -> bool:
    passed = []
    requests.check(lambda *given: passed.append(given), manager(), SimpleNamespace(
        sampling_params=params
    ))  # fmt: skip
    return len(passed) == 1


@pytest.mark.parametrize(
    "params",
    [None, {}, [{}, None], "text", {"custom_params": None}, {"custom_params": {"other": 1}}],
    ids=str,
)
def test_what_holds_no_wishes_is_for_sglang_to_judge(config, params):
    assert passes(params)


@pytest.mark.parametrize(
    "custom_params", ["x", "", 7, [1], ["x" * 10**6]], ids=lambda a: str(a)[:9]
)
def test_wishes_that_are_no_object_are_refused_where_the_policy_runs(config, custom_params):
    params = {"custom_params": custom_params}
    if config is None:
        assert passes(params)
        return
    with pytest.raises(
        ArkValeError, match=r"^custom_params is .*; make it an object, or"
    ) as caught:
        requests.check(print, manager(), SimpleNamespace(sampling_params=params))
    assert len(str(caught.value)) < 300


def test_a_request_that_came_past_the_check_has_the_servers_settings(caplog):
    params = SimpleNamespace(custom_params="x")
    request, config = SimpleNamespace(sampling_params=params, rid="one"), ArkValeConfig()
    assert requests.settings_for(request, config) is config and "request one has" in caplog.text


def test_a_reader_that_leaves_closes_what_it_read(config):
    closed = []

    async def pieces(manager, obj):
        try:
            while True:
                yield {"meta_info": {}}
        finally:
            closed.append(True)

    async def leave():
        answers = requests.tell(pieces, manager(), SimpleNamespace(sampling_params=None))
        await answers.__anext__()
        await answers.aclose()
        assert closed == [True]

    asyncio.run(leave())
