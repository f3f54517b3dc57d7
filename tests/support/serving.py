"""Requests against live servers, and the float64 ruler that judges them."""

from __future__ import annotations

import random
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arkvale_sglang.cli.launch import Server

TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
"""Environment of a server with ``--tp 2`` on a CPU: a core for each."""


def prompt(tokens: int, seed: int) -> list[int]:
    """Random byte tokens, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(2, 258) for _ in range(tokens)]


def generate(
    server: Server, tokens: list[int], new: int, prompt_logprobs: bool = False
) -> dict[str, Any]:
    """One greedy request with the log-probabilities of its new tokens, or of the prompt too
    (SGLang then computes the whole prompt, cached or not)."""
    return generate_together(server, [tokens], new, prompt_logprobs)[0]


def generate_together(
    server: Server,
    prompts: list[list[int]],
    new: int,
    prompt_logprobs: bool = False,
    wishes: list[dict[str, Any] | None] | None = None,
) -> list[dict[str, Any]]:
    """The same for several requests, sent as one so that they run side by side; ``wishes`` are what
    each asks of the policy."""
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    body = {
        "input_ids": prompts,
        "sampling_params": [
            sampling if wish is None else {**sampling, "custom_params": {"arkvale": wish}}
            for wish in wishes or [None] * len(prompts)
        ],
        "return_logprob": True,
        **({"logprob_start_len": 0} if prompt_logprobs else {}),
    }
    return server.post("/generate", body)


def logprobs(answer: dict[str, Any]) -> np.ndarray:
    """Log-probabilities of prompt tokens that were computed, then of the new tokens."""
    meta = answer["meta_info"]
    pairs = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    return np.array([pair[0] for pair in pairs if pair[0] is not None])


def flush(server: Server) -> bool:
    """Ask for an empty cache; SGLang declines while requests run."""
    try:
        server.post("/flush_cache", {})
    except urllib.error.HTTPError:
        return False
    return True


def wait_idle(server: Server, seconds: float = 60.0) -> dict[str, Any]:
    """Wait until no request holds a page beyond the radix tree; returns the policy's report."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        flush(server)
        report = server.arkvale()
        if report["logical_pages_used"] == 0:
            return report
        time.sleep(0.5)
    raise AssertionError(f"the server is not idle: {report}")


class Ruler:
    """The model in float64: what every server's log-probabilities are measured against."""

    def __init__(self, model: Path):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)

    def error(self, tokens: list[int], answer: dict[str, Any]) -> float:
        """Largest deviation of an answer's log-probabilities from float64, on its own tokens."""
        ids = torch.tensor([[*tokens, *answer["output_ids"]]])
        with torch.inference_mode():
            logits = self._model(ids[:, :-1]).logits[0]
        exact = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        found = logprobs(answer)
        return float(np.abs(found - exact[-len(found) :]).max())
