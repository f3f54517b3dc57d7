"""What the processes of a server hold: memory, file handles, threads, processor time."""

from __future__ import annotations

import math
import os
from typing import Any

import psutil

from soak.trend import MIB


class Watch:
    """Samples a server's processes and what the rest of the machine does meanwhile."""

    def __init__(self, pid: int):
        root = psutil.Process(pid)
        self._processes = _named([root, *root.children(recursive=True)])
        self._before = self._times()

    def sample(self, tokens: float) -> dict[str, Any]:
        """One row: a figure for every process, and per token the scheduler's processor time.

        Raises:
            psutil.NoSuchProcess: a process of the server is gone.
        """
        found: dict[str, Any] = {}
        for name, process in self._processes.items():
            with process.oneshot():
                found[f"{name} rss_mib"] = round(process.memory_info().rss / MIB, 2)
                found[f"{name} files"] = process.num_fds()
                found[f"{name} threads"] = process.num_threads()
        now = self._times()
        spent = {name: now[name] - self._before[name] for name in now}
        self._before = now
        scheduler = next(name for name in self._processes if "schedul" in name)
        found["cpu_ms_per_token"] = (
            round(1e3 * spent[scheduler] / tokens, 4) if tokens else math.nan
        )
        ours = sum(spent[name] for name in (*self._processes, "load"))
        found["other_cores_busy"] = round(max(0.0, spent["busy"] - ours) / spent["clock"], 2)
        return found

    def _times(self) -> dict[str, float]:
        """Seconds of processor time of each process, of this one, and of the whole machine."""
        machine = psutil.cpu_times()
        idle = machine.idle + machine.iowait
        total = sum(machine) - machine.guest - machine.guest_nice
        return {
            **{name: sum(process.cpu_times()[:2]) for name, process in self._processes.items()},
            "load": sum(psutil.Process(os.getpid()).cpu_times()[:2]),
            "busy": total - idle,
            "clock": total / (psutil.cpu_count() or 1),
        }


def _named(processes: list[psutil.Process]) -> dict[str, psutil.Process]:
    """Processes by a short name each; SGLang titles its own."""
    named: dict[str, psutil.Process] = {}
    for process in processes:
        command = process.cmdline()
        title = command[0].rpartition("/")[2] if command else process.name()
        if "resource_tracker" in " ".join(command):
            title = "resource_tracker"
        name = title.replace("sglang::", "").replace(" ", "_") or f"process_{process.pid}"
        while name in named:
            name += "'"
        named[name] = process
    return named
