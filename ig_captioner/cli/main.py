"""The command line `ig-captioner`. Its commands are in `predict.py`, `batch.py`, `release.py` and `evaluate.py`.

Exit codes: 0; 1 if something could not be read, done or written; 2 for wrong usage; 130 when interrupted. Errors are
one line on stderr. A photo that cannot be read is reported there and costs only itself: the other photos are still
done, and the exit code is 1 in the end.

What is slow to import is imported where it is used.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..installed import DEFAULT_CHECKPOINT, __version__
from .arguments import Parser, UsageError, add_command, runs_exported
from .batch import add_batch
from .evaluate import add_evaluate
from .output import one_line, quiet, report
from .predict import add_caption, add_classify, add_demo, add_retrieve, add_score
from .release import add_compile_labels, add_info, add_push, add_release


EXAMPLES = """\
examples:
  ig-captioner classify photo.jpg --labels cat dog horse
  ig-captioner caption photos/
  ig-captioner retrieve photos/ --query "a dog on a beach"
  ig-captioner classify --help                            # options and more examples; so for every command

exit codes: 0; 1 if anything could not be read, done or written; 2 for wrong usage; 130 when interrupted
"""
COMPLETION_EXAMPLES = """\
examples:
  eval "$(ig-captioner completion bash)"     # for this shell
  ig-captioner completion bash > ~/.local/share/bash-completion/completions/ig-captioner
  ig-captioner completion zsh > ~/.zfunc/_ig-captioner          # a folder of $fpath
"""
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, wrong usage
        return int(stop.code or 0)
    try:
        if arguments.check is not None:  # before anything that takes long to import
            arguments.check(arguments)
        if arguments.run is completion:
            return completion(arguments)
        needs_torch = not runs_exported(arguments)
        with quiet("strict" in arguments and arguments.strict, libraries=needs_torch):
            if needs_torch:
                from .. import api  # noqa: F401 (what `import ig_captioner` does in other programs)

            if "model" in arguments and arguments.model is None:
                arguments.model = _shipped_checkpoint()
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
        expected = isinstance(error, (ValueError, OSError, UserWarning))  # the last under --strict
        return report(str(error) if expected and str(error) else f"{type(error).__name__}: {error}")


def _shipped_checkpoint() -> str:
    """The model where none was chosen; a line on stderr says what it is."""
    from ..card import read_facts

    facts = read_facts(Path(DEFAULT_CHECKPOINT))
    about = facts.in_short if facts and facts.in_short else DEFAULT_CHECKPOINT
    print(f"ig-captioner: no --model given, so the checkpoint in the package: {one_line(about)}", file=sys.stderr)
    return DEFAULT_CHECKPOINT


def build_parser() -> Parser:
    parser = Parser(
        prog="ig-captioner",
        description="Image captioners as zero-shot classifiers that rank texts by information gain.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_classify, add_caption, add_score, add_retrieve, add_batch, add_demo):
        add(commands)
    add_evaluate(commands)
    for add in (add_info, add_compile_labels, add_release, add_push):
        add(commands)
    summary = "Print a script that lets a shell complete commands, options and files with the tab key."
    shells = add_command(commands, completion, "SHELL", summary, COMPLETION_EXAMPLES)
    shells.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def completion(arguments: argparse.Namespace) -> int:
    """Prints the completion script of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError("completion needs shtab: pip install 'ig_captioner[cli]'") from error
    parser = build_parser()
    for action in _actions(parser):
        names = str(action.metavar)
        if "DIR" in names or "FILE" in names or "FOLDER" in names or names in ("PHOTO", "DATA", "PLACE"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of all its commands."""
    for action in parser._actions:
        yield action
        for command in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            yield from _actions(command)
