"""Run lm-eval tasks against full attention and the arkvale policy, and print both side by side.

    python benchmarks/evaluate.py --model-path MODEL --tasks ruler longbench passkey \\
        --lengths 4096 32768 [any flag of sglang.launch_server]
    python benchmarks/evaluate.py --model-path MODEL --tasks passkey \\
        --servers full=http://127.0.0.1:30000 arkvale=http://127.0.0.1:30001

The first form serves MODEL under each policy in turn; ``--arkvale-*`` flags go to the second alone.
Tasks are lm-eval's (``ruler`` needs ``pip install lm_eval[ruler]``, ``longbench`` its extra of that
name, both fetch their texts) and those of ``benchmarks/lm_eval_tasks``, which need nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from arkvale_sglang.cli.launch import Server, leave_blocks_on_sigterm
from conditions import conditions

TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"
POLICIES = ("full", "arkvale")
Results = dict[str, dict[str, Any]]


def flags_of(policy: str, flags: list[str]) -> list[str]:
    """The server's flags under a policy: full attention takes none that begin with --arkvale."""
    if policy == "arkvale":
        return ["--kv-policy", policy, *flags]
    kept, ours = [], False
    for flag in flags:
        if flag.startswith("--"):
            ours = flag.startswith("--arkvale")
        if not ours:
            kept.append(flag)
    return ["--kv-policy", policy, *kept]


@contextlib.contextmanager
def served(options: argparse.Namespace, policy: str, flags: list[str]) -> Iterator[str]:
    """The address of a server under a policy: the one named, or one that lives for the block."""
    given = dict(pair.split("=", 1) for pair in options.servers)
    if given:
        yield given[policy]
        return
    print(f"\nstarting SGLang under --kv-policy {policy} ...", flush=True)
    with Server(options.model_path, flags_of(policy, flags)) as server:
        yield server.url


def evaluate(url: str, options: argparse.Namespace) -> Results:
    """Run the tasks through the completions endpoint of a server.

    Returns:
        Per task, ``{metric: value}`` as lm-eval reports them, ``sample_len`` among them.
    """
    about = {"max_seq_lengths": options.lengths, "tokenizer": str(options.model_path)}
    answers = simple_evaluate(
        model="local-completions",
        model_args={
            "model": str(options.model_path),
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(options.model_path),
            "tokenizer_backend": "huggingface",
            "num_concurrent": options.concurrency,
            "max_length": max(options.lengths) + 4096,
        },
        tasks=options.tasks,
        task_manager=TaskManager(include_path=str(TASKS), metadata=about),
        limit=options.limit,
        apply_chat_template=options.chat,
        bootstrap_iters=1000,
    )
    assert answers is not None  # only ranks beyond the first get none
    return {
        task: {**values, "sample_len": answers["n-samples"].get(task, {}).get("effective")}
        for task, values in answers["results"].items()
    }


def side_by_side(results: dict[str, Results]) -> str:
    """A line per task and metric, a column per policy, with lm-eval's standard errors."""
    lines = [f"{'task':28s} {'metric':18s} {'samples':>7s}" + "".join(f"{p:>18s}" for p in results)]
    first = next(iter(results.values()))
    for task, values in first.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            # RULER reports -1 for lengths that were not asked for.
            if not kind or "stderr" in metric or not isinstance(value, float) or value == -1:
                continue
            cells = []
            for result in results.values():
                error = result[task].get(f"{metric}_stderr,{kind}")
                spread = f" ± {error:.3f}" if isinstance(error, float) else ""
                cells.append(f"{result[task][key]:.3f}{spread}")
            lines.append(
                f"{task:28s} {metric:18s} {values['sample_len'] or '':>7}"
                + "".join(f"{cell:>18s}" for cell in cells)
            )
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the flags that are meant for the servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-path", required=True, help="a folder or a Hugging Face name")
    parser.add_argument("--tasks", nargs="+", default=["ruler", "longbench", "passkey"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768])
    parser.add_argument("--limit", type=int, help="documents per task (default: all)")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once")
    parser.add_argument("--servers", nargs="+", default=[], metavar="POLICY=URL")
    parser.add_argument("--out", type=Path, help="write results as JSON, too")
    options, flags = parser.parse_known_args(arguments)
    named = sorted(pair.split("=", 1)[0] for pair in options.servers if "=" in pair)
    if options.servers and named != sorted(POLICIES):
        parser.error("--servers takes full=URL and arkvale=URL; name both, each once")
    if named and flags:
        parser.error(f"{flags[0]} is for a server that this command starts; drop --servers or it")
    return options, flags


def main() -> int:
    options, flags = parse(sys.argv[1:])
    leave_blocks_on_sigterm()
    results = {}
    for policy in POLICIES:
        with served(options, policy, flags) as url:
            results[policy] = evaluate(url, options)
    print(f"\n{side_by_side(results)}")
    if options.out:
        about = {**conditions(), "model": options.model_path, "flags": flags}
        options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
