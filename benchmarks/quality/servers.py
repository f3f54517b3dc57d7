"""Rules that are compared, the servers they run on, and how an episode is held with them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from arkvale_sglang.cli.launch import Server
from arkvale_sglang.config.settings import ArkValeConfig
from arkvale_sglang.runtime.dropping import OBSERVED_TOKENS
from quality.tasks import Episode, Turn

CONTEXT = 36_864
ANSWER_TOKENS = 16
SPARE_TOKENS = 288
"""Frames beyond the budget: the open page, a chunk in prefill, and what admission keeps free."""
COMMON = [
    "--dtype", "float32", "--random-seed", "0", "--log-level", "warning", "--sleep-on-idle",
    "--kv-policy", "arkvale", "--arkvale-dense-layers", "0", "--arkvale-host-memory", "1",
    "--chunked-prefill-size", "4096", "--disable-overlap-schedule",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to choose pages; everything else is the same for all."""

    name: str
    """As tables show it."""
    budget: int = 0
    """Tokens; 0 attends to everything."""
    selection: str = "recall"
    digest: str = ArkValeConfig.digest
    groups: int = ArkValeConfig.head_groups
    head_reduce: str = ArkValeConfig.head_reduce
    top_k: int | None = None

    @property
    def wishes(self) -> dict[str, Any]:
        """What requests carry."""
        if not self.budget:
            return {}
        wishes: dict[str, Any] = {
            "budget": self.budget, "selection": self.selection, "head_reduce": self.head_reduce,
        }  # fmt: skip
        return wishes if self.top_k is None else {**wishes, "top_k": self.top_k}

    @property
    def device_tokens(self) -> int | None:
        """Tokens its frames hold, where that is less than everything.

        Recall has frames for its budget alone and little more.  Rules that drop never need what
        they dropped, so they run where everything fits, beside full attention.
        """
        recalls = self.budget and self.selection == "recall"
        return self.budget + SPARE_TOKENS if recalls else None

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of the server it runs on; rules with equal flags share a server."""
        layout = ("--arkvale-digest", self.digest, "--arkvale-head-groups", str(self.groups))
        if self.device_tokens is None:
            return (*layout, "--arkvale-budget", str(CONTEXT))
        frames = ("--arkvale-device-tokens", str(self.device_tokens))
        return (*layout, "--arkvale-budget", str(self.budget), *frames)


@dataclasses.dataclass
class Tally:
    """What a rule scored on the questions about one text."""

    asked: int = 0
    right: int = 0
    steps: int = 0
    recalled: int = 0
    bytes_recalled: int = 0
    hits: int = 0
    misses: int = 0

    def __add__(self, other: Tally) -> Tally:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Tally(*map(operator.add, mine, others))


class Examiner:
    """Holds episodes with one server."""

    def __init__(self, server: Server, tokenizer: PreTrainedTokenizerBase):
        self._server, self._tokenizer = server, tokenizer

    def hold(self, episode: Episode, rule: Rule) -> Tally:
        """Ask every turn of an episode that expects an answer.

        What went before is said with the answers it should have got, so that every rule is asked
        the same, however wrong it was.
        """
        tally = Tally()
        messages: list[dict[str, str]] = []
        for turn in episode.turns:
            messages.append({"role": "user", "content": turn.message})
            if turn.expected:
                self._score(messages, turn, rule, tally)
            messages.append({"role": "assistant", "content": turn.answer})
        return tally

    def _score(self, messages: list[dict[str, str]], turn: Turn, rule: Rule, tally: Tally) -> None:
        """Ask for the last message and count what is right, and what recall did for it."""
        before = self._counters()
        answer = self._ask(messages, rule, len(turn.expected) * ANSWER_TOKENS)
        grown = {name: after - before[name] for name, after in self._counters().items()}
        tally.asked += len(turn.expected)
        tally.right += sum(item in answer["text"] for item in turn.expected)
        tally.steps += answer["meta_info"]["completion_tokens"] - 1  # prefill gives the first
        tally.recalled += grown["pages_recalled"]
        tally.bytes_recalled += grown["bytes_recalled"]
        tally.hits += grown["page_hits"]
        tally.misses += grown["page_misses"]

    def _counters(self) -> dict[str, int]:
        report = self._server.arkvale()
        names = ("pages_recalled", "bytes_recalled", "page_hits", "page_misses")
        return {name: report[name] for name in names}

    def _ask(self, messages: list[dict[str, str]], rule: Rule, most: int) -> dict[str, Any]:
        prompt = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens = self._tokenizer.encode(prompt, add_special_tokens=False)
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": most}
        if rule.wishes:
            sampling["custom_params"] = {"arkvale": rule.wishes}
        body = {"input_ids": tokens, "sampling_params": sampling}
        # Log-probabilities are asked of the end of the prompt so that it is computed, not found in
        # the prefix cache: the rules that rank by its queries would else see the last few alone.
        end = {"return_logprob": True, "logprob_start_len": max(0, len(tokens) - OBSERVED_TOKENS)}
        return self._server.post("/generate", {**body, **end})


def by_server(rules: Sequence[Rule]) -> dict[tuple[str, ...], list[Rule]]:
    """Rules by the flags of the server they share."""
    groups: dict[tuple[str, ...], list[Rule]] = {}
    for rule in rules:
        groups.setdefault(rule.flags, []).append(rule)
    return groups
