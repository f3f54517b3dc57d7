"""The settings: defaults, derived pages, the way through JSON, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkvale_kernels.digest import DIGEST_KINDS
from arkvale_kernels.score import HEAD_REDUCES as OP_HEAD_REDUCES
from arkvale_sglang.config.settings import (
    DIGESTS,
    HEAD_REDUCES,
    PAGE_SIZES,
    ArkValeConfig,
    ArkValeError,
)

REFUSED = {
    "page-size": ({"page_size": 48}, "page size 48", "--page-size", {"page_size": 64}),
    "digest": ({"digest": "cube"}, "--arkvale-digest 'cube'", "mean-std", {"digest": "mean-std"}),
    "head-reduce": (
        {"head_reduce": "min"}, "--arkvale-head-reduce 'min'", "softmax-mean",
        {"head_reduce": "softmax-mean"},
    ),
    "sink-pages": ({"sink_pages": -1}, "--arkvale-sink-pages is -1", "to 0", {"sink_pages": 0}),
    "window-pages": (
        {"window_pages": 0}, "--arkvale-window-pages is 0", "to 1", {"window_pages": 1},
    ),
    "head-groups": ({"head_groups": 0}, "--arkvale-head-groups is 0", "to 1", {"head_groups": 1}),
    "dense-layers": (
        {"dense_layers": -2}, "--arkvale-dense-layers is -2", "to 0", {"dense_layers": 0},
    ),
    "recall-cap": ({"recall_cap": -1}, "--arkvale-recall-cap is -1", "to 0", {"recall_cap": 0}),
    "device-tokens": (
        {"device_tokens": 31}, "--arkvale-device-tokens is 31", "to 32", {"device_tokens": 32},
    ),
    "top-k-low": ({"top_k": 0}, "--arkvale-top-k is 0", "to 1", {"top_k": 1}),
    "top-k-high": (
        {"top_k": 5000}, "--arkvale-top-k 5000", "raise the other", {"top_k": 5000, "budget": 5000},
    ),
    "oversubscription": (
        {"oversubscription": 0.5}, "--arkvale-oversubscription is 0.5", "to 1",
        {"oversubscription": 1},
    ),
    "host-memory": (
        {"host_memory": 0.0}, "--arkvale-host-memory is 0.0", "positive", {"host_memory": 0.5},
    ),
    "host-memory-nan": (
        {"host_memory": math.nan}, "--arkvale-host-memory is nan", "positive", {"host_memory": 1.0},
    ),
    "budget": ({"budget": 159}, "--arkvale-budget 159", "at least 160", {"budget": 160}),
    "budget-negative": ({"budget": -1}, "--arkvale-budget -1", "at least 160", {"budget": 160}),
    "budget-for-its-window": (
        {"budget": 160, "window_pages": 9}, "2 sink and 9 window pages of 32 tokens",
        "at least 384", {"budget": 384, "window_pages": 9},
    ),
}  # fmt: skip
"""Name: what is set, what the message must name, its remedy, and the settings that follow it."""


def assert_sentence(message: str) -> None:
    """One sentence of two halves: what and why, then what to do."""
    assert message.endswith(".") and not message.endswith("..")
    assert ". " not in message and "\n" not in message
    what, _, remedy = message.partition("; ")
    assert what and remedy[:1].islower(), message


@pytest.mark.parametrize("values, names, remedy, cured", REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_is_one_sentence_whose_advice_works(values, names, remedy, cured):
    """What is wrong by flag and value, what to do, and doing so is accepted."""
    with pytest.raises(ArkValeError) as caught:
        ArkValeConfig(**values)
    message = str(caught.value)
    assert_sentence(message)
    assert names in message and remedy in message.partition("; ")[2]
    ArkValeConfig(**cured)


@pytest.mark.parametrize("name", ["oversubscription", "host_memory"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_numbers_that_are_not_finite_are_refused(name, value):
    """A command line parses "nan" and "inf" as numbers; sizes computed from them would fail later,
    far from the flag."""
    with pytest.raises(ArkValeError) as caught:
        ArkValeConfig(**{name: value})
    assert_sentence(str(caught.value))
    assert name.replace("_", "-") in str(caught.value)


def test_the_error_is_a_value_error():
    """Callers that know nothing of the policy can catch it."""
    assert issubclass(ArkValeError, ValueError)


def test_defaults_are_those_of_the_design():
    """Budget 4096 tokens, two sinks, two window pages, two dense layers, the paper's digest."""
    config = ArkValeConfig()
    assert (config.budget, config.page_size, config.budget_pages) == (4096, 32, 128)
    assert (config.sink_pages, config.window_pages, config.dense_layers) == (2, 2, 2)
    assert (config.digest, config.head_groups, config.head_reduce) == ("cuboid-center", 1, "mean")
    assert config.must_pages == 1280 // 32, "the paper's bound on recalled tokens"
    assert config.oversubscription == 1.0 and not config.check_invariants
    nones = (config.top_k, config.host_memory, config.device_tokens, config.recall_cap)
    assert nones == (None,) * 4


def test_settings_are_frozen():
    """One object is shared by all parts of the server."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ArkValeConfig().budget = 1


@pytest.mark.parametrize(
    "values, must",
    [
        ({"budget": 1024}, 16),
        ({"budget": 4096, "page_size": 16}, 80),
        ({"budget": 160}, 1),
        ({"budget": 1024, "top_k": 64}, 2),
        ({"budget": 1024, "top_k": 1}, 1),
        ({"budget": 1024, "top_k": 1024}, 28),
    ],
    ids=str,
)
def test_must_pages_are_half_the_budget_at_most_1280_tokens_or_what_the_user_says(values, must):
    """Never less than one page and never more than sinks and window leave."""
    assert ArkValeConfig(**values).must_pages == must


def valid() -> st.SearchStrategy[ArkValeConfig]:
    """Any settings that do not contradict each other."""

    def build(page_size, sinks, window, extra, top_k_share, values):
        budget = (sinks + window + 1) * page_size + extra
        top_k = None if top_k_share is None else max(1, int(top_k_share * budget))
        return ArkValeConfig(
            page_size=page_size, sink_pages=sinks, window_pages=window, budget=budget,
            top_k=top_k, **values,
        )  # fmt: skip

    whole = st.integers(1, 50)
    values = {
        "digest": st.sampled_from(DIGESTS),
        "head_groups": whole,
        "head_reduce": st.sampled_from(HEAD_REDUCES),
        "dense_layers": st.integers(0, 9),
        "host_memory": st.none() | st.floats(1e-3, 1e4),
        "device_tokens": st.none() | st.integers(64, 10**6),
        "recall_cap": st.none() | st.integers(0, 50),
        "oversubscription": st.floats(1.0, 16.0),
        "check_invariants": st.booleans(),
    }
    return st.builds(
        build, st.sampled_from(PAGE_SIZES), st.integers(0, 5), st.integers(1, 5),
        st.integers(0, 10**5), st.none() | st.floats(0, 1), st.fixed_dictionaries(values),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(valid())
def test_settings_survive_json(config):
    """The scheduler process receives them as text."""
    assert ArkValeConfig.from_json(config.to_json()) == config
    assert ArkValeConfig.from_mapping(json.loads(config.to_json())) == config


@settings(max_examples=100, deadline=None)
@given(valid())
def test_forced_and_must_pages_always_fit_the_budget(config):
    """Sinks, window and must pages leave no row with more than its budget."""
    assert config.must_pages >= 1
    assert config.sink_pages + config.window_pages + config.must_pages <= config.budget_pages
    assert config.budget_pages * config.page_size <= config.budget
    if config.top_k is None:
        assert config.must_pages == 1 or config.must_pages <= config.budget_pages / 2


def test_a_mapping_takes_none_for_the_default_and_refuses_unknown_names():
    """Flags that were not given arrive as ``None``."""
    assert ArkValeConfig.from_mapping({"budget": None, "digest": "mean-std"}) == ArkValeConfig(
        digest="mean-std"
    )
    with pytest.raises(ArkValeError) as caught:
        ArkValeConfig.from_mapping({"budgets": 3})
    assert_sentence(str(caught.value))
    assert "'budgets'" in str(caught.value) and "budget, " in str(caught.value)


def test_the_choices_are_those_the_ops_know():
    """Settings import nothing of the kernels, so the lists are written twice."""
    assert DIGESTS == DIGEST_KINDS and HEAD_REDUCES == OP_HEAD_REDUCES


def test_a_request_may_set_its_own_budget_and_rule():
    server = ArkValeConfig(budget=2048, top_k=1024)
    assert server.for_request(None) is server
    own = server.for_request({"budget": 512, "selection": "h2o"})
    assert (own.budget, own.top_k, own.selection) == (512, 512, "h2o")
    assert own.must_pages == own.budget_pages - own.sink_pages - own.window_pages
    assert dataclasses.replace(own, budget=2048, top_k=1024, selection="recall") == server


def test_a_full_request_needs_a_frame_for_its_open_page_alone():
    full = ArkValeConfig(selection="h2o").for_request({"policy": "full"})
    assert (full.policy, full.selection, full.frame_pages) == ("full", "recall", 1)
    assert full.as_reported() == {"policy": "full"}
    assert ArkValeConfig().frame_pages == ArkValeConfig().budget_pages


def test_what_equals_the_servers_settings_is_them():
    """So that a batch of such requests is planned as one of requests without wishes."""
    server = ArkValeConfig()
    for wishes in ({}, {"policy": "arkvale"}, {"budget": server.budget}):
        assert server.for_request(wishes) is server


def test_requests_that_come_to_the_same_pages_have_the_same_settings():
    """So that they attend together and no more settings exist than page counts."""
    server = ArkValeConfig(page_size=16)
    assert len({server.for_request({"budget": n, "top_k": 40}) for n in range(288, 304)}) == 1
    assert server.for_request({"budget": 288, "top_k": 3}).top_k == 16


def test_what_is_reported_is_whole_pages_in_tokens():
    own = ArkValeConfig(page_size=16).for_request({"budget": 300, "head_reduce": "max"})
    assert own.as_reported() == {
        "policy": "arkvale", "budget": 288, "top_k": 144, "head_reduce": "max",
        "selection": "recall",
    }  # fmt: skip


def test_a_server_cannot_have_the_policy_of_a_request():
    with pytest.raises(ArkValeError) as caught:
        ArkValeConfig.from_mapping({"policy": "full"})
    assert_sentence(str(caught.value))
    assert "--kv-policy full" in str(caught.value)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (3, "is 3; make it an object"),
        ({"page_size": 16}, "'page_size', which no request can set; use any of policy, budget"),
        ({"budget": "many"}, r"\['budget'\] is 'many'; give it a whole number"),
        ({"budget": True}, r"\['budget'\] is True; give it a whole number"),
        ({"budget": 4096}, "4096 tokens, but this server was started with --arkvale-budget 2048"),
        ({"budget": 96}, "leaves no page to choose"),
        ({"top_k": 0}, "must be at least 1"),
        ({"selection": "lru"}, "'lru' is unknown; choose one of recall, streaming, snapkv, h2o"),
        ({"policy": "lru"}, r"\['policy'\] 'lru' is unknown; choose one of full, arkvale"),
        ({"policy": True}, r"\['policy'\] is True; give it a name"),
        ({"policy": "full", "top_k": 64}, "'top_k' beside the policy 'full'"),
        ({"head_reduce": 1}, r"\['head_reduce'\] is 1; give it a name"),
    ],
)
def test_nonsense_from_a_request_is_refused_in_a_sentence(wishes, message):
    with pytest.raises(ArkValeError, match=message):
        ArkValeConfig(budget=2048).for_request(wishes)


@pytest.mark.parametrize(
    "wishes",
    ["x" * 10**6, [["x" * 99] * 99] * 99, {"x" * 10**6: 1}, {"budget": ["x"] * 10**6},
     {"policy": "x" * 10**6}, {"selection": "x" * 10**6}, {"budget": 10**3000}],
    ids=["text", "list", "name", "value", "policy", "rule", "number"],
)  # fmt: skip
def test_a_refusal_repeats_no_more_than_a_sentence_holds(wishes):
    with pytest.raises(ArkValeError) as caught:
        ArkValeConfig().for_request(wishes)
    assert len(str(caught.value)) < 300 and "; " in str(caught.value)
