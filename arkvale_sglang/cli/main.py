"""The ``arkvale`` command: look at a running server, compute what one would do, or find out
whether one can run here."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request

from arkvale_sglang.cli import doctor, plan, report
from arkvale_sglang.config.settings import ArkValeError


def _report(options: argparse.Namespace) -> str:
    """What the policy of a running server did so far."""
    try:
        with urllib.request.urlopen(f"{options.url.rstrip('/')}/server_info", timeout=30) as answer:
            state = json.load(answer)["internal_states"][0]
    except OSError as error:
        raise ArkValeError(f"{options.url} does not answer ({error}); is the server up?") from None
    if "arkvale" not in state:
        raise ArkValeError(
            f"{options.url} serves without the policy; start it with --kv-policy arkvale."
        )
    return report.table(state["arkvale"])


def main() -> int:
    """``arkvale report URL``, ``arkvale plan CONFIG ...`` and ``arkvale doctor``."""
    parser = argparse.ArgumentParser(prog="arkvale", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    counters = commands.add_parser("report", help="print the counters of a running server")
    counters.add_argument("url", help="for example http://127.0.0.1:30000")
    counters.set_defaults(run=_report)
    plan.add_parser(commands)
    doctor.add_parser(commands)
    options = parser.parse_args()
    try:
        print(options.run(options))
    except ArkValeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
