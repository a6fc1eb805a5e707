"""Commands that make something of a checkpoint: `release`."""

import argparse
from pathlib import Path

from .cli_arguments import add_command
from .cli_output import printable, table


RELEASE_EXAMPLES = """\
examples:
  ig-captioner release my-captioner                              # the checkpoint in the package
  ig-captioner release my-captioner --model runs/tiny/checkpoint-00002000/model --repo-id me/my-captioner
"""


def add_release(commands) -> None:
    summary = "Write the complete Hub folder of a checkpoint: weights, code, tokenizer, processor, card."
    model = "checkpoint to release, folder or Hub repository (default: the one in the package)"
    parser = add_command(commands, release, "DIR", summary, RELEASE_EXAMPLES, model)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write, missing or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier release, with all files in DIR")
    parser.add_argument("--repo-id", metavar="NAME", help="what the examples of a new card load (default: DIR's name)")
    parser.add_argument("--license", metavar="ID", help="licence in the card's metadata, such as apache-2.0")


def release(arguments: argparse.Namespace) -> int:
    """Writes a release and prints what is in it."""
    from .hub import save_release

    names = {"repo_id": arguments.repo_id, "license": arguments.license}
    folder = save_release(arguments.directory, arguments.model, overwrite=arguments.overwrite, **names)
    files = sorted(path for path in folder.iterdir())
    print(f"{printable(folder)}: {len(files)} files, written and loaded again")
    rows = [[path.name, f"{path.stat().st_size:,}"] for path in files]
    print(table([["", "bytes"], *rows]))
    return 0
