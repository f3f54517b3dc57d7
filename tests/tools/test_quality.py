"""The quality harness asks what it means to ask, and its page holds only what was measured."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from PIL import Image

import figures
import pages
from arkvale_sglang.config.settings import ArkValeConfig
from needle_model import text
from needle_model.tokenizer import build_tokenizer
from quality import report, results, tasks
from quality.plan import COMPARED, DEFAULT, DROPPING, FULL, SMALL, plans
from quality.servers import CONTEXT, Rule, by_server

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def writer():
    return text.Writer(build_tokenizer(CONTEXT))


@pytest.mark.parametrize("length", [1000, 10_000])
def test_a_context_has_its_length_and_its_facts_where_they_belong(writer, length):
    facts = [(depth, f"the code of the blue door is {int(depth * 100):04d}.") for depth in (0, 0.5)]
    context = writer.context(random.Random(0), length, facts)
    size = writer.size(context)
    assert length <= size < length + 40
    for depth, fact in facts:
        before = context[: context.index(fact)].strip()
        place = writer.size(before) if before else 0
        assert place == pytest.approx(depth * length, abs=40)


def test_passkeys_differ_by_their_place_alone(writer):
    episodes = list(tasks.passkey(writer, 1000, [0.0, 0.5, 0.95], seed=3))
    assert [episode.depth for episode in episodes] == [0.95, 0.5, 0.0]
    messages = [
        re.subn(r"the code of the \w+ \w+ is \d{4}\. ", "", e.turns[0].message) for e in episodes
    ]
    assert [count for _, count in messages] == [1, 1, 1]
    fillers = {re.sub(r" what is the code of the \w+ \w+\?", "", rest) for rest, _ in messages}
    assert len(fillers) == 1
    assert len({episode.turns[0].expected for episode in episodes}) == 3


def test_every_expected_answer_stands_in_the_chat(writer):
    episodes = [
        *tasks.lengths(writer, 1000, 0, 3),
        *tasks.many(writer, 4000, 0, asked=4),
        *tasks.chat(writer, 0),
    ]
    assert {e.task for e in episodes} == {"lengths", "needle", "sequence", "path", "chat"}
    for episode in episodes:
        said = " ".join(turn.message for turn in episode.turns)
        for turn in episode.turns:
            assert all(item in said for item in turn.expected)


def test_rules_of_equal_servers_share_one():
    full, h2o, recall = Rule("full"), Rule("h2o", 512, "h2o"), Rule("arkvale", 512)
    reduced = Rule("max", 512, head_reduce="max")
    groups = by_server([full, h2o, recall, reduced])
    assert list(groups.values()) == [[full, h2o], [recall, reduced]]
    assert full.wishes == {} and h2o.wishes["selection"] == "h2o"


def test_the_plan_compares_every_digest_group_and_reduction():
    rules = list(plans(DEFAULT))
    assert set(plans(SMALL)) < set(rules) < set(plans(FULL))
    assert {rule.digest for rule in rules} == {
        "cuboid-mean", "cuboid-max", "cuboid-center", "mean-std",
    }  # fmt: skip
    assert {rule.head_reduce for rule in rules} == {"mean", "max", "softmax-mean"}
    assert {rule.groups for rule in rules} == {1, 2}
    assert {rule.selection for rule in rules} == {"recall", "streaming", "snapkv", "h2o"}


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_confidence_intervals_are_wilsons(right, asked, low, high):
    assert results.wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_the_page_is_filled_and_nothing_else_of_it_changes():
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n"
    filled = pages.fill(page, {"x": lambda: "new"})
    assert filled == "a\n<!-- x -->\nnew\n<!-- end -->\nb\n"
    assert pages.fill(filled, {"x": lambda: "new"}) == filled
    with pytest.raises(ValueError, match="no place for 'y'"):
        pages.fill(page, {"x": str, "y": str})
    with pytest.raises(ValueError, match="marks 'x', which nothing fills"):
        pages.fill(page, {})


@pytest.fixture(scope="module")
def rows():
    return results.read(RESULTS / "quality.csv")


def share(rows, task: str, rule: str, budget: int, length: int | None = None) -> float:
    own = [
        row for row in results.of(rows, (rule, budget))
        if row["task"] == task and length in (None, row["length"])
    ]  # fmt: skip
    right, asked = results.total(own, "right", "asked")
    return right / asked


def test_the_page_is_what_its_csv_makes_of_it(tmp_path):
    page = (ROOT / "docs/quality.md").read_text()
    (tmp_path / "quality.md").write_text(page)
    assert report.write(RESULTS, tmp_path).read_text() == page
    made = {plot.name for plot in tmp_path.glob("images/*.png")}
    assert made == {plot.name for plot in (ROOT / "docs/images").glob("quality_*.png")}
    kept = [results.read(RESULTS / name) for name in ("quality.csv", "digests.csv")]
    source = figures.fingerprint(kept)
    for name in made:
        assert f"images/{name}" in page
        with Image.open(ROOT / "docs/images" / name) as plot:
            assert plot.info["Source"] == source


def test_readme_shows_the_same_results(rows):
    assert report.evidence(rows) in (ROOT / "README.md").read_text()


def test_full_attention_knows_the_answers_at_every_length(rows):
    for length in DEFAULT.lengths:
        assert share(rows, "lengths", "full", 0, length) >= 0.98


def test_the_page_may_say_that_recall_keeps_the_answers(rows):
    for length in DEFAULT.passkeys:
        assert share(rows, "passkey", "arkvale", 512, length) >= 0.95
    for task in COMPARED:
        full, kept = share(rows, task, "full", 0), share(rows, task, "arkvale", 1024)
        assert kept >= full - 0.01, task


@pytest.mark.parametrize("rule", DROPPING)
@pytest.mark.parametrize("budget", DEFAULT.dropping_budgets)
def test_the_page_may_say_that_rules_that_drop_forget(rows, rule, budget):
    for task in ("path", "chat"):
        kept, dropped = (share(rows, task, r, budget) for r in ("arkvale", rule))
        assert dropped < kept - 0.2, task


def test_the_page_may_say_that_the_defaults_are_no_worse_than_any_variant(rows):
    """The default lies within the best variant's interval, half a budget near the best top-k."""
    variants = results.variants(rows)
    config = ArkValeConfig()
    default = (config.digest, config.head_groups, config.head_reduce)
    scores = {variant: results.total(own, "right", "asked") for variant, own in variants}
    best = scores[variants[0][0]]
    assert scores[default][0] / scores[default][1] >= results.wilson(*best)[0]
    roomy = [row for row in rows if row["name"] == "top-k" and row["budget"] == 1024]
    shares = {}
    for top_k in {row["top_k"] for row in roomy}:
        right, asked = results.total((r for r in roomy if r["top_k"] == top_k), "right", "asked")
        shares[top_k] = right / asked
    assert shares[512] >= max(shares.values()) - 0.02
