"""A live view of a running server: ``arkvale top``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from arkvale_sglang.cli.stream import Stream, add_server, interrupted
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.runtime.publish import STATS

Header = dict[str, Any]
BAR = 40
"""Characters of a bar."""
PARTS = (("hot", "█", "red"), ("cold", "▒", "blue"), ("free", "·", "bright_black"))
SLOWEST = 8
_FIRST_SECONDS = 20.0


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "top", help="watch a running server: hit rate, recall, frames, slowest requests"
    )
    add_server(parser)
    parser.add_argument("--once", action="store_true", help="print one view and end")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Show views until Ctrl-C, or one; where the output is no terminal, one below the other."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100)
    with Stream(options.url, options.api_key, [STATS]) as stream, interrupted():
        views = _views(stream, once=options.once)
        if options.once or not console.is_terminal:
            for view in views:
                console.print(view)
            return ""
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for view in views:
                live.update(view, refresh=True)
    return ""


def _views(stream: Stream, *, once: bool) -> Iterator[Group]:
    first = stream.receive(_FIRST_SECONDS)
    if first is None:
        raise ArkValeError(
            f"{stream.url} sent nothing on {stream.state['stream']} for {_FIRST_SECONDS:.0f} s; "
            "is that port reachable from here?"
        )
    before = now = first.header
    if once:  # rates need a second message, which comes while passes run
        second = stream.receive(1.5)
        yield view(stream, now, second.header if second else now)
        return
    while True:
        yield view(stream, before, now)
        message = stream.receive(3600.0)
        if message is not None:
            before, now = now, message.header


def view(stream: Stream, before: Header, now: Header) -> Group:
    """One view of two messages that follow each other, or of one alone."""
    parts: list[RenderableType] = [_summary(stream, now), _layers(before, now), _requests(now)]
    if stream.lost:
        parts.append(Text(f"{stream.lost} messages were lost on the way", style="yellow"))
    return Group(*parts)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _bar(text: Text, counts: dict[str, int], width: int = BAR) -> Text:
    """Parts of a whole as runs of their characters."""
    whole, drawn, seen = max(1, sum(counts.values())), 0, 0
    for name, mark, style in PARTS:
        seen += counts[name]
        stop = round(width * seen / whole)
        text.append(mark * (stop - drawn), style)
        drawn = stop
    return text


def _frames(levels: Header) -> dict[str, int]:
    hot, free = levels["frames_hot"], levels["frames_free"]
    return {"hot": hot, "cold": levels["frames_total"] - hot - free, "free": free}


def _summary(stream: Stream, now: Header) -> Group:
    levels, rates, totals = now["levels"], now["per_second"], now["totals"]
    wanted = totals["page_hits"] + totals["page_misses"]
    settings = stream.state["settings"]
    title = Text.assemble(
        ("arkvale top  ", "bold"), stream.url, f"   budget {settings['budget']} tokens, pages of ",
        f"{settings['page_size']}   ", ("idle", "yellow") if now["idle"] else ("running", "green"),
    )  # fmt: skip
    lines = [
        ("hit rate", f"{_share(now['hit_rate']):>8s}    since the start "
         f"{_share(totals['page_hits'] / wanted if wanted else None)}"),
        ("recall", f"{rates['bytes_recalled'] / 1e6:8.2f} MB/s    "
         f"{rates['pages_recalled']:,.0f} pages/s    {rates['pages_evicted']:,.0f} evicted/s"),
        ("decode", f"{rates['tokens']:8.1f} tokens/s    {rates['steps']:.1f} steps/s    "
         f"{_share(now['calm'])} of them with nothing to choose"),
        ("pages", f"{levels['logical_pages_used']:8,} of {levels['logical_pages_total']:,} logical "
         "pages in use"),
    ]  # fmt: skip
    frames = Text(f"  {'frames':9s} {levels['frames_used']:8,} of {levels['frames_total']:,}    ")
    _bar(frames, _frames(levels), 30)
    for name, mark, style in PARTS:
        frames.append(f"  {mark} ", style)
        frames.append(name)
    return Group(title, *(Text(f"  {name:9s} {text}") for name, text in lines), frames, Text())


def _layers(before: Header, now: Header) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("frames", no_wrap=True)
    for name in ("hit rate", "misses/s", "recalled/s", "free"):
        table.add_column(name, justify="right")
    interval = now["time"] - before["time"]
    for old, new in zip(before["layers"], now["layers"], strict=True):
        start = old if interval > 0 else dict.fromkeys(new, 0)
        grown = {name: new[name] - start[name] for name in new}
        wanted = grown["page_hits"] + grown["page_misses"]
        total = now["levels"]["frames_total"] // len(now["layers"])
        rates = [
            f"{grown[name] / interval:,.0f}" if interval > 0 else "-"
            for name in ("page_misses", "pages_recalled")
        ]
        table.add_row(
            str(new["layer"]),
            _bar(Text(), _frames({**new, "frames_total": total})),
            _share(grown["page_hits"] / wanted if wanted else None),
            *rates,
            f"{new['frames_free']:,}",
        )
    return table


def _requests(now: Header) -> Group:
    slowest = sorted(now["requests"], key=lambda one: -(one["ms_per_token"] or 0.0))
    if not slowest:
        return Group(Text(), Text("  no request decodes", style="bright_black"))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column(f"slowest of {len(slowest)}")
    for name in ("tokens", "pages", "budget", "ms/token"):
        table.add_column(name, justify="right")
    for one in slowest[:SLOWEST]:
        speed = one["ms_per_token"]
        table.add_row(
            one["rid"],
            *(f"{one[name]:,}" for name in ("tokens", "pages")),
            "full" if one["budget"] is None else f"{one['budget']:,}",
            "-" if speed is None else f"{speed:.1f}",
        )
    return Group(Text(), table)
