"""The ``arkvale`` command: look at a running server, compute what one would do, or find out
whether one can run here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from arkvale_sglang.cli import doctor, plan, plot, record, report, stream, top
from arkvale_sglang.config.settings import ArkValeError


def _report(options: argparse.Namespace) -> str:
    """What the policy of a running server did so far."""
    return report.table(stream.server_state(options.url, options.api_key))


def main(arguments: Sequence[str] | None = None) -> int:
    """``arkvale top``, ``record`` and ``report`` of a server, ``plot``, ``plan`` and ``doctor``."""
    parser = argparse.ArgumentParser(prog="arkvale", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    counters = commands.add_parser("report", help="print the counters of a running server")
    stream.add_server(counters)
    counters.set_defaults(run=_report)
    for command in (top, record, plot, plan, doctor):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        said = options.run(options)
        if said:
            print(said)
    except ArkValeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
