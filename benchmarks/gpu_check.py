"""Every kernel on this GPU: is it right, does the captured step replay, and how fast is it.

    python benchmarks/gpu_check.py [--out gpu_check.json] [--minutes 7.5]

Needs torch and triton alone; FlashInfer is checked and compared with where it is installed.
Correctness comes first, and what failed it is not timed.  ``--device cpu`` runs the correctness
part in Triton's interpreter, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]
if "--device=cpu" in sys.argv or "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import gpu_cases as cases  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gpu_cases import Shape  # noqa: E402
from gpu_step import Step, captured  # noqa: E402

CONTEXTS = [1024 * size for size in (32, 128, 8, 64, 16, 256)]
BATCHES = (16, 1, 4, 32)
"""The sizes that targets name come first, in case the time runs out."""
BUDGET = 2048
SEEDS = 3
"""Random ragged batches per check and shape."""
MODELS = (Shape("Llama-3.1-8B", 32, 8, 128), Shape("Qwen3-32B", 64, 8, 128))
ODD = (
    Shape("groups", 32, 8, 128, groups=8),
    Shape("64", 14, 2, 64, page_size=16, dtype=torch.float16),
    Shape("96", 24, 8, 96, page_size=64, groups=2),
    Shape("256", 8, 4, 256, page_size=16),
)
INTERPRETED = (Shape("small", 8, 4, 64, page_size=16, groups=2, dtype=torch.float16),)


class Report:
    """Rows as they come, a table of them at the end, all of it in one JSON file."""

    def __init__(self, out: Path, deadline: float):
        self.out, self.deadline = out, deadline
        self.rows: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        self.skipped: list[str] = []

    def add(self, kind: str, **values: Any) -> None:
        """Note and print one row."""
        self.rows.append({"kind": kind, **values})
        shown = " ".join(f"{name}={_short(value)}" for name, value in values.items())
        print(f"[{kind}] {shown}", flush=True)

    def late(self, what: str) -> bool:
        """Whether the time is up; ``what`` is then listed as not run."""
        if time.monotonic() < self.deadline:
            return False
        self.skipped.append(what)
        return True

    def finish(self, machine: dict[str, Any]) -> None:
        """Write the file, print the table."""
        result = {"machine": machine, "rows": self.rows, "broken": sorted(self.broken)}
        self.out.write_text(json.dumps({**result, "not_run": self.skipped}, indent=1) + "\n")
        steps = [row for row in self.rows if row["kind"] == "step"]
        if steps:
            print(f"\n{'model':14}{'context':>9}{'batch':>6}{'step us':>9}{'select %':>9}"
                  f"{'dense us':>10}{'speedup':>8}")  # fmt: skip
        for row in sorted(steps, key=lambda row: (row["model"], row["context"], row["batch"])):
            dense = row.get("dense_us")
            print(f"{row['model']:14}{row['context']:>9}{row['batch']:>6}{row['step_us']:>9.1f}"
                  f"{100 * row['selection_share']:>9.1f}"
                  + (f"{dense:>10.1f}{dense / row['step_us']:>8.2f}" if dense else ""))  # fmt: skip
        print(f"\nbroken: {', '.join(sorted(self.broken)) or 'nothing'}; "
              f"not run: {', '.join(self.skipped) or 'nothing'}; {self.out}")  # fmt: skip


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def correctness(report: Report, shapes: tuple[Shape, ...], device: torch.device) -> None:
    """Every check on every shape."""
    for shape, (name, check) in itertools.product(shapes, cases.CHECKS.items()):
        if report.late(f"{name} of {shape.name}"):
            report.broken.add(name)  # what was not shown right is not timed
            continue
        _try(report, name, shape, functools.partial(check, shape, device))
    if not cases.flashinfer.is_available():
        report.skipped.append("FlashInfer (not installed, or no GPU)")
        return
    for shape in shapes:
        if shape.head_dim in cases.flashinfer.HEAD_DIMS:
            decode = functools.partial(cases.check_flashinfer_decode, shape, device)
            _try(report, "flashinfer decode", shape, decode)
            prefill = functools.partial(cases.check_prefill, shape, device, cases.flashinfer)
            _try(report, "flashinfer prefill", shape, prefill)


def _try(report: Report, name: str, shape: Shape, check: Any) -> bool:
    try:
        worst = 0.0
        for seed in range(SEEDS if torch.cuda.is_available() else 1):
            torch.manual_seed(seed)
            worst = max(worst, float(check()))
        report.add("correct", op=name, shape=shape.name, error=worst)
    except Exception as problem:
        report.broken.add(name)
        report.add("BROKEN", op=name, shape=shape.name, what=f"{type(problem).__name__}: {problem}")
        return False
    return True


def replay(shape: Shape, device: torch.device) -> float:
    """Sixty captured steps against eager ones from the same state: outputs and tables."""
    counts = [70, 200, 3, 0, 129]
    steps = [Step(shape, counts, device, budget=1024, spare=20, seed=3) for _ in range(2)]
    captured = steps[0].capture()
    worst = 0.0
    for number in range(60):
        for step in steps:
            step.advance(number)
        captured.replay()
        expected = steps[1].run()
        worst = max(worst, cases.close(steps[0].out, expected, 2))
    for found, wanted in zip(steps[0].layer.residency, steps[1].layer.residency, strict=True):
        assert torch.equal(found, wanted), "tables differ after the replays"
    assert int(steps[1].counts[2]) > 0, "nothing was recalled, so nothing was shown"
    return worst


def microseconds(function: Any) -> float:
    """Median by ``do_bench``, which clears the second-level cache between runs."""
    return 1e3 * float(triton.testing.do_bench(function, warmup=10, rep=60, return_mode="median"))


def peaks(report: Report, device: torch.device) -> dict[str, float]:
    """Bytes per second of a device copy, and of the link in both directions."""
    size = 256 << 20
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    times = {
        "copy": microseconds(lambda: target.copy_(source)) / 2,
        "to device": microseconds(lambda: target.copy_(host, non_blocking=True)),
        "to host": microseconds(lambda: host.copy_(source, non_blocking=True)),
    }
    found = {name: size / (taken * 1e-6) for name, taken in times.items()}
    named = {f"{name}_gb_s".replace(" ", "_"): rate / 1e9 for name, rate in found.items()}
    report.add("peak", **named)
    return found


def transfers(report: Report, peak: dict[str, float], device: torch.device) -> None:
    """Recall, gather and backup by size of a lane page, as a share of the link."""
    if {"move", "prefill transfers"} & report.broken:
        report.skipped.append("transfer timings (a transfer is broken)")
        return
    pages = 256
    for groups in (8, 4, 2, 1):
        shape = Shape(f"groups {groups}", 32, 8, 128, groups=groups)
        if report.late(f"transfers of {groups} groups"):
            return
        unit = 2 * shape.page_size * shape.lane_heads * shape.head_dim * shape.dtype.itemsize
        for name, run in _transfers_of(shape, pages, device).items():
            taken = microseconds(run)
            rate = pages * groups * unit / (taken * 1e-6)
            share = rate / peak["to host" if name == "backup" else "to device"]
            report.add("transfer", op=name, unit_kib=unit / 1024, us=taken, gb_s=rate / 1e9,
                       share_of_link=share)  # fmt: skip


def _transfers_of(shape: Shape, pages: int, device: torch.device) -> dict[str, Any]:
    """Calls that each move ``pages`` pages of every lane over the link."""
    layer = cases.empty_layer(shape, device, pages=pages, frames=pages)
    everything = torch.arange(pages * shape.groups, device=device, dtype=torch.int32)
    recalls = cases.Recalls(everything, everything)
    clock = torch.ones((), dtype=torch.int64, device=device)
    logical = torch.arange(1, pages + 1, device=device, dtype=torch.int32)
    lanes = torch.arange(shape.groups, device=device, dtype=torch.int32) * (pages + 1)
    spread = (logical.unsqueeze(1) + lanes).flatten()
    size = (pages * shape.page_size, shape.kv_heads, shape.head_dim)
    chunk = torch.randn(size, dtype=shape.dtype, device=device)
    first = torch.arange(0, size[0], shape.page_size, device=device)
    transfer, kind, staged = cases.transfer, cases.KIND, (chunk, chunk.clone())
    return {
        "recall": functools.partial(transfer.move_pages, layer, None, recalls, clock, kind),
        "gather": functools.partial(transfer.gather_pages, layer, spread, shape.groups, staged),
        "backup": functools.partial(transfer.seal_pages, layer, spread, first, chunk, chunk, kind),
    }


def steps(report: Report, peak: dict[str, float], device: torch.device) -> None:
    """The sparse step and its parts, and FlashInfer over everything, for each size that fits."""
    needed = {"score", "select", "resolve", "move", "attend", "captured step"}
    if needed & report.broken:
        report.skipped.append(f"step timings ({', '.join(sorted(needed & report.broken))} broken)")
        return
    for context, batch, shape in itertools.product(CONTEXTS, BATCHES, MODELS):
        name = f"{shape.name} {context} x {batch}"
        if report.late(name):
            continue
        try:
            _one_size(report, peak, shape, context, batch, device)
        except torch.OutOfMemoryError:
            report.skipped.append(f"{name} (memory)")
        except Exception as problem:
            report.skipped.append(f"{name} ({type(problem).__name__}: {problem})")
        torch.cuda.empty_cache()


def _one_size(
    report: Report,
    peak: dict[str, float],
    shape: Shape,
    context: int,
    batch: int,
    device: torch.device,
) -> None:
    counts = [context // shape.page_size] * batch
    step = Step(shape, counts, device, budget=BUDGET, spare=64, seed=1, backed=1)
    step.settle()
    parts = {name: microseconds(captured(run)) for name, run in step.parts().items()}
    graph = step.capture()
    taken = microseconds(graph.replay)
    selection = parts["score"] + parts["select"] + parts["resolve"]
    scanned = batch * counts[0] * 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    vectors = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    attended = batch * min(context, BUDGET) * vectors
    row = {
        "model": shape.name, "context": context, "batch": batch, "step_us": taken,
        **{f"{name}_us": value for name, value in parts.items()},
        "selection_share": selection / taken, "pages_recalled": 0,
        "score_share_of_copy": scanned / (parts["score"] * 1e-6) / peak["copy"],
        "attend_share_of_copy": attended / (parts["attend"] * 1e-6) / peak["copy"],
        "score_mib": scanned / 2**20,
    }  # fmt: skip
    del graph
    if cases.flashinfer.is_available() and "flashinfer decode" not in report.broken:
        row["attend_flashinfer_us"] = microseconds(
            captured(step.flashinfer(BUDGET // shape.page_size))
        )
        row["dense_us"] = microseconds(captured(step.flashinfer(counts[0])))
    report.add("step", **row)


def _output(*command: str) -> str:
    """What a command prints, or that it is not known."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this ran."""
    found: dict[str, Any] = {
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "device": str(device),
    }  # fmt: skip
    if cases.flashinfer.importlib.util.find_spec("flashinfer"):
        found["flashinfer"] = _output(
            sys.executable, "-c", "import flashinfer; print(flashinfer.__version__)"
        )
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name, "driver": driver, "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing new after")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA GPU here; run this on a machine with one, or with --device cpu for "
              "the correctness part in Triton's interpreter.", file=sys.stderr)  # fmt: skip
        return 2
    device = torch.device(options.device)
    report = Report(options.out, time.monotonic() + 60 * options.minutes)
    on_gpu = device.type == "cuda"
    found = machine(device)
    try:
        correctness(report, (*MODELS, *ODD) if on_gpu else INTERPRETED, device)
        if on_gpu:
            for shape in (MODELS[0], ODD[0]):
                _try(report, "captured step", shape, functools.partial(replay, shape, device))
            peak = peaks(report, device)
            transfers(report, peak, device)
            steps(report, peak, device)
        else:
            report.skipped.append("everything that needs a GPU")
    finally:  # a kernel that breaks the device must not take along what was found before
        report.finish(found)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
