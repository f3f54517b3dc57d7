"""What a user can set: one frozen object, every default written once, checked in one place."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

PAGE_SIZES = (16, 32, 64)
DIGESTS = ("cuboid-mean", "cuboid-max", "cuboid-center", "mean-std")
DIGEST_DTYPES = ("auto", "fp8")
ATTENTIONS = ("flashinfer", "triton")
HEAD_REDUCES = ("mean", "max", "softmax-mean")
SELECTIONS = ("recall", "streaming", "snapkv", "h2o")
"""The policy, and rules that drop pages for good, kept to be compared with."""
POLICIES = ("full", "arkvale")
"""Of a server and of a request: everything, or the pages that matter."""
PER_REQUEST = ("policy", "budget", "top_k", "head_reduce", "selection")
"""Settings that a request may carry for itself."""
DEFAULT_PAGE_SIZE = 32
STREAM_OFF = "off"
PAPER_TOP_K = 1280
"""Tokens' worth of guaranteed pages beyond which the paper found no gain (section 5.1)."""


class ArkValeError(ValueError):
    """A setting, model or machine that the policy cannot serve; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class ArkValeConfig:
    """Settings of ``--kv-policy arkvale``; sizes are in tokens unless a name says otherwise.

    Raises:
        ArkValeError: on construction, if the settings contradict each other.
    """

    budget: int = 4096
    """Tokens attended per request, layer and step, the page being written included."""
    top_k: int | None = None
    """Of these, tokens' worth of pages ranked by score that are recalled if missing, beside the
    sink and window pages; ``None`` means min(1280, budget / 2)."""
    sink_pages: int = 2
    window_pages: int = 2
    """Most recent pages, always attended; counts the page being written."""
    digest: str = "cuboid-center"
    """Of those that find a fact at a tight budget the one that loses least; the paper prefers
    cuboid-mean (``docs/quality.md`` compares them)."""
    digest_dtype: str = "auto"
    """``auto`` stores digests as the keys are, ``fp8`` in half or a quarter of the bytes."""
    head_groups: int = 1
    """Lanes per layer: groups of KV heads that choose their own pages.  More than one recalls more
    and found no more (``docs/quality.md``)."""
    head_reduce: str = "mean"
    selection: str = "recall"
    """``recall`` chooses anew in every step; ``streaming`` (sinks and the latest pages),
    ``snapkv`` (chosen once by the end of the prompt) and ``h2o`` (accumulated attention) never
    attend again to a page they left out."""
    dense_layers: int = 2
    """First layers left unmanaged: they keep every page on the device and attend to all."""
    host_memory: float | None = None
    """GiB of host memory for backups; ``None`` takes a share of what is free."""
    device_tokens: int | None = None
    """Tokens held by the frames of one lane; ``None`` sizes them from the device memory."""
    recall_cap: int | None = None
    """Most pages recalled by score per request, lane and step; ``None`` means no cap, 0 that
    what was evicted stays away.  Sinks, the window and requests within their budget are whole."""
    oversubscription: float = 1.0
    """Frames promised to running requests per frame that exists; above 1 the rows of a batch
    that do not fit together attend in turns within a step, recalling what they lost."""
    attention: str | None = None
    """Who attends on a GPU; ``None`` takes FlashInfer where it is installed and knows the shape."""
    stream: str | None = None
    """ZMQ endpoint that what the cache does is published on, or ``off``; ``None`` takes a free
    port of this machine alone.  Whoever reaches it can read it."""
    page_size: int = DEFAULT_PAGE_SIZE
    policy: str = "arkvale"
    """``full`` attends to everything whatever the budget; a request alone can set it, since a whole
    server of that policy is stock SGLang."""
    check_invariants: bool = False
    """Check the tables whenever the server is idle and stop it on the first violation."""
    check_transfers: bool = False
    """Keep a checksum of every backed-up page and stop the server if one comes back changed."""

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            _refuse(
                f"page size {self.page_size} is not supported by the arkvale policy",
                f"set --page-size to one of {', '.join(map(str, PAGE_SIZES))}",
            )
        _check_choice("--arkvale-digest", self.digest, DIGESTS)
        _check_choice("--arkvale-digest-dtype", self.digest_dtype, DIGEST_DTYPES)
        if self.attention is not None:
            _check_choice("--arkvale-attention", self.attention, ATTENTIONS)
        if self.attention == "flashinfer" and self.recall_cap is not None:
            _refuse(
                "--arkvale-recall-cap leaves lists of differing lengths, and FlashInfer plans on "
                "lengths",
                "use --arkvale-attention triton with it",
            )
        _check_choice("--arkvale-head-reduce", self.head_reduce, HEAD_REDUCES)
        _check_choice("--arkvale-selection", self.selection, SELECTIONS)
        for flag, value, least in (
            ("--arkvale-sink-pages", self.sink_pages, 0),
            ("--arkvale-window-pages", self.window_pages, 1),
            ("--arkvale-head-groups", self.head_groups, 1),
            ("--arkvale-dense-layers", self.dense_layers, 0),
            ("--arkvale-recall-cap", self.recall_cap, 0),
            ("--arkvale-device-tokens", self.device_tokens, self.page_size),
            ("--arkvale-top-k", self.top_k, 1),
            ("--arkvale-oversubscription", self.oversubscription, 1),
        ):
            if value is not None and not least <= value < math.inf:
                _refuse(
                    f"{flag} is {value} but must be at least {least}", f"set it to {least} or more"
                )
        if self.host_memory is not None and not 0 < self.host_memory < math.inf:
            _refuse(
                f"--arkvale-host-memory is {self.host_memory} GiB, which holds no pages",
                "give it a positive number",
            )
        if self.stream is not None and self.stream != STREAM_OFF:
            scheme, _, address = self.stream.partition("://")
            if scheme not in ("tcp", "ipc") or not address:
                _refuse(
                    f"--arkvale-stream {self.stream!r} is no endpoint",
                    f"write tcp://ADDRESS:PORT, ipc://PATH or {STREAM_OFF}",
                )
        least = (self.sink_pages + self.window_pages + 1) * self.page_size
        if self.budget < least:
            _refuse(
                f"--arkvale-budget {self.budget} leaves no page to choose beside "
                f"{self.sink_pages} sink and {self.window_pages} window pages of "
                f"{self.page_size} tokens",
                f"raise it to at least {least}",
            )
        if self.top_k is not None and self.top_k > self.budget:
            _refuse(
                f"--arkvale-top-k {self.top_k} exceeds --arkvale-budget {self.budget}, and pages "
                "outside the budget are never attended",
                "lower the one or raise the other",
            )

    @property
    def budget_pages(self) -> int:
        """Most pages a row attends to in one step, the open page included."""
        return self.budget // self.page_size

    @property
    def frame_pages(self) -> int:
        """Most pages that must hold a frame for a row to attend; under ``full`` the open one alone,
        since all others are read wherever they are."""
        return 1 if self.policy == "full" else self.budget_pages

    @property
    def must_pages(self) -> int:
        """Ranked pages recalled if missing; sinks and the window come on top, within the budget."""
        room = self.budget_pages - self.sink_pages - self.window_pages
        if self.selection != "recall":
            return room  # what is resident has no advantage where the rest is lost
        tokens = min(PAPER_TOP_K, self.budget // 2) if self.top_k is None else self.top_k
        return max(1, min(tokens // self.page_size, room))

    def to_json(self) -> str:
        """A string that :meth:`from_json` turns back into an equal object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ArkValeConfig:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(text))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ArkValeConfig:
        """Build from named settings; ``None`` stands for the default.

        Raises:
            ArkValeError: unknown names, or settings that contradict each other.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if values.get("policy") not in (None, "arkvale"):
            _refuse(
                f"arkvale_policy is {values['policy']!r}, which only a request can set",
                "leave it out, or serve with --kv-policy full",
            )
        unknown = sorted(set(values) - known)
        if unknown:
            _refuse(
                f"unknown arkvale setting {unknown[0]!r}", f"use one of {', '.join(sorted(known))}"
            )
        return cls(**{name: value for name, value in values.items() if value is not None})

    def for_request(self, wishes: object) -> ArkValeConfig:
        """These settings with what a request asks for itself.

        Args:
            wishes: the value of ``arkvale`` in the request's ``custom_params``; ``None`` for none.

        Raises:
            ArkValeError: not a mapping, a name that is not in ``PER_REQUEST``, a value of the
                wrong type, more than this server's budget, or a contradiction.

        Returns:
            This very object if nothing differs.
        """
        if wishes is None:
            return self
        if not isinstance(wishes, Mapping):
            raise ArkValeError(
                f"custom_params['arkvale'] is {shown(wishes)}; make it an object of named settings."
            )
        for name, value in wishes.items():
            if name not in PER_REQUEST:
                _refuse(
                    f"custom_params['arkvale'] has {shown(name)}, which no request can set",
                    f"use any of {', '.join(PER_REQUEST)}",
                )
            kind = int if name in ("budget", "top_k") else str
            if not isinstance(value, kind) or isinstance(value, bool):
                _refuse(
                    f"custom_params['arkvale'][{name!r}] is {shown(value)}",
                    f"give it {_KINDS[kind]}",
                )
        policy = wishes.get("policy", self.policy)
        _check_choice("custom_params['arkvale']['policy']", policy, POLICIES)
        if policy == "full":
            for name in set(wishes) - {"policy"}:
                _refuse(
                    f"custom_params['arkvale'] has {name!r} beside the policy 'full', which has no "
                    "use for it",
                    "leave one of the two out",
                )
            return dataclasses.replace(self, policy="full", selection="recall")
        if wishes.get("budget", 0) > self.budget:
            _refuse(
                f"custom_params['arkvale'] asks for a budget of {shown(wishes['budget'])} tokens, "
                f"but this server was started with --arkvale-budget {self.budget}",
                "ask for no more",
            )
        own: dict[str, Any] = dict(wishes)
        if "budget" in own and self.top_k is not None:
            own.setdefault("top_k", min(self.top_k, own["budget"]))
        try:
            settings = dataclasses.replace(self, **own)
        except ArkValeError as error:
            raise ArkValeError(f"custom_params['arkvale']: {error}") from None
        return self if settings == self else settings._in_whole_pages()

    def _in_whole_pages(self) -> ArkValeConfig:
        """The same pages: requests that come to the same have equal settings and run together."""
        top_k, size = self.top_k, self.page_size
        return dataclasses.replace(
            self,
            budget=self.budget_pages * size,
            top_k=None if top_k is None else max(1, top_k // size) * size,
        )

    def as_reported(self) -> dict[str, str | int]:
        """What a request is served with, under the names it asks by; tokens are whole pages."""
        if self.policy == "full":
            return {"policy": "full"}
        return {
            "policy": "arkvale",
            "budget": self.budget_pages * self.page_size,
            "top_k": self.must_pages * self.page_size,
            "head_reduce": self.head_reduce,
            "selection": self.selection,
        }


_KINDS = {int: "a whole number", str: "a name"}
_SHOWN = 100
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, _SHOWN, _SHOWN


def shown(value: object) -> str:
    """Of a value that came from outside as much as a sentence has room for."""
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(f"{flag} {shown(value)} is unknown", f"choose one of {', '.join(choices)}")


def _refuse(what: str, remedy: str) -> None:
    raise ArkValeError(f"{what}; {remedy}.")
