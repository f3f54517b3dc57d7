"""The stream in a file: ``arkvale record`` writes it, ``arkvale plot`` reads it.

One JSON object a line.  A line with ``format`` begins a recording and describes the server; every
other line is a message.  Recordings may follow each other in one file, and a line that was cut off
is left out by the reader, so a file is good however its writing ended.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import time
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arkvale_sglang.cli.stream import Message, Stream, add_server, interrupted
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.runtime.publish import PAGES, STATS
from arkvale_sglang.runtime.watch import STATES

FORMAT, VERSION = "arkvale-stream", 1
_LONGEST_BEGIN = 1 << 20
"""Bytes of the line that begins a recording: settings and counters of every layer."""


@dataclasses.dataclass
class Recording:
    """What a file holds."""

    servers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stats: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """With ``states`` as ``[layers, groups, pages]`` uint8."""
    broken: int = 0
    """Lines that were cut off."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("record", help="write the stream of a running server to a file")
    add_server(parser)
    parser.add_argument("file", type=Path, help="is appended to if it exists")
    parser.add_argument("--seconds", type=float, help="how long (default: until Ctrl-C)")
    parser.add_argument(
        "--topics", nargs="+", choices=(STATS, PAGES), default=[STATS, PAGES], help="default: both"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Write until the time is up, Ctrl-C, or the server has gone."""
    path, end = options.file, ""
    with Stream(options.url, options.api_key, options.topics) as stream:
        written = 0
        with _opened(path) as file, interrupted():
            about = {"format": FORMAT, "version": VERSION, "time": time.time(), "url": options.url}
            about |= {"topics": options.topics, "states": STATES, "server": stream.state}
            file.write(_line(about))
            deadline = time.monotonic() + (options.seconds or float("inf"))
            while (left := deadline - time.monotonic()) > 0:
                try:
                    message = stream.receive(min(left, 3600.0))
                except ArkValeError as error:
                    end = f"; then it ended: {error}"
                    break
                if message is not None:
                    file.write(_line(_entry(message)))
                    file.flush()
                    written += 1
        lost = f", {stream.lost} were lost on the way" if stream.lost else ""
    return f"{written} messages written to {path}{lost}{end}"


def _opened(path: Path) -> Any:
    """The file at its end, after the last whole line."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise ArkValeError(
            f"{path} cannot be written ({error.strerror}); name another file."
        ) from None
    try:
        if file.tell():
            _check_begin(path, file)
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")
    except BaseException:
        file.close()
        raise
    return file


def _check_begin(path: Path, file: BinaryIO) -> None:
    """Refuse a file that does not begin as recordings do; they are long, so no more is read."""
    file.seek(0)
    lines = iter(lambda: file.readline(_LONGEST_BEGIN), b"")
    first = next(filter(bytes.strip, lines), b"")
    try:
        if json.loads(first).get("format") == FORMAT:
            return
    except (ValueError, AttributeError):
        pass
    raise _no_recording(path, bool(first))


def _no_recording(path: Path, something: bool) -> ArkValeError:
    what = "is no recording" if something else "is empty"
    return ArkValeError(f"{path} {what}; make one with: arkvale record URL FILE.")


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _entry(message: Message) -> dict[str, Any]:
    entry = {"topic": message.topic, **message.header}
    if message.payload is not None:
        entry["states"] = base64.b64encode(zlib.compress(message.payload, 1)).decode()
    return entry


def read(path: Path) -> Recording:
    """All recordings of a file.

    Raises:
        ArkValeError: it cannot be read, is empty, or is something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ArkValeError(f"{path} cannot be read ({error.strerror}); name a recording.") from None
    found = Recording()
    for line in filter(None, lines):
        try:
            entry = json.loads(line)
            _add(found, entry)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
            found.broken += 1
    if not found.servers:
        raise _no_recording(path, any(lines))
    return found


def _add(found: Recording, entry: dict[str, Any]) -> None:
    if entry.get("format") == FORMAT:
        found.servers.append(entry)
    elif entry["topic"] == STATS:
        found.stats.append(entry)
    elif entry["topic"] == PAGES:
        states = np.frombuffer(zlib.decompress(base64.b64decode(entry["states"])), np.uint8)
        found.pages.append({**entry, "states": states.reshape(entry["shape"])})
