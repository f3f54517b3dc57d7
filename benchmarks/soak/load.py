"""The load: clients that talk to the server one request after the other until they are stopped."""

from __future__ import annotations

import http.client
import itertools
import random
import statistics
import threading
import time
from typing import Any

from arkvale_sglang.cli.launch import Server

FLAGS = (
    "--kv-policy", "arkvale", "--page-size", "16", "--arkvale-budget", "256",
    "--arkvale-device-tokens", "1024", "--max-total-tokens", "8192",
    "--arkvale-host-memory", "0.25", "--arkvale-dense-layers", "1",
    "--chunked-prefill-size", "256", "--max-running-requests", "8", "--random-seed", "1",
    "--log-level", "warning", "--sleep-on-idle",
)  # fmt: skip
"""Frames for an eighth of the logical pages: pages are evicted and recalled all the time."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
"""Threads that wait for each other in every op stand still while the machine does other work."""
DOCUMENTS, CLIENTS = 24, 3
WISHES = (None, None, None, {"budget": 128}, {"budget": 192, "selection": "h2o"})
VOCABULARY = (2, 258)


def prompt(length: int, seed: object) -> list[int]:
    """Random tokens; the same seed gives the same ones."""
    rng = random.Random(str(seed))
    return [rng.randrange(*VOCABULARY) for _ in range(length)]


def request(rng: random.Random) -> dict[str, Any]:
    """A question about one of the documents, some with settings of their own."""
    number = rng.randrange(DOCUMENTS)
    document = prompt(200 + 25 * number, f"document {number}")
    sampling: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
    sampling["max_new_tokens"] = rng.randrange(16, 49)
    wish = rng.choice(WISHES)
    if wish is not None:
        sampling["custom_params"] = {"arkvale": wish}
    question = prompt(rng.randrange(8, 40), rng.random())
    return {"input_ids": document + question, "sampling_params": sampling}


def failure(part: dict[str, Any]) -> bool:
    """Whether a streamed part says that its request failed: the status is sent before, as 200."""
    about = part.get("meta_info")
    return about is None or (about.get("finish_reason") or {}).get("type") == "abort"


class Load:
    """Clients in threads of their own; every tenth request hangs up in the middle of its answer."""

    def __init__(self, server: Server, seed: int):
        self._server = server
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._gaps: list[float] = []
        self._tokens = self._requests = self._failed = 0
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed}-{client}"),))
            for client in range(CLIENTS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            body, hangs_up = request(rng), rng.random() < 0.1
            stamps: list[float] = []
            served = False  # a server that dies between two parts ends a stream without an error
            try:
                stream = self._server.stream(body)
                for part in stream:
                    if failure(part):
                        continue
                    stamps.append(time.perf_counter())
                    served = part["meta_info"].get("finish_reason") is not None
                    if hangs_up and len(stamps) == 5:
                        stream.close()
                        served = True
                        break
            except (OSError, http.client.HTTPException, ValueError):
                served = False
            with self._lock:
                self._gaps += [later - earlier for earlier, later in itertools.pairwise(stamps)]
                self._tokens += len(stamps)
                self._requests += 1
                self._failed += not served
            if not served:
                self._stop.wait(1)

    def take(self) -> dict[str, float]:
        """What the clients saw since the last call: requests, tokens, median gap between tokens.

        Raises:
            RuntimeError: a client ended by itself, so the load is not what it was.
        """
        alive = sum(thread.is_alive() for thread in self._threads)
        if alive < CLIENTS and not self._stop.is_set():
            raise RuntimeError(
                f"only {alive} of {CLIENTS} clients are alive, so the load is no longer constant; "
                "see the traceback above."
            )
        with self._lock:
            found = {
                "requests": self._requests,
                "failed": self._failed,
                "tokens": self._tokens,
                "ms_per_token": statistics.median(self._gaps) * 1e3 if self._gaps else float("nan"),
            }
            self._gaps, self._tokens, self._requests, self._failed = [], 0, 0, 0
        return found
