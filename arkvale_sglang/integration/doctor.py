"""Whether this SGLang lets the policy in: it imports, hook points resolve, plugins are loaded.

SGLang is imported inside functions alone, so that its absence is a finding and no failure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from arkvale_sglang.integration import compat

OK, NOTE, PROBLEM = "ok", "note", "problem"
"""Nothing to do; worth knowing; keeps the policy from running."""
ENTRY_POINTS = {
    "sglang.srt.plugins": ("arkvale", "arkvale_sglang.integration.plugin:register"),
    "sglang.srt.platforms": ("arkvale_cpu", "arkvale_sglang.integration.cpu_platform:activate"),
}
"""What our distribution registers, by group: SGLang finds it by these alone."""


class Check(NamedTuple):
    """One thing looked at."""

    name: str
    status: str
    """``OK``, ``NOTE`` or ``PROBLEM``."""
    found: str
    remedy: str = ""
    """What to do, a sentence, unless there is nothing to do."""


def release() -> Check:
    """The SGLang that is installed, and whether it can be imported."""
    try:
        version = compat.version()
    except importlib.metadata.PackageNotFoundError:
        newest = compat.SUPPORTED[-1]
        return Check(
            "sglang", PROBLEM, "not installed", f"Install it: pip install sglang=={newest}."
        )
    try:
        with _quietly():
            importlib.import_module("sglang.srt.managers.scheduler")
    except (Exception, SystemExit) as error:
        return Check(
            "sglang", PROBLEM, f"{version}, which cannot be imported ({_told(error)})",
            "Mend what the error names, or install SGLang and its dependencies anew.",
        )  # fmt: skip
    if version not in compat.SUPPORTED:
        return Check(
            "sglang", NOTE, f"{version}, which the suite does not run on",
            f"Where a hook point below is a problem, install one of {', '.join(compat.SUPPORTED)}.",
        )  # fmt: skip
    return Check("sglang", OK, version)


def hook_points() -> list[Check]:
    """Every function of SGLang that the policy wraps."""
    checks = []
    for point in compat.hook_points().values():
        with _quietly():
            reason = compat.problem(point)
            there = reason is None and compat.exists(point)
        name = f"{point.target.removeprefix('sglang.srt.')}({', '.join(point.parameters)})"
        if reason is not None:
            remedy = f"Install a release that has it, one of {', '.join(compat.SUPPORTED)}."
            checks.append(Check(name, PROBLEM, reason, remedy))
        else:
            found = "" if there else "absent in this release, which does without"
            checks.append(Check(f"{name}, optional" if point.optional else name, OK, found))
    return checks


def plugins(on_gpu: bool) -> list[Check]:
    """Whether SGLang finds our entry points, and its environment variables let them in.

    Args:
        on_gpu: whether the CPU platform is not needed.
    """
    checks = []
    for group, (name, value) in ENTRY_POINTS.items():
        found = {point.name: point for point in importlib.metadata.entry_points(group=group)}
        label = f"{name} in {group}"
        bad = NOTE if on_gpu and group == "sglang.srt.platforms" else PROBLEM
        allowed = {part.strip() for part in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
        platform = os.environ.get("SGLANG_PLATFORM") or ENTRY_POINTS["sglang.srt.platforms"][0]
        if name not in found or found[name].value != value:
            checks.append(Check(label, bad, "not registered", "Install the package: pip install ."))
        elif allowed and name not in allowed:
            checks.append(
                Check(
                    label, bad, f"kept out by SGLANG_PLUGINS={os.environ['SGLANG_PLUGINS']}",
                    f"Add {name} to SGLANG_PLUGINS, or unset it.",
                )
            )  # fmt: skip
        elif platform != ENTRY_POINTS["sglang.srt.platforms"][0]:
            checks.append(
                Check(
                    label, PROBLEM, f"kept out by SGLANG_PLATFORM={platform}: SGLang then skips "
                    "packages with another platform", "Unset SGLANG_PLATFORM.",
                )
            )  # fmt: skip
        else:
            checks.append(Check(label, OK, value))
    return checks


def platform() -> Check:
    """What SGLang runs on where there is no GPU; takes an SGLang that can be imported."""
    with _quietly():
        from arkvale_sglang.integration import cpu_platform

        ours = cpu_platform.activate()
    if ours is None:
        return Check(
            "platform", NOTE, "an accelerator or CPU engine of SGLang's own",
            "The policy was not tried on it; CUDA and a plain CPU are what it knows.",
        )  # fmt: skip
    return Check("platform", OK, "plain CPU, by torch operators")


def _told(error: BaseException) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what SGLang prints and logs while it is imported out of the findings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
