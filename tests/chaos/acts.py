"""Events on a server: one random thing that a client does, drawn from a seed.

An act returns how it ended, as a word or an HTTP status.  Whatever a client sends, the server may
refuse it (4xx) or answer it, and must stay.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import random
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from arkvale_sglang.cli.launch import Server
from support.serving import prompt

SECONDS = 300.0
"""Longest wait for an answer; a server that is slower hangs."""
EARLY_SECONDS = 0.3
"""Within which a client gives up early: its request is then on its way, queued, or in the chunks of
its prefill."""
Act = Callable[[Server], str]

NONSENSE_SETTINGS: tuple[Any, ...] = (
    [], 7, "full", {"budget": 1 << 40}, {"budget": -16}, {"budget": 0}, {"budget": True},
    {"budget": 1.5}, {"budget": None}, {"budget": "all"}, {"top_k": 0}, {"top_k": -1},
    {"frames": 3}, {"": 1}, {"selection": "none"}, {"selection": ["recall"]},
    {"head_reduce": "median"}, {"budget": 512, "top_k": 10**30}, {"page_size": 16},
    {"policy": "none"}, {"policy": 7}, {"policy": "full", "budget": 512},
)  # fmt: skip
"""Values of ``custom_params["arkvale"]`` that no server takes: all are a 400."""
SAMPLING = "wrong type of a sampling parameter"
"""The one mistake that SGLang itself answers with a 500."""
NONSENSE_BODIES: tuple[tuple[str, Any], ...] = (
    ("bad JSON", b'{"input_ids": [5, 6'),
    ("bad JSON", b"\x00\xff\xfe"),
    ("bad JSON", b""),
    ("wrong type", b"[]"),
    ("wrong type", b"7"),
    ("wrong type", {"input_ids": "abc"}),
    ("wrong type", {"input_ids": {"a": 1}}),
    ("wrong type", {"text": 5}),
    ("wrong type", {"input_ids": [1.5, 2.5]}),
    ("wrong type", {"input_ids": [None]}),
    ("wrong type", {"input_ids": [5, 6], "sampling_params": "hot"}),
    (
        "wrong type",
        {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2, "custom_params": "x"}},
    ),
    (SAMPLING, {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": "many"}}),
    (SAMPLING, {"input_ids": [5, 6], "sampling_params": {"temperature": "hot"}}),
    ("missing field", {}),
    ("missing field", {"sampling_params": {"max_new_tokens": 4}}),
    ("missing field", {"input_ids": []}),
    ("missing field", {"text": ""}),
    ("out of range", {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": -4}}),
    ("out of range", {"input_ids": [5, 6], "sampling_params": {"top_p": 7.0}}),
    ("out of range", {"input_ids": [5, 6], "sampling_params": {"temperature": -1.0}}),
    (
        "out of range",
        {"input_ids": [5, 6], "sampling_params": {"min_new_tokens": 9, "max_new_tokens": 3}},
    ),
    ("out of vocabulary", {"input_ids": [5, 10**6, 6]}),
    ("out of vocabulary", {"input_ids": [5, 1 << 40]}),
    ("out of vocabulary", {"input_ids": [5, -7, 6]}),
    ("out of vocabulary", {"input_ids": [[5, 6], [5, -1]]}),
    ("unknown field", {"input_ids": [5, 6], "frames": 3}),
)  # fmt: skip
"""Bodies of ``/generate`` by what is wrong with them."""
PATHS = (
    ("GET", "/generate"), ("DELETE", "/flush_cache"), ("PUT", "/v1/chat/completions"),
    ("GET", "/no/such/path"), ("POST", "/../etc/passwd"), ("GET", "/%00"), ("PATCH", "/health"),
)  # fmt: skip


class Draw:
    """Draws acts; the same seed draws the same one.

    Args:
        capacity: tokens that the server's cache holds.
        budget: the server's, in tokens.
    """

    def __init__(self, seed: str, capacity: int, budget: int):
        self.random = random.Random(seed)
        self.seed, self.capacity, self.budget = seed, capacity, budget

    def act(self) -> tuple[str, Act]:
        """A name and what to do."""
        kinds: dict[str, tuple[float, Callable[[], Act]]] = {
            "generate": (50, self._generate),
            "several prompts": (5, self._several),
            "completion": (6, self._completion),
            "prompt log-probabilities": (3, self._logprobs),
            "prompt beyond capacity": (3, self._too_long),
            "endless answer": (2, self._endless),
            "nonsense settings": (5, self._nonsense_settings),
            "malformed body": (12, self._malformed),
            "giant body": (1, self._giant),
            "half a request": (4, self._half),
            "wrong path": (3, self._wrong_path),
            "abort": (2, self._abort_unknown),
            "look": (3, self._look),
            "flush": (2, self._flush),
        }
        name = self.random.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        return name, kinds[name][1]()

    # -- what a client may ask for -------------------------------------------------------------

    def _prompt(self) -> list[int]:
        """Few prefixes of many lengths, so that many requests share one, and an end of its own."""
        shared = prompt(self.random.choice((0, 64, 160, 400)), self.random.randrange(4))
        return [*shared, *prompt(self.random.randrange(1, 120), self.seed)]

    def _sampling(self) -> dict[str, Any]:
        new = self.random.choice((1, 4, 12, 40))
        sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        fate = self.random.random()
        if fate < 0.1:
            sampling["custom_params"] = {"arkvale": {"policy": "full"}}
        elif fate < 0.4:
            wishes: dict[str, Any] = {
                "budget": self.random.randrange(self.budget // 2, self.budget + 1),
                "top_k": self.random.randrange(16, self.budget // 4),
                "selection": self.random.choice(("recall", "streaming", "snapkv", "h2o")),
            }
            names = self.random.sample(sorted(wishes), self.random.randrange(1, 4))
            own = {name: wishes[name] for name in names}
            sampling["custom_params"] = {"arkvale": own}
        return sampling

    def _generate(self) -> Act:
        body = {"input_ids": self._prompt(), "sampling_params": self._sampling()}
        fate = self.random.choice(("finish", "finish", "hang up", "abort"))
        return self._streamed(body, fate, self.random.randrange(8))

    def _several(self) -> Act:
        prompts = [self._prompt() for _ in range(self.random.randrange(2, 5))]
        return _posted("/generate", {"input_ids": prompts, "sampling_params": self._sampling()})

    def _completion(self) -> Act:
        text = "a long story " * self.random.randrange(1, 30)
        body = {"model": "tiny", "temperature": 0, "max_tokens": 6, "ignore_eos": True}
        if self.random.random() < 0.5:
            body["custom_params"] = {"arkvale": {"budget": self.budget // 2}}
        if self.random.random() < 0.5:
            return _posted("/v1/completions", {**body, "prompt": text})
        messages = [{"role": "user", "content": text}]
        return _posted("/v1/chat/completions", {**body, "messages": messages})

    def _logprobs(self) -> Act:
        body = {"input_ids": self._prompt(), "sampling_params": self._sampling()}
        return _posted("/generate", {**body, "return_logprob": True, "logprob_start_len": 0})

    def _too_long(self) -> Act:
        tokens = prompt(self.capacity + self.random.choice((1, 100, 5000)), 1)
        return _posted("/generate", {"input_ids": tokens, "sampling_params": self._sampling()})

    def _endless(self) -> Act:
        new = self.random.choice((100_000, 10**9))  # within and beyond the model's context
        sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": self._prompt(), "sampling_params": sampling}
        fate = self.random.choice(("hang up", "abort"))
        return self._streamed(body, fate, self.random.randrange(20))

    def _streamed(self, body: dict[str, Any], fate: str, tokens: int) -> Act:
        """A request that meets its fate after so many tokens, in half of the cases earlier."""
        early, seconds = self.random.random() < 0.5, self.random.uniform(0.0, EARLY_SECONDS)
        # The point keeps ids from beginning with another's: SGLang aborts all that begin alike.
        body = {**body, "rid": f"chaos-{self.seed}.", "stream": True}
        wait = seconds if early and fate != "finish" else None
        return lambda server: Streamed(server, body, fate).end(tokens, wait)

    def _nonsense_settings(self) -> Act:
        wishes = self.random.choice(NONSENSE_SETTINGS)
        sampling = {"max_new_tokens": 2, "custom_params": {"arkvale": wishes}}
        return _posted("/generate", {"input_ids": [5, 6, 7], "sampling_params": sampling})

    def _malformed(self) -> Act:
        what, body = self.random.choice(NONSENSE_BODIES)
        if not isinstance(body, bytes):
            body.setdefault("sampling_params", {"max_new_tokens": 2})
        return _posted("/generate", body, what)

    def _giant(self) -> Act:
        return _posted("/generate", {"text": "x" * (1 << 20), "sampling_params": {}})

    def _half(self) -> Act:
        """Begin a request and close the connection."""
        length = self.random.choice((0, 40, 100000))
        data = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        data += b"Content-Length: %d\r\n\r\n" % length + b'{"input_ids": [5, 6, 7], '
        cut = self.random.randrange(1, len(data))

        def act(server: Server) -> str:
            with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as client:
                client.sendall(data[:cut])
            return "closed"

        return act

    def _wrong_path(self) -> Act:
        method, path = self.random.choice(PATHS)

        def act(server: Server) -> str:
            client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
            with contextlib.closing(client):
                client.request(method, path, body=b"{}")
                return str(client.getresponse().status)

        return act

    def _abort_unknown(self) -> Act:
        return _posted("/abort_request", {"rid": f"nobody-{self.seed}"})

    def _look(self) -> Act:
        path = self.random.choice(("/health", "/server_info", "/model_info", "/v1/models"))

        def act(server: Server) -> str:
            with server_get(server, path) as answer:
                answer.read()
                return str(answer.status)

        return act

    def _flush(self) -> Act:
        return _posted("/flush_cache", {})


def server_get(server: Server, path: str) -> Any:
    """The open answer of a GET."""
    return urllib.request.urlopen(f"{server.url}{path}", timeout=SECONDS)


def _posted(path: str, body: Any, what: str = "") -> Act:
    """Post a body, JSON or bytes, and read the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def act(server: Server) -> str:
        request = urllib.request.Request(
            f"{server.url}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                answer.read()
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        return f"{what}: {status}" if what else str(status)

    return act


class Streamed:
    """A request whose answer is read as it comes, until it ends or meets its fate.

    Args:
        fate: ``hang up``, ``abort``, or ``finish``, which leaves it alone.
    """

    def __init__(self, server: Server, body: dict[str, Any], fate: str):
        self._server, self._body, self._fate = server, body, fate
        self._client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        self._ended: str | None = None
        self._retracted = self._hung_up = self._aborted = False
        self._socket: socket.socket

    def end(self, tokens: int, seconds: float | None) -> str:
        """Send it and say how it ended: its fate only if it met it, or the code of an error.

        Args:
            tokens: after which it meets its fate at the latest.
            seconds: the same, counted from before it is sent.
        """
        with contextlib.closing(self._client):
            self._client.connect()
            self._socket = self._client.sock
            with _later(seconds, self._meet):
                try:
                    self._read(tokens)
                except (OSError, http.client.HTTPException):
                    if not self._hung_up:
                        raise
        end = self._ended or ("hang up" if self._hung_up else "cut off")
        return f"{end}, retracted" if self._retracted else end

    def _read(self, tokens: int) -> None:
        headers = {"Content-Type": "application/json"}
        self._client.request("POST", "/generate", json.dumps(self._body), headers)
        with self._client.getresponse() as answer:
            if answer.status != 200:
                self._ended = str(answer.status)
                return
            parts = (json.loads(line[6:]) for line in answer if line.startswith(b"data: {"))
            for count, part in enumerate(parts):
                self._take(part)
                if count == tokens and self._ended is None:
                    self._meet()
                if self._hung_up:
                    return

    def _take(self, part: dict[str, Any]) -> None:
        """Note what a part says of the end: an error, or a reason, which may be an error too."""
        if "error" in part:
            self._ended = str(part["error"]["code"])
            return
        about = part["meta_info"]
        self._retracted |= bool(about.get("num_retractions"))
        reason = about.get("finish_reason")
        if reason is None:
            return
        self._ended = "finish"
        if reason["type"] == "abort":
            word = "abort" if self._aborted else "aborted unasked"
            self._ended = str(reason.get("status_code") or word)

    def _meet(self) -> None:
        """Meet the fate now; a hang-up also wakes a read that waits for the server."""
        if self._fate == "hang up":
            self._hung_up = True
            with contextlib.suppress(OSError):  # the server may have closed it already
                self._socket.shutdown(socket.SHUT_RDWR)
        elif self._fate == "abort":
            self._aborted = True
            self._server.post("/abort_request", {"rid": self._body["rid"]}, SECONDS)


@contextlib.contextmanager
def _later(seconds: float | None, do: Callable[[], None]) -> Iterator[None]:
    """Do it after so many seconds, unless the block ends before; ``None`` is never."""
    if seconds is None:
        yield
        return
    over = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        timer = pool.submit(lambda: over.wait(seconds) or do())
        try:
            yield
        finally:
            over.set()
    timer.result()
