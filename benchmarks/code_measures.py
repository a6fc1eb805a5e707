"""How long functions and files are, and how dense their lines: a table for the package and the folders beside it.

    python -m benchmarks.code_measures [FOLDER ...]      # default: ig_captioner training conversion metrics

Lengths are lines from `def` to the last statement, docstring included, and lines of a file. A packed line assigns
several values at once, `a, b = x, y`. A comment line holds nothing but a comment. Blank lines do not count in shares.
"""

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


FOLDERS = ("ig_captioner", "training", "conversion", "metrics")
LONG_LINE = 100


def function_lengths(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.end_lineno - node.lineno + 1


def packed_assignments(tree: ast.AST) -> int:
    """Counts the assignments of several values to several targets, one each."""
    assignments = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    return sum(isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple) for node in assignments)


def comment_lines(text: str) -> int:
    """Counts the lines that hold a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    return sum(token.line[: token.start[1]].strip() == "" for token in comments)


def quantiles(lengths: Sequence[int]) -> str:
    """Median, 95th percentile and maximum."""
    return " / ".join(f"{figure:.0f}" for figure in np.quantile(list(lengths), (0.5, 0.95, 1.0)))


def measure(paths: Sequence[Path]) -> dict[str, str]:
    """The figures of some files, by name."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    trees = [ast.parse(text) for text in texts]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    packed = sum(map(packed_assignments, trees))
    return {
        "files": f"{len(paths)}",
        "lines": f"{sum(len(text.splitlines()) for text in texts):,}",
        "function median / p95 / max": quantiles([length for tree in trees for length in function_lengths(tree)]),
        "file median / p95 / max": quantiles([len(text.splitlines()) for text in texts]),
        "comment lines": f"{100 * sum(map(comment_lines, texts)) / len(lines):.1f} %",
        "packed per 1,000 lines": f"{1000 * packed / len(lines):.1f}",
        f"lines > {LONG_LINE}": f"{100 * sum(len(line) > LONG_LINE for line in lines) / len(lines):.1f} %",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS, metavar="FOLDER", help=" ".join(FOLDERS))
    options = parser.parse_args(arguments)
    of_folder = {folder: sorted(Path(folder).rglob("*.py")) for folder in options.folders}
    of_folder["all"] = [path for paths in of_folder.values() for path in paths]
    for number, (folder, paths) in enumerate(of_folder.items()):
        figures = measure(paths)
        if number == 0:
            print(f"| | {' | '.join(figures)} |\n|{'---|' * (len(figures) + 1)}")
        print(f"| {folder} | {' | '.join(figures.values())} |")


if __name__ == "__main__":
    main()
