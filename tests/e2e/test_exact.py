"""Where the budget covers the context, the policy is stock SGLang to the rounding of attention.

Every request runs on stock SGLang and under the policy with so few frames that pages are evicted
and recalled all the time.  Greedy tokens must be equal; log-probabilities are measured against the
same model in float64, and the policy may err at most ``SLACK`` times as much as stock does.
"""

from __future__ import annotations

import dataclasses
import urllib.error

import pytest

from support.serving import TWO_RANKS, Ruler, generate, generate_together, prompt, wait_idle

SLACK = 4.0
"""Partial results merged by log-sum-exp round once more than one pass does, and the worst of a few
dozen roundings scatters by another factor of two from machine to machine."""
FRAME_TOKENS = 768
BUDGET = 512


@dataclasses.dataclass(frozen=True)
class Shape:
    arch: str
    kv_heads: int
    head_dim: int
    flags: tuple[tuple[str, ...], ...]
    """One server for each of these."""
    env: dict[str, str] | None = None
    """Of these servers."""


TIGHT = (
    "--kv-policy", "arkvale", "--arkvale-budget", str(BUDGET),
    "--arkvale-device-tokens", str(FRAME_TOKENS), "--arkvale-host-memory", "0.25",
    "--arkvale-oversubscription", "8", "--arkvale-check-invariants", "--arkvale-dense-layers", "1",
)  # fmt: skip
PAGE_16 = (*TIGHT, "--page-size", "16", "--chunked-prefill-size", "48")
PAGE_32 = (*TIGHT, "--chunked-prefill-size", "480", "--disable-overlap-schedule")
GROUPS = (*TIGHT, "--arkvale-head-groups", "2", "--chunked-prefill-size", "320")
RANKS = (*PAGE_32, "--tp", "2")
ROOMY = ("--kv-policy", "arkvale", "--arkvale-budget", "16384", "--arkvale-host-memory", "0.25")

SHAPES = [
    Shape("llama", 2, 64, (PAGE_16, GROUPS, ROOMY)),
    # One KV head for two ranks: each has a copy.
    Shape("qwen2", 1, 64, (RANKS,), TWO_RANKS),
    Shape("qwen3", 4, 128, (PAGE_16,)),
    Shape("mistral", 8, 64, (PAGE_32,)),
]
TOGETHER = [prompt(length, seed) for seed, length in enumerate((350, 211, 451, 33, 320))]
LONG = prompt(4 * FRAME_TOKENS + 77, 100)
TURNS = [(prompt(250, 200), prompt(60, 201)), (prompt(350, 202), prompt(45, 203))]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.arch)
def sides(request, tiny, serve):
    """The ruler, stock, and the policy's servers of one model shape."""
    shape = request.param
    model = tiny(shape.arch, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="float32")
    stock = serve(model, "--kv-policy", "full", "--max-total-tokens", "16384")
    servers = [serve(model, *flags, env=shape.env) for flags in shape.flags]
    yield Ruler(model), stock, servers
    for server in (stock, *servers):
        server.stop()


def assert_same(
    ruler: Ruler, prompts: list[list[int]], expected: list[dict], found: list[dict]
) -> None:
    """Equal tokens, and the worst error of the requests within what stock's worst allows."""
    assert [one["output_ids"] for one in found] == [one["output_ids"] for one in expected]
    allowed, worst = (max(map(ruler.error, prompts, answers)) for answers in (expected, found))
    assert worst <= SLACK * allowed, f"stock errs by {allowed}"


def tight(server) -> bool:
    return "--arkvale-oversubscription" in server.command


def test_requests_that_evict_each_other_in_every_step(sides):
    ruler, stock, servers = sides
    expected = generate_together(stock, TOGETHER, 24)
    for server in servers:
        found = generate_together(server, TOGETHER, 24)
        assert_same(ruler, TOGETHER, expected, found)
        report = server.arkvale()
        if tight(server):
            # 24 steps, five rows whose pages exceed the frames: hundreds of recalls per lane.
            assert (
                report["pages_recalled"]
                > 24 * report["frames_total"] / report["settings"]["budget_pages"]
            )
        else:
            assert report["pages_evicted"] == report["page_misses"] == 0
        assert report["pages_refused"] == 0


def test_a_prompt_four_times_the_frames_prefills_exactly(sides):
    ruler, stock, servers = sides
    expected = generate(stock, LONG, 1, prompt_logprobs=True)
    for server in servers:
        found = generate(server, LONG, 1, prompt_logprobs=True)
        assert_same(ruler, [LONG], [expected], [found])


def test_full_requests_are_exact_beside_rows_that_evict(sides):
    """Two of three full ones exceed the budget, one all frames; the others keep them busy."""
    ruler, stock, servers = sides
    full = [prompt(length, 300 + length) for length in (1003, 640, 90)]
    others = [prompt(length, 300 + length) for length in (530, 410)]
    wishes = [{"policy": "full"}] * 3 + [{"budget": 192}, {"budget": 160, "top_k": 32}]
    expected = generate_together(stock, full, 24)
    for server in servers:
        found = generate_together(server, [*full, *others], 24, wishes=wishes)
        assert_same(ruler, full, expected, found[: len(full)])
        assert [answer["meta_info"]["arkvale"]["policy"] for answer in found] == [
            *["full"] * 3, *["arkvale"] * 2,
        ]  # fmt: skip


def test_stock_sglang_refuses_wishes_and_tells_nothing(sides):
    stock = sides[1]
    assert "arkvale" not in generate(stock, prompt(9, 1), 1)["meta_info"]
    with pytest.raises(urllib.error.HTTPError) as refusal:
        generate_together(stock, [prompt(9, 1)] * 2, 1, wishes=[None, {"policy": "full"}])
    assert refusal.value.code == 400
    assert b"without --kv-policy arkvale" in refusal.value.read()


def test_follow_up_turns_on_evicted_prefixes(sides):
    ruler, stock, servers = sides
    history = {server: [list(first) for first, _ in TURNS] for server in (stock, *servers)}
    for server, chats in history.items():
        for chat in chats:
            chat += generate(server, chat, 30)["output_ids"]
        for chat, (_, second) in zip(chats, TURNS, strict=True):
            chat += second
    assert all(chats == history[stock] for chats in history.values())
    prompts = history[stock]
    expected = [generate(stock, tokens, 24) for tokens in prompts]
    for server in servers:
        found = [generate(server, tokens, 24) for tokens in prompts]
        assert all(answer["meta_info"]["cached_tokens"] >= 240 for answer in found)
        assert_same(ruler, prompts, expected, found)


def test_everything_is_given_back(sides):
    for server in sides[2]:
        assert wait_idle(server)["frames_used"] == 0
