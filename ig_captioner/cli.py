"""The command line `ig-captioner`. Its commands are in `cli_predict.py`, `cli_release.py` and `cli_evaluate.py`.

Exit codes: 0; 1 if something could not be read, done or written; 2 for wrong usage; 130 when interrupted. Errors are
one line on stderr. A photo that cannot be read is reported there and costs only itself: the other photos are still
done, and the exit code is 1 in the end.

What is slow to import is imported where it is used.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from . import __version__
from .cli_arguments import Parser, UsageError, add_command, positive_integer
from .cli_evaluate import add_evaluate
from .cli_output import quiet, report
from .cli_predict import add_caption, add_classify
from .cli_release import add_release


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, wrong usage
        return int(stop.code or 0)
    try:
        with quiet():
            return arguments.run(arguments)
    except UsageError as error:
        return report(f"{error} (--help says more)", 2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`; Python would complain again when it flushes stdout on exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # Broad on purpose: a damaged checkpoint raises whatever its reader raises.
        if arguments.traceback:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError))
        return report(str(error) if expected and str(error) else f"{type(error).__name__}: {error}")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ig-captioner",
        description="Zero-shot image classification and captions by an image captioner.",
        epilog="ig-captioner COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_classify(commands)
    add_caption(commands)
    add_release(commands)
    add_evaluate(commands, add_command, positive_integer)
    return parser


if __name__ == "__main__":
    sys.exit(main())
