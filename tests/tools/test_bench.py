"""The benchmark's arithmetic, and that its page holds only what was measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path

import pytest
from PIL import Image

import figures
import pages
from arkvale_sglang.runtime.publish import STATS, Publisher
from bench import latency, report, sides, steps, throughput
from bench.__main__ import QUICK

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks/results/bench.json"


def row(case: str, stock: list[float], arkvale: list[float], **where):
    where = {"context": 32_768, "budget": 1024, **where}
    return sides.row(case, {"stock": stock, "arkvale": arkvale}, lambda _: None, "ms", **where)


def test_a_row_holds_the_median_ratio_of_rounds_and_its_spread():
    """Rounds are compared with themselves: the machine may be slower in another."""
    found = row("decode", [10.0, 40.0, 12.0], [5.0, 10.0, 8.0])
    assert (found["stock"], found["arkvale"], found["ratio"]) == (12.0, 8.0, 2.0)
    assert found["spread"] == [1.5, 4.0]
    with pytest.raises(ValueError):
        row("decode", [1.0, 2.0], [1.0])


@pytest.mark.parametrize(("average", "found"), [(statistics.median, 3.0), (statistics.mean, 3.2)])
def test_a_window_leaves_its_first_gaps_out(average, found, monkeypatch):
    """One answer goes through both windows; its last two tokens of each come together."""
    gaps = [9.0, *[50.0] * sides.SETTLING, 1.0, 2.0, 3.0, 10.0]
    clock = itertools.accumulate(gaps * 2)
    tokens = itertools.accumulate([*[1] * (len(gaps) - 1), 2] * 2)
    monkeypatch.setattr(sides.time, "perf_counter", lambda: next(clock) / 1e3)

    class Server:
        def stream(self, body):
            assert body["sampling_params"]["max_new_tokens"] >= 2 * len(gaps)
            for count in tokens:
                yield {"meta_info": {"completion_tokens": count}}

    with sides.windows(Server(), [[1]], 4, 2, average) as window:
        assert [window(), window()] == pytest.approx([found, found])


def test_targets_are_judged_by_what_was_found():
    rows = [
        row("decode", [50.0], [10.0]),
        row("growth", [8.0], [10.5], context=65_536, short=4096),
        row("under_budget_decode", [4.0], [4.04], context=512),
        row("long_prompts", [100.0], [20.0], context=4000, batch=16),
        row("shared_prefix", [100.0], [10.0], context=6200, batch=8),
    ]
    lines = report.targets_table(rows).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert "5.00 (5.00 to 5.00) times stock's speed" in found["decode at 32K, budget 1K, batch 1"]
    assert found["decode at 32K, budget 1K, batch 1"].endswith("| **no** |")
    assert found["cost of a token at budget 1K, 64K over 4K"].endswith("| **no** |")
    assert found["decode under the budget"].endswith("| yes |")
    assert found["throughput, long prompts"].endswith("| yes |")
    assert found["throughput, shared prefix"].endswith("| - |"), "a smaller load proves nothing"


def test_growth_is_judged_by_rounds_of_both_contexts_in_turn():
    """The rows of the grid are minutes apart, on a machine that others use too."""
    grid = [
        row("decode", [50.0], [8.0], context=4096),
        row("decode", [9.0], [16.0], context=65_536),
    ]
    in_turn = row("growth", [8.0, 16.0], [10.0, 20.0], context=65_536, short=4096)
    for rows, shown in ((grid, "| - |"), ([*grid, in_turn], "| 1.25 (1.25 to 1.25) times")):
        assert shown in report.targets_table(rows).splitlines()[3]


def test_a_target_among_the_rounds_is_met_or_missed_within_the_noise():
    stock = [5.0, 5.0, 5.0]
    lines = report.targets_table(
        [
            row("under_budget_decode", stock, [4.0, 5.05, 50.0], context=512),
            row("under_budget_prefill", stock, [4.0, 5.6, 5.7], context=2048),
            row("follow_up", [100.0, 100.0, 100.0], [1.0, 1.1, 1.2]),
        ]
    ).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert found["decode under the budget"].endswith("| yes, within the noise |")
    assert found["prefill under the budget"].endswith("| **no**, within the noise |")
    assert found["follow-up turn on 32K cached"].endswith("| yes |")


def test_one_round_of_many_does_not_hide_a_miss():
    """Of 12 rounds the median lies between the third and the tenth, with 95 % confidence."""
    ours = [1.0, 1.01, *[1.05] * 10]
    (found,) = (
        line
        for line in report.targets_table(
            [row("under_budget_decode", [1.0] * 12, ours, context=512)]
        ).splitlines()
        if line.startswith("| decode under")
    )
    assert "1.05 (1.00 to 1.05)" in found and found.endswith("| **no** |")
    assert report._likely(row("growth", [*range(1, 25)], [1.0] * 24)) == (7, 18)
    assert report._likely(row("growth", [1.0, 2.0, 3.0], [1.0] * 3)) == (1, 3)


def test_the_cost_of_being_watched_is_shown_and_judged():
    rows = [row("watching", [10.0, 10.0, 10.0], [10.05, 10.06, 9.9], context=8192)]
    share = {"case": "watching_share", "context": 8192, "arkvale": 0.0123}
    rows.append({**share, "spread": [0.0111, 0.0132]})
    line = "| 8,192 | 1,024 | 10.00 | 10.05 | 1.005 | 0.990 to 1.006 | 1.23 % |"
    assert report.watching_table(rows).endswith(line)
    judged, last = report.targets_table(rows).splitlines()[-2:]
    assert judged.startswith("| decode while watched | 1.0") and judged.endswith("| yes |")
    assert "| 0.0123 (0.0111 to 0.0132) of a step's time |" in last and last.endswith("| **no** |")
    rows = [row("watching", [10.0], [10.3], context=8192)]
    assert report.targets_table(rows).splitlines()[-2].endswith("| **no** |")


def test_watched_and_unwatched_take_turns_and_a_silent_stream_voids_them(monkeypatch):
    publisher, turns = Publisher(None), []

    class Server:
        def __init__(self, name: str):
            self.name = name

        def arkvale(self) -> dict:
            return {"stream": publisher.endpoint, "pages_evicted": 1}

        def paused(self):
            return contextlib.nullcontext()

        def post(self, *_):
            return {}

    @contextlib.contextmanager
    def windows(server, prompts, new, most, average):
        assert average([1.0, 1.0, 4.0]) == 2.0, "a message's cost falls on one token of many"

        def window():
            turns.append(server.name)
            for _ in range(50 if server.name == "watched" else 0):
                publisher.poll()
                publisher.send(STATS, {})
                time.sleep(0.01)
            return 10.0 if server.name == "unwatched" else 10.1

        yield window

    @contextlib.contextmanager
    def both(model, stock, arkvale):
        assert "off" in stock and "off" not in arkvale
        assert "--enable-metrics" in stock and "--enable-metrics" in arkvale
        yield sides.Sides(Server("unwatched"), Server("watched"))

    monkeypatch.setattr(latency, "sides", both)
    monkeypatch.setattr(latency, "windows", windows)
    shares = iter([0.004, 0.002, 0.003])
    monkeypatch.setattr(latency, "_share_of_watching", lambda *_: next(shares))
    found, share = latency.watching(ROOT, 3, lambda _: None)
    assert share["arkvale"] == 0.003 and share["spread"] == [0.002, 0.004]
    assert turns == ["unwatched", "watched"] * 4
    assert found["case"] == "watching" and found["ratio"] == pytest.approx(10 / 10.1, abs=1e-3)
    monkeypatch.setattr(publisher, "send", lambda *_: None)
    with pytest.raises(RuntimeError, match="0 messages came"):
        list(latency.watching(ROOT, 3, lambda _: None))
    publisher.close()


def test_shares_of_a_step_come_from_its_named_parts():
    """Two layers; a step takes 100 of which 2 x 20 attend and 2 x 5 score; the first two, and what
    comes after the last, do not count."""
    events = [{"ph": "M", "name": "process"}]
    for number in range(6):
        length = 50 if number < 2 else 20
        for layer in (0, 40):
            begin = 100 * number + layer
            events.append({"ph": "X", "name": "arkvale.score", "ts": begin + 1, "dur": 5})
            events.append({"ph": "X", "name": "arkvale.attend", "ts": begin, "dur": length})
    shares = steps.shares_of(events, layers=2)
    assert shares["attend"] == pytest.approx(0.4) and shares["score"] == pytest.approx(0.1)
    assert shares["recall"] == 0 and shares["rest"] == pytest.approx(0.5)
    assert list(shares) == [*steps.PARTS, "rest"]


@pytest.mark.parametrize("load", [*throughput.LOADS, *QUICK.loads], ids=lambda load: load.case)
def test_stock_cannot_hold_a_load_at_once(load):
    """Else nothing queues and nothing is recomputed; one chat must fit, or nothing runs."""
    own = load.shared + load.turns * (load.message + load.new)
    assert own <= throughput.DEVICE_TOKENS < load.tokens


def test_the_page_is_made_from_the_committed_rows(tmp_path):
    (tmp_path / report.PAGE).write_text((ROOT / "docs" / report.PAGE).read_text())
    report.write(RESULT.parent, tmp_path)
    assert (tmp_path / report.PAGE).read_text() == (ROOT / "docs" / report.PAGE).read_text()
    rows = json.loads(RESULT.read_text())["rows"]
    images = sorted((ROOT / "docs/images").glob("performance_*.png"))
    assert [path.name for path in images] == [
        path.name for path in sorted((tmp_path / "images").glob("*.png"))
    ]
    for path in images:
        assert Image.open(path).text["Source"] == figures.fingerprint(rows), path.name


def test_readme_shows_what_was_measured():
    rows = json.loads(RESULT.read_text())["rows"]
    assert report.evidence(rows) in (ROOT / "README.md").read_text()


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no place for 'targets'"):
        pages.fill("# Performance", {"targets": str})
