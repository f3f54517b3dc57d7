"""The stream: what the cache does, sent to whoever subscribes (ZMQ, format in docs/metrics.md)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import zmq

from arkvale_sglang.config.settings import STREAM_OFF, ArkValeError

STATS, PAGES = "stats", "pages"
"""Topics: the first frame of every message."""
ANY_PORT = "tcp://127.0.0.1:*"
"""Where a server binds unless told otherwise: this machine alone, a port that is free."""
HIGH_WATER = 256
"""Messages that wait for one subscriber before it loses some."""
_HEARTBEAT_MS = 10_000
_LONGEST_WORD = 1024
"""Bytes that a subscriber may say at once; topics are short."""
_WORDS = 64
"""Words of subscribers that are taken at once, since a pass waits meanwhile."""


class Publisher:
    """Binds a socket and sends to subscribers, never waiting for one.

    It is an XPUB socket, which tells whether anybody listens to a topic, so that nothing need be
    prepared while nobody does.

    Raises:
        ArkValeError: on construction, if the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str | None):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, HIGH_WATER),
            (zmq.XPUB_VERBOSE, 1),
            (zmq.HEARTBEAT_IVL, _HEARTBEAT_MS),
            (zmq.MAXMSGSIZE, _LONGEST_WORD),
        ):
            self._socket.setsockopt(option, value)
        try:
            if _is_taken(endpoint):
                raise zmq.ZMQError(zmq.EADDRINUSE)
            self._socket.bind(endpoint or ANY_PORT)
        except (zmq.ZMQError, OSError) as error:  # the latter of a path that is too long
            self.close()
            raise ArkValeError(
                f"--arkvale-stream {endpoint or ANY_PORT} cannot be bound ({error}); name another "
                f"endpoint, or {STREAM_OFF}."
            ) from None
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.dropped = 0
        """Messages that some subscriber lost, since it did not keep up."""
        self._sequence = dict.fromkeys((STATS, PAGES), 0)
        self._prefixes: set[bytes] = set()

    def poll(self) -> bool:
        """Take word of those who came and went; returns whether someone new wants ``STATS``.

        Of many words some are left for the next call.
        """
        came = False
        for _ in range(_WORDS):
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                break
            with contextlib.suppress(zmq.Again):
                word = self._socket.recv(zmq.NOBLOCK)
                prefix = word[1:]
                wanted = [topic for topic in (STATS, PAGES) if topic.encode().startswith(prefix)]
                if not wanted:
                    continue
                if word.startswith(b"\1"):
                    self._prefixes.add(prefix)
                    came = came or STATS in wanted
                elif word.startswith(b"\0"):  # the last of them
                    self._prefixes.discard(prefix)
        return came

    def wants(self, topic: str) -> bool:
        """Whether anybody subscribes to a topic."""
        return any(topic.encode().startswith(prefix) for prefix in self._prefixes)

    def send(self, topic: str, header: Mapping[str, Any], payload: bytes | None = None) -> None:
        """Send one message: topic, header as JSON, and the payload if there is one.

        The header gets the topic's next ``sequence`` number, by which a subscriber knows what it
        lost.
        """
        numbered = {"sequence": self._sequence[topic], **header}
        self._sequence[topic] += 1
        frames = [topic.encode(), json.dumps(numbered).encode()]
        if payload is not None:
            frames.append(payload)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # one subscriber is full: the others must not pay for it
            self.dropped += 1
            self._socket.setsockopt(zmq.XPUB_NODROP, 0)
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    def close(self) -> None:
        """Stop at once."""
        self._socket.close(0)
        self._context.term()


def _is_taken(endpoint: str | None) -> bool:
    """Whether another process answers at an ``ipc`` endpoint, whose path ZMQ would take away."""
    path = (endpoint or "").removeprefix("ipc://")
    if path == (endpoint or ""):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
