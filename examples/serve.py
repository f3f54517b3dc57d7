"""A server under the arkvale policy that stays up until Ctrl-C or a SIGTERM.

    make serve
    python examples/serve.py [--model-path PATH] [any flag of sglang.launch_server]

Without ``--model-path`` it serves the needle model, which knows what a chat tells it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from arkvale_sglang.cli.launch import free_port, leave_blocks_on_sigterm

MODEL = Path(__file__).resolve().parent / "needle_model/model"
SMALL = [
    "--model-path", str(MODEL),
    "--dtype", "float32",
    "--arkvale-budget", "512",
    "--arkvale-device-tokens", "4096",
    "--arkvale-dense-layers", "0",
    "--arkvale-host-memory", "0.5",
]  # fmt: skip
BODY = json.dumps(
    {
        "model": "needle",
        "messages": [
            {
                "role": "user",
                "content": "the code of the blue door is 4821. what is the code of the blue door?",
            }
        ],
        "max_tokens": 16,
    }
)


def named(flags: list[str]) -> argparse.Namespace:
    """Model and port among the flags, in any form that SGLang's parser takes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--port")
    return parser.parse_known_args(flags)[0]


def main() -> int:
    flags = sys.argv[1:]
    if named(flags).model_path is None:
        flags = [*SMALL, *flags]
    if named(flags).port is None:
        flags += ["--port", str(free_port(30000))]  # where SGLang and `arkvale top` look first
    url = f"http://127.0.0.1:{named(flags).port}"
    print(
        "starting; once the log says the server is ready, try\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f"'{BODY}'\n"
        f"  curl {url}/server_info    # counters under internal_states[0].arkvale\n"
        f"  .venv/bin/arkvale top {url}    # a live view of hit rates, frames and requests\n",
        flush=True,
    )
    leave_blocks_on_sigterm()  # which ends what subprocess.run waits for
    command = [sys.executable, "-m", "sglang.launch_server", "--kv-policy", "arkvale", *flags]
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
