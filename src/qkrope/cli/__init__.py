"""The `qkrope` command. Each subcommand is one file with `add(subparsers)` and `run(args)`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, build, cache, check, info, models, run
from .common import FAILED, USAGE, Output, UsageError

_COMMANDS = (bench, check, run, info, build, cache, models)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qkrope",
        description="Fused QK-norm and rotary embedding: measure it, check it, prebuild it.",
        epilog="exit codes: 0 well, 1 a check failed or a run went wrong, 2 wrong usage",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="one JSON document on stdout, nothing else there"
    )
    for command in _COMMANDS:
        command.add(commands, common)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the error
        code = stop.code if isinstance(stop.code, int) else USAGE
        if code and "--json" in (sys.argv[1:] if argv is None else argv):
            Output(True).result({"error": "wrong usage, named on stderr", "exit_code": code})
        return code
    out = Output(args.json)
    try:
        code = args.run(args, out)
    except (UsageError, ValueError, TypeError) as error:
        return _fail(out, args.command, str(error), USAGE)
    except KeyboardInterrupt:
        return _fail(out, args.command, "interrupted", FAILED)
    except (OSError, RuntimeError) as error:
        return _fail(out, args.command, str(error), FAILED)
    return code


def _fail(out: Output, command: str, reason: str, code: int) -> int:
    print(f"qkrope {command}: {reason}", file=sys.stderr)
    out.result({"error": reason, "exit_code": code})
    return code
