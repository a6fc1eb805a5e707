"""Draws docs/images/trie.png: the labels of a small example as a trie, with what a photo adds to each token.

    python docs/draw_trie.py

The photo is the cat of `examples/demo.py`, the model the shipped checkpoint.
"""

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from torch import Tensor
from transformers import AutoProcessor

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForZeroShotImageClassification, compile_labels
from ig_captioner.demo.examples import load_photo
from ig_captioner.demo.page import LESS_LIKELY, LIKELIER


LABELS, TEMPLATE = ["cat", "dog", "dog in the snow", "woman"], "a {}"
COLOURS = LinearSegmentedColormap.from_list("gain", [LESS_LIKELY, "#dddddd", LIKELIER])


def draw(axes: Axes, paths: list[list[int]], tokens: list[str], with_image: Tensor, without: Tensor) -> None:
    """A line per edge, from the node that it leaves to the next. Texts are rows, tokens columns.

    Args:
        paths: the edges of each text.
        tokens: of the E edges.
        with_image, without: log P of the edges [E], in nats.
    """
    norm, heights, ends = TwoSlopeNorm(0.0, -4.0, 4.0), {}, {}
    for edge in range(len(tokens)):
        rows = [-row for row, path in enumerate(paths) if edge in path]
        heights[edge] = sum(rows) / len(rows)
    root = 0, heights[paths[0][0]]
    starts = {edge: (before, depth) for path in paths for depth, (before, edge) in enumerate(pairwise([None, *path]))}
    for edge, (before, depth) in starts.items():
        start, end = heights.get(before, root[1]), heights[edge]
        gain = (with_image[edge] - without[edge]).item()
        axes.plot([depth, depth + 0.3, depth + 1], [start, end, end], color=COLOURS(norm(gain)), linewidth=4)
        axes.plot(depth, start, "o", color="black", markersize=6, zorder=3)
        write = partial(axes.annotate, xy=(depth + 0.65, end), textcoords="offset points", ha="center")
        write(tokens[edge], xytext=(0, 5), va="bottom")
        figures = f"{number(with_image[edge])}\n{number(without[edge])}"
        write(figures, xytext=(0, -5), va="top", fontsize=8, color="#444444")
        ends[edge] = depth + 1.15, end
    for path in paths:
        sums = [with_image[path].sum(), without[path].sum()]
        lines = zip(("log P(T|I)", "log P(T)", "gain"), [*sums, sums[0] - sums[1]], strict=True)
        text = "\n".join(f"{name:10} {number(value):>7}" for name, value in lines)
        axes.annotate(text, ends[path[-1]], va="center", family="monospace", fontsize=9)
    axes.annotate("[BOS]", root, (-8, 0), textcoords="offset points", ha="right", va="center")
    axes.set_xlim(-0.6, max(map(len, paths)) + 1.6)
    axes.margins(y=0.15)
    plt.colorbar(plt.cm.ScalarMappable(norm, COLOURS), ax=axes, label="gain of a token, nats", shrink=0.8, pad=0.01)


def number(value: Tensor) -> str:
    return f"{round(value.item(), 2) + 0.0:.2f}"  # no -0.00


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images" / "trie.png")
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    model = IGCaptionerForZeroShotImageClassification.from_pretrained(DEFAULT_CHECKPOINT).eval()
    labels = compile_labels(model, processor.tokenizer, LABELS, TEMPLATE)
    pixel_values = processor(images=load_photo("cat"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        with_image = model.edge_log_likelihoods(labels.texts, pixel_values)[0]
        without = model.edge_log_likelihoods(labels.texts)[0]
    trie = labels.texts.trie
    paths = [edges[:length].tolist() for edges, length in zip(trie.text_edges, trie.lengths, strict=True)]
    tokens = [processor.tokenizer.decode(token).strip() for token in trie.edge_tokens]
    figure, axes = plt.subplots(figsize=(11.5, 3.6), layout="constrained")
    draw(axes, paths, tokens, with_image, without)
    axes.set_axis_off()
    figure.savefig(options.output, dpi=90)
    print(f"{options.output}: {len(trie.nodes)} nodes, {len(tokens)} edges, {int(trie.lengths.sum())} tokens")


if __name__ == "__main__":
    main()
