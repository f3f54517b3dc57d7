"""Whether the policy can run here, and what to do where it cannot: ``arkvale doctor``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from arkvale_sglang import __version__
from arkvale_sglang.config.settings import ArkValeError
from arkvale_sglang.core.sizing import GIB, HOST_SHARE
from arkvale_sglang.integration import doctor as engine
from arkvale_sglang.integration.doctor import NOTE, OK, PROBLEM, Check

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Limit and use of this control group, by its version 2 and 1."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 0.25
"""GiB in ``/dev/shm``; containers have 0.0625 unless told otherwise, which ranks outgrow."""
LEAST_CAPABILITY = (8, 0)
"""Oldest GPU that the kernels are compiled and checked for."""


def examine() -> dict[str, list[Check]]:
    """Everything that decides whether the policy can run here, by section."""
    on_gpu = torch.cuda.is_available()
    release = engine.release()
    sections = {
        "versions": [*versions(on_gpu), release, torchvision()],
        "plugins": engine.plugins(on_gpu),
        "device": gpus() if on_gpu else [no_gpu()],
        "memory": [*host_memory(on_gpu), shared_memory()],
    }
    if release.status != PROBLEM:
        sections["hook points, relative to sglang.srt"] = engine.hook_points()
        if not on_gpu:
            sections["device"].append(engine.platform())
    return sections


def versions(on_gpu: bool) -> list[Check]:
    """Of what the policy stands on, but SGLang."""
    checks = [Check("python", OK, platform.python_version()), Check("arkvale", OK, __version__)]
    for name, distribution, needed in (
        ("torch", "torch", True),
        ("triton", "triton", on_gpu),
        ("transformers", "transformers", True),
    ):
        try:
            checks.append(Check(name, OK, importlib.metadata.version(distribution)))
        except importlib.metadata.PackageNotFoundError:
            status = PROBLEM if needed else NOTE
            remedy = f"Install it: pip install {distribution}." if needed else ""
            checks.append(Check(name, status, "not installed", remedy))
    try:
        checks.append(Check("flashinfer", OK, importlib.metadata.version("flashinfer-python")))
    except importlib.metadata.PackageNotFoundError:
        what = "not installed: a GPU would attend by Triton"
        checks.append(Check("flashinfer", NOTE if on_gpu else OK, what))
    return checks


def torchvision() -> Check:
    """transformers insists on one that imports; the registry's needs a patch without CUDA."""
    try:
        module = importlib.import_module("torchvision")
    except Exception as error:
        return Check(
            "torchvision", PROBLEM, f"cannot be imported ({error})",
            "Install one that is built for this torch, or, without CUDA, run patches/"
            "torchvision_cpu.py apply from the project's sources.",
        )  # fmt: skip
    patched = "patches/torchvision_cpu.py" in Path(str(module.__file__)).read_text()
    state = "patched for a CPU" if patched else "as it is shipped"
    return Check("torchvision", OK, f"{module.__version__}, {state}")


def gpus() -> list[Check]:
    """Name, memory, driver and compute capability of every GPU that torch sees."""
    checks = []
    driver = _driver() or "unknown"
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = (known.major, known.minor)
        found = (
            f"{known.name}, {known.total_memory / GIB:.1f} GiB, compute capability "
            f"{known.major}.{known.minor}, driver {driver}"
        )
        if capability < LEAST_CAPABILITY:
            remedy = "The kernels are compiled and checked for 8.0 and newer; try at your own risk."
            checks.append(Check(f"GPU {index}", NOTE, found, remedy))
        else:
            checks.append(Check(f"GPU {index}", OK, found))
    return checks


def no_gpu() -> Check:
    """Whether there is really none, or torch cannot use it."""
    driver = _driver()
    if driver is None:
        return Check("GPU", OK, "none")
    return Check(
        "GPU", PROBLEM, f"the driver {driver} answers, but torch {torch.__version__} sees no GPU",
        "Install a build of torch for CUDA that this driver knows, or look at "
        "CUDA_VISIBLE_DEVICES.",
    )  # fmt: skip


def _driver() -> str | None:
    """Version of the NVIDIA driver, or ``None`` where none answers."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def host_memory(on_gpu: bool) -> list[Check]:
    """What is free for backups, and what may be pinned."""
    free = psutil.virtual_memory().available
    checks = [Check("host memory", OK, f"{free / GIB:.1f} GiB free")]
    room = _cgroup_room()
    if room is None:
        checks.append(Check("control group", OK, "no limit"))
    elif room < HOST_SHARE * free:
        checks.append(
            Check(
                "control group", NOTE, f"{room / GIB:.1f} GiB left of its limit",
                f"Name --arkvale-host-memory below that; its default, {HOST_SHARE:.0%} of what the "
                "machine has free, does not fit.",
            )
        )  # fmt: skip
    else:
        checks.append(Check("control group", OK, f"{room / GIB:.1f} GiB left of its limit"))
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        checks.append(Check("locked memory", OK, "no limit (ulimit -l)"))
    elif on_gpu:
        checks.append(
            Check(
                "locked memory", NOTE, f"at most {limit / GIB:.3f} GiB (ulimit -l)",
                "Where CUDA cannot pin the backups, raise it: ulimit -l unlimited, or, for a "
                "container, --ulimit memlock=-1.",
            )
        )  # fmt: skip
    else:
        found = f"at most {limit / GIB:.3f} GiB (ulimit -l); a CPU pins nothing"
        checks.append(Check("locked memory", OK, found))
    return checks


def _cgroup_room() -> int | None:
    """Bytes that the limit of this control group leaves, or ``None`` without limit."""
    for limit_file, use_file in CGROUP_FILES:
        try:
            limit, used = (int(Path(file).read_text()) for file in (limit_file, use_file))
        except (OSError, ValueError):  # absent, or "max"
            continue
        if limit < psutil.virtual_memory().total:
            return max(0, limit - used)
    return None


def shared_memory() -> Check:
    """Ranks of tensor parallelism talk through it."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return Check(
            str(SHARED_MEMORY), PROBLEM, f"cannot be used ({error.strerror})",
            "Mount it as tmpfs; SGLang's processes share memory through it.",
        )  # fmt: skip
    found = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free"
    if usage.free < LEAST_SHARED_MEMORY * GIB:
        remedy = "Enlarge it for --tp above 1; for a container, --shm-size 1g."
        return Check(str(SHARED_MEMORY), NOTE, found, remedy)
    return Check(str(SHARED_MEMORY), OK, found)


def can_run(sections: Mapping[str, list[Check]]) -> bool:
    """Whether nothing found keeps the policy from running."""
    return all(check.status != PROBLEM for checks in sections.values() for check in checks)


def table(sections: Mapping[str, list[Check]]) -> str:
    """As people read it."""
    lines = []
    for section, checks in sections.items():
        lines.append(section)
        for check in checks:
            what = f"{check.name}: {check.found}" if check.found else check.name
            lines.append(f"  {check.status:8s} {what}")
            lines += textwrap.wrap(check.remedy, 88, initial_indent=" " * 11 + "-> ",
                                   subsequent_indent=" " * 14)  # fmt: skip
    return "\n".join(lines)


def add_parser(commands: Any) -> None:
    """Add ``arkvale doctor`` to the command's parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor", help="find out whether the policy can run here", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """The text that ``arkvale doctor`` prints.

    Raises:
        ArkValeError: the policy cannot run here (the findings are printed before).
    """
    sections = examine()
    fit = can_run(sections)
    if options.json:
        checks = [
            {"section": section, **check._asdict()}
            for section, found in sections.items()
            for check in found
        ]
        text = json.dumps({"can_run": fit, "checks": checks}, indent=2)
    else:
        text = table(sections)
    if not fit:
        print(text, flush=True)
        raise ArkValeError("the policy cannot run here; do what stands under each problem above.")
    return text if options.json else f"{text}\nThe policy can run here."
