"""The ``arkvale`` command: look at a running server."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request

from arkvale_sglang.cli.report import table


def main() -> int:
    """``arkvale report URL``: what the policy of a running server did so far."""
    parser = argparse.ArgumentParser(prog="arkvale", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print the counters of a running server")
    report.add_argument("url", help="for example http://127.0.0.1:30000")
    options = parser.parse_args()
    try:
        with urllib.request.urlopen(f"{options.url.rstrip('/')}/server_info", timeout=30) as answer:
            state = json.load(answer)["internal_states"][0]
    except (OSError, urllib.error.URLError) as error:
        print(f"error: {options.url} does not answer ({error}); is the server up?", file=sys.stderr)
        return 1
    if "arkvale" not in state:
        print(
            f"error: {options.url} serves without the policy; start it with --kv-policy arkvale.",
            file=sys.stderr,
        )
        return 1
    print(table(state["arkvale"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
