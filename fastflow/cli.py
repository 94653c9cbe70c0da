"""The ``fastflow`` command: one sub-command per module, imported only when it is called.

Exit codes: 0 success; 1 something ran and was found wrong, or failed on the way; 2 wrong arguments or input;
130 interrupted.  Errors are one line on stderr; ``python -X dev -m fastflow.cli ...`` shows where they come from.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "doctor": "what is installed, which backends can run and which not and why, with a self-test of each",
    "demo": "train a small flow on a few seconds of speech beside its reference, and synthesise the mel",
    "report": "what a flow costs, part by part: parameters, FLOPs, bytes saved for backward",
    "bench": "run the benchmarks (from a source tree)",
}
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _usage() -> str:
    commands = "\n".join(f"  {name:<8} {purpose}" for name, purpose in COMMANDS.items())
    return (
        f"commands:\n{commands}\n\nfastflow COMMAND --help says more.  Exit codes: 0 success, 1 failure, 2 wrong input."
    )


def _bench(arguments: Sequence[str]) -> int:
    """The benchmarks are no part of the installed package: they run from the source tree, in a process of their own."""
    if not BENCHMARKS.is_file():
        raise FileNotFoundError("the benchmarks are in the source tree only: run it from a clone")
    return subprocess.call([sys.executable, str(BENCHMARKS), *arguments])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code.

    Args:
        arguments: what follows ``fastflow`` on the command line; None takes it from there.
    """
    parser = Parser(
        prog="fastflow",
        description="The flow-matching module of CosyVoice 1, 2 and 3 on fused kernels.",
        epilog=_usage(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.version:
        import fastflow

        print(f"fastflow {fastflow.__version__}")
        return 0
    if args.command is None:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")
    try:
        return _bench(args.rest) if args.command == "bench" else _run(args.command, args.rest)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"fastflow {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        print(f"fastflow {args.command}: interrupted", file=sys.stderr)
        return 130


def _run(command: str, arguments: Sequence[str]) -> int:
    """Run a command whose module has ``add_arguments(parser)`` and ``run(args)``."""
    module = importlib.import_module(f"fastflow.{command}")
    parser = Parser(prog=f"fastflow {command}", description=f"{COMMANDS[command]}.")
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
