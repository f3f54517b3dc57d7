"""The reader's end of a server's stream, and the questions asked over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import signal
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import zmq

from arkvale_sglang.config.settings import ArkValeError

DEFAULT_URL = "http://127.0.0.1:30000"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_QUIET_SECONDS = 5.0
"""Silence after which the server is asked whether it is still there."""
_ANSWER_SECONDS = 30.0
"""Longest wait for its answer."""


class _Busy(ArkValeError):
    """The server is there, or was, and takes long to answer."""


class Message(NamedTuple):
    """One message of the stream; its fields are listed in docs/metrics.md."""

    topic: str
    header: dict[str, Any]
    payload: bytes | None


def add_server(parser: argparse.ArgumentParser) -> None:
    """Arguments that name a server."""
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    parser.add_argument("--api-key", help="of the server, if it was started with one")


def server_state(url: str, api_key: str | None = None) -> dict[str, Any]:
    """The policy's part of ``/server_info``.

    Raises:
        ArkValeError: no address, no server, no policy, or a key that is not the server's.
    """
    if not _is_address(url):
        raise ArkValeError(f"{url} is no address of a server; give one like {DEFAULT_URL}.")
    request = urllib.request.Request(f"{url.rstrip('/')}/server_info")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
            state = dict(json.load(answer)["internal_states"][0])
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            what = "another API key than this one" if api_key else "an API key"
            raise ArkValeError(f"{url} wants {what}; give its key with --api-key.") from None
        raise ArkValeError(f"{url} answers /server_info with {error}; is it SGLang?") from None
    except OSError as error:  # first: a connection that ends is an HTTPException too
        late = isinstance(getattr(error, "reason", error), TimeoutError)
        kind = _Busy if late else ArkValeError
        raise kind(f"{url} does not answer ({error}); is the server up?") from None
    except (ValueError, KeyError, IndexError, TypeError, http.client.HTTPException):
        raise ArkValeError(f"{url} is no SGLang server; give the address of one.") from None
    if "arkvale" not in state:
        raise ArkValeError(f"{url} serves without the policy; start it with --kv-policy arkvale.")
    return dict(state["arkvale"])


def _is_address(url: str) -> bool:
    try:
        place = urllib.parse.urlsplit(url)
        return place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:
        return False


class Stream:
    """Subscribed to a running server; use as a context manager.

    Raises:
        ArkValeError: on construction, as :func:`server_state`, and where there is no stream or it
            is out of reach.
    """

    def __init__(self, url: str, api_key: str | None, topics: Sequence[str]):
        self.url, self._api_key = url, api_key
        self.state = server_state(url, api_key)
        endpoint = self.state.get("stream")
        if endpoint is None:
            raise ArkValeError(f"{url} has no stream; start it without --arkvale-stream off.")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        for topic in topics:
            self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._socket.connect(_reachable(endpoint, url))
        self._greeted = False
        self._next: dict[str, int] = {}
        self.lost = 0
        """Messages that the server sent and this subscriber never saw."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close(0)
        self._context.term()

    def receive(self, seconds: float) -> Message | None:
        """The next message, or ``None`` if none comes within so many seconds.

        Raises:
            ArkValeError: the server has gone away, or has another stream since it was restarted.
        """
        deadline = time.monotonic() + seconds
        quiet = 0.3  # a server that sleeps while idle learns of a subscriber once it is woken
        while (left := deadline - time.monotonic()) > 0:
            wait = min(left, _QUIET_SECONDS if self._greeted else quiet)
            if self._socket.poll(int(1e3 * wait) + 1):
                return self._read()
            if not self._greeted or left > _QUIET_SECONDS:
                self._ask()
                quiet = min(2 * quiet, _QUIET_SECONDS)
        return None

    def _ask(self) -> None:
        """Whether the server is there and this its stream; a busy one answers later."""
        try:
            endpoint = server_state(self.url, self._api_key).get("stream")
        except _Busy:
            return
        if endpoint is None:
            raise ArkValeError(
                f"{self.url} has no stream any more, since it was restarted without one or could "
                "not go on with it; look at its log, then run the command again."
            )
        if endpoint != self.state["stream"]:
            raise ArkValeError(
                f"{self.url} was restarted and has another stream now; run the command again."
            )

    def _read(self) -> Message:
        self._greeted = True
        topic, header, *payload = self._socket.recv_multipart()
        message = Message(topic.decode(), json.loads(header), payload[0] if payload else None)
        number = message.header["sequence"]
        self.lost += max(0, number - self._next.get(message.topic, number))
        self._next[message.topic] = number + 1
        return message


def _reachable(endpoint: str, url: str) -> str:
    """The endpoint as seen from here; it names an address of the server's machine."""
    place = urllib.parse.urlsplit(endpoint)
    host = urllib.parse.urlsplit(url).hostname or ""
    if place.scheme != "tcp":
        return endpoint
    if place.hostname in ("0.0.0.0", "::"):
        return f"tcp://{host}:{place.port}"
    if place.hostname in _LOCAL and host not in _LOCAL:
        raise ArkValeError(
            f"the stream of {url} is {endpoint}, which only its own machine reaches; run this "
            "there or start the server with --arkvale-stream tcp://0.0.0.0:PORT."
        )
    return endpoint


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C, or a polite kill, ends what runs inside without a word."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)
