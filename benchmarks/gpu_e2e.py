"""Stock SGLang against the arkvale policy on one GPU: same model, same prompts, one run.

    python benchmarks/gpu_e2e.py [--only tpot,throughput,under-budget,prefill] [--time-limit 9]

Llama-3.1-8B shape with dummy weights, nothing is downloaded.  Sections: ``tpot``, time per output
token at 32K and 128K in batches; ``throughput`` where both sides hold the same bytes of KV on the
device; ``under-budget``, what the policy costs where nothing is evicted; ``prefill``, time to the
first token of a cold prompt (with backups for the policy, without any for stock).  What does not
fit in memory or in the time is a row that says so.  ``--device cpu --scale tiny`` tries the script
itself on a machine without GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Any

import psutil
import torch
from e2e_cases import SCALES, SECTIONS, Case, Meter, Outcome, Scale, cases, last_words

from arkvale_sglang.cli import launch
from arkvale_sglang.config.settings import ArkValeConfig, ArkValeError
from arkvale_sglang.core.geometry import PageGeometry
from arkvale_sglang.core.sizing import GIB, Memory, PoolPlan, plan_pool

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("stock", "arkvale")
FIRST_START_SECONDS = 420.0
"""The first server on a machine compiles kernels with nvcc."""
HOST_SHARE = 0.75


@dataclasses.dataclass
class Bench:
    """Everything that does not change between servers."""

    options: argparse.Namespace
    scale: Scale
    model: Path
    clock: float
    """When the time limit is reached, on the monotonic clock."""
    flags: dict[str, str] = dataclasses.field(default_factory=dict)
    backends: dict[str, Any] = dataclasses.field(default_factory=dict)
    counters: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def geometry(self) -> PageGeometry:
        """The model's, as the policy sees it."""
        shape = self.scale.shape
        return PageGeometry(
            page_size=32,
            layers=shape["num_hidden_layers"],
            dense_layers=self.scale.dense_layers,
            kv_heads=shape["num_key_value_heads"],
            head_dim=shape["head_dim"],
            groups=1,
            dtype=torch.bfloat16,
        )

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        geometry = self.geometry
        return int(geometry.layers * geometry.lane_page_bytes // geometry.page_size)

    def common(self) -> list[str]:
        """Flags of both sides."""
        flags = ["--skip-tokenizer-init", "--random-seed", "1", "--log-level", "warning",
                 "--dtype", "bfloat16", "--stream-interval", "8"]  # fmt: skip
        if self.options.device == "cuda":
            flags += ["--load-format", "dummy", "--cuda-graph-max-bs", "64"]
        return flags

    def policy(self, host_gib: float) -> list[str]:
        """Flags of the policy."""
        flags = ["--kv-policy", "arkvale", "--arkvale-budget", str(self.options.budget),
                 "--arkvale-dense-layers", str(self.scale.dense_layers),
                 "--arkvale-host-memory", f"{host_gib:.4f}"]  # fmt: skip
        if self.options.attention:
            flags += ["--arkvale-attention", self.options.attention]
        return flags

    @functools.cached_property
    def host_bytes(self) -> int:
        """What backups may take at most; read once, while no server holds any."""
        if self.options.host_memory is not None:
            return int(self.options.host_memory * GIB)
        return int(HOST_SHARE * psutil.virtual_memory().available)

    def equal_plan(self) -> tuple[int, PoolPlan]:
        """Stock's tokens in ``kv_bytes``, and a plan of ours that takes no more device bytes."""
        geometry = self.geometry
        tokens = self.scale.kv_bytes // self.token_bytes
        pages = -(-(max(self.scale.prompts) + self.scale.new) // geometry.page_size) + 1
        need = self.scale.requests * pages * geometry.page_size
        host = min(self.host_bytes, (need // geometry.page_size + 2) * geometry.page_host_bytes)
        config = ArkValeConfig(
            budget=self.options.budget,
            dense_layers=self.scale.dense_layers,
            host_memory=host / GIB,
        )
        memory = Memory(device=tokens * self.token_bytes, host_free=host, shared=False)
        return tokens, plan_pool(config, geometry, memory, need)

    def side_flags(self, side: str, equal: bool) -> list[str]:
        """Flags of one server; ``equal`` is for the section that compares at equal KV bytes."""
        flags = self.common()
        frames = None
        if equal:
            tokens, plan = self.equal_plan()
            frames = plan.frames * plan.geometry.page_size
            host = plan.host_bytes + plan.geometry.page_host_bytes
            flags += ["--max-total-tokens", str(tokens if side == "stock" else plan.logical_tokens)]
        else:
            widest = max(self.scale.batches) * (max(self.scale.contexts) + sum(self.scale.decoded))
            pages = widest // self.geometry.page_size + 2
            host = min(self.host_bytes, pages * self.geometry.page_host_bytes)
        if side == "stock":
            choice = stock_attention(self.options)
            return flags + (["--attention-backend", choice] if choice else [])
        sized = [] if frames is None else ["--arkvale-device-tokens", str(frames)]
        return [*flags, *self.policy(host / GIB), *sized]

    def run_side(self, side: str, rows: list[Case], equal: bool, deadline: float) -> list[Outcome]:
        """Start one server and measure its rows on it."""
        left = deadline - time.monotonic()
        if left <= 0:
            return [{"refused": "not run: the time limit was reached."}] * len(rows)
        try:
            flags = self.side_flags(side, equal)
        except ArkValeError as error:
            return [{"refused": str(error)}] * len(rows)
        self.flags[f"{side}, {'equal memory' if equal else 'all memory'}"] = " ".join(flags)
        launch.START_SECONDS = min(FIRST_START_SECONDS, left)
        server = launch.Server(self.model, flags)
        print(f"starting {side} ({'equal' if equal else 'all'} memory) ...", flush=True)
        begin = time.monotonic()
        done: list[Outcome] = []
        try:
            with server:
                meter = Meter(server, self.scale, deadline)
                self.backends[side] = server.get("/server_info").get("attention_backend")
                meter.warm()
                print(f"  {side:8s} warm after {time.monotonic() - begin:.0f} s", flush=True)
                for case in rows:
                    done.append(meter.run(case))
                    print(f"  {side:8s} {case.name:24s} {shown(done[-1])}", flush=True)
                if side == "arkvale":
                    self.counters["equal memory" if equal else "all memory"] = server.arkvale()
        except TimeoutError:
            done += [{"refused": "not run: the time limit was reached."}] * (len(rows) - len(done))
        except (launch.ServerFailed, OSError, ValueError, urllib.error.URLError) as error:
            reason = f"the server failed: {last_words(server, error)}"
            print(f"  {side:8s} {reason}", flush=True)
            done += [{"refused": reason}] * (len(rows) - len(done))
        return done

    def run(self, sections: list[str]) -> list[dict[str, Any]]:
        """All rows of all sections; servers are shared where their sizes allow."""
        groups: dict[bool, list[Case]] = {}
        for name in sections:
            equal = self.scale.equal or name == "throughput"
            groups.setdefault(equal, []).extend(cases(self.scale, name))
        runs = sorted(groups.items())
        shares, rows = 2 * len(runs), []
        for equal, todo in runs:
            found = {}
            for side in SIDES:  # each gets its share of what is left, so that ratios come about
                now = time.monotonic()
                found[side] = self.run_side(side, todo, equal, now + (self.clock - now) / shares)
                shares -= 1
            for number, case in enumerate(todo):
                rows.append(row_of(case, {side: found[side][number] for side in SIDES}))
        return rows


def row_of(case: Case, found: dict[str, Outcome]) -> dict[str, Any]:
    """A row; its ratio is above 1 where the policy is better."""
    stock, ours = (float(found[side].get("value", 0)) for side in SIDES)
    ratio = None
    if stock > 0 and ours > 0:
        ratio = round(ours / stock if case.section == "throughput" else stock / ours, 3)
    return {"case": case.name, **dataclasses.asdict(case), **found, "ratio": ratio}


def shown(outcome: Outcome) -> str:
    """A figure, or why there is none."""
    if "refused" in outcome:
        return str(outcome["refused"])
    together = f", {outcome['together']} together" if "together" in outcome else ""
    return f"{outcome['value']:.3f} {outcome['unit']}{together}"


def stock_attention(options: argparse.Namespace) -> str | None:
    """Stock's backend: SGLang's own choice, except where the kernels of that are not installed."""
    if options.stock_attention or options.device == "cpu":
        choice: str | None = options.stock_attention
        return choice
    spec = importlib.util.find_spec("sgl_kernel")
    folders = spec.submodule_search_locations or [] if spec else []
    fa3 = any(path for folder in folders for path in Path(folder).glob("flash_ops*"))
    if torch.cuda.get_device_capability()[0] != 9 or fa3:
        return None
    return "flashinfer" if importlib.util.find_spec("flashinfer") else "triton"


def make_model(folder: Path, scale: Scale, device: str) -> Path:
    """A folder that SGLang serves: a config for dummy weights, or a tiny model with real ones."""
    if scale is SCALES["tiny"]:
        sys.path.insert(0, str(ROOT / "examples"))
        from tiny_model import make_model as make_tiny

        return Path(make_tiny(folder / "tiny"))
    if device == "cpu":
        raise SystemExit("error: --device cpu runs --scale tiny alone; add it.")
    config = {
        **scale.shape,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 2 * max(scale.contexts),
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def conditions(bench: Bench) -> dict[str, Any]:
    """Machine, versions, commit and flags that the figures belong to."""

    def answer(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() or None

    versions = {"python": platform.python_version(), "torch_cuda": torch.version.cuda}
    for name in ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cuda = bench.options.device == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpu_bytes": memory,
            "driver": answer(*query) if cuda else None,
            "cpu": platform.processor() or platform.machine(),
            "cores": psutil.cpu_count(),
            "host_bytes": psutil.virtual_memory().total,
        },
        "versions": versions,
        "commit": answer("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "arguments": {key: str(value) for key, value in vars(bench.options).items()},
        "scale": dataclasses.asdict(bench.scale),
        "flags": bench.flags,
        "attention": bench.backends,
        "counters": bench.counters,
    }


def equal_memory(bench: Bench) -> dict[str, Any]:
    """Device bytes of both sides in the throughput section."""
    try:
        tokens, plan = bench.equal_plan()
    except ArkValeError as error:
        return {"refused": str(error)}
    return {"stock_tokens": tokens, "stock_bytes": tokens * bench.token_bytes,
            "arkvale_bytes": plan.device_bytes, "arkvale": plan.describe()}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'case':24s} {'stock':>28s} {'arkvale':>28s} {'ratio':>7s}"]
    notes = []
    for row in rows:
        cells = []
        for side in SIDES:
            text = shown(row[side])
            if "refused" in row[side]:
                notes.append(f"{row['case']}, {side}: {text}")
                text = f"see [{len(notes)}]"
            cells.append(text)
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{row['case']:24s} {cells[0]:>28s} {cells[1]:>28s} {ratio:>7s}")
    return "\n".join([*lines, *(f"[{n}] {note}" for n, note in enumerate(notes, 1))])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    add("--scale", choices=SCALES, default="full", help="small: a 1B shape; tiny: tries the script")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--time-limit", type=float, default=9, metavar="MINUTES")
    add("--budget", type=int, help="tokens attended per step (default: 2048)")
    add("--attention", choices=("flashinfer", "triton"), help="of the policy (default: its own)")
    add("--stock-attention", help="of stock (default: SGLang's own, if its kernels are there)")
    add("--host-memory", type=float, metavar="GIB", help="for backups (default: 3/4 of the free)")
    add("--out", type=Path, default=ROOT / "benchmarks/results/gpu_e2e.json")
    return parser.parse_args()


def complaint(options: argparse.Namespace, sections: list[str]) -> str | None:
    """What is wrong with the arguments or the machine, in one sentence."""
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown or not sections:
        return f"--only {','.join(unknown)} is unknown; choose of {', '.join(SECTIONS)}."
    if options.device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device answers; run this on one, or try it with --device cpu --scale tiny."
    settings = {field.name for field in dataclasses.fields(ArkValeConfig)}
    if options.attention and "attention" not in settings:
        return "the policy of this checkout has no --arkvale-attention; leave --attention out."
    return None


def main() -> int:
    options = parse()
    sections = [name.strip() for name in options.only.split(",") if name.strip()]
    if problem := complaint(options, sections):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    launch.leave_blocks_on_sigterm()
    scale = SCALES[options.scale]
    options.budget = options.budget or scale.budget
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), scale, options.device)
        bench = Bench(options, scale, model, time.monotonic() + 60 * options.time_limit)
        rows = bench.run(sections)
        result = {**conditions(bench), "equal_memory": equal_memory(bench), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(rows)}\n\nwritten to {options.out}")
    return 0 if any("value" in row[side] for row in rows for side in SIDES) else 1


if __name__ == "__main__":
    sys.exit(main())
