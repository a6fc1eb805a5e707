"""Could the best labels be found without scoring all of them? What two ways would need on a trained checkpoint.

    python -m benchmarks.top_k [--model DIR] --shards FILE.tar ... --output FILE.json

All edges of the trie of ImageNet's 1,000 names are scored under each photo; the searches are then simulated on these
figures, so that the nodes they would evaluate are counted exactly.

    exact   Best first. Every log P is at most 0, so log P(beginning | I) plus the largest -w * log P(T) below a node
            bounds the score of all labels below it. The search ends when no bound beats the k-th best label found.
    beam    Approximate. Level by level, only the M nodes with the highest information gain so far go on.

Rows: {"search", "prior_weight", "k" or "beam", "nodes_share", "nodes_worst", "top1_agreement", "top5_overlap"}: means
over photos, but `nodes_worst`, the largest share of a photo.
"""

import argparse
import heapq
import json
import shlex
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ig_captioner import DEFAULT_CHECKPOINT, IGCaptionerForConditionalGeneration, compile_labels
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.data.shards import Skipped, image_of, read_decoded
from ig_captioner.label_trie import TextTrie

from .measure import circumstances
from .scoring import imagenet_labels


BATCH = 8


class Tree(NamedTuple):
    """The trie as lists: of each node its edges, of each edge the node behind it (or -1) and the texts it completes."""

    edges_of_node: list[range]
    node_behind: list[int]
    texts_ending: list[list[int]]
    edges_of_text: list[list[int]]


def as_tree(trie: TextTrie) -> Tree:
    edges = len(trie.edge_nodes)
    nodes = len(trie.nodes)
    texts = [[edge for edge in row if edge < edges] for row in trie.text_edges.tolist()]
    behind = [-1] * edges
    ending = [[] for _ in range(edges)]
    from_node = trie.edge_nodes.tolist()
    for number, text in enumerate(texts):
        ending[text[-1]].append(number)
        for edge, next_ in pairwise(text):
            behind[edge] = from_node[next_]
    return Tree([range(*trie.first_edges[n : n + 2]) for n in range(nodes)], behind, ending, texts)


def exact_search(tree: Tree, likelihood: np.ndarray, prior: np.ndarray, weight: float, k: int) -> tuple[int, list[int]]:
    """Nodes evaluated and the k best texts, by bounds. `likelihood` and `prior` are log P of the edges, [E] each."""
    prior_of_text = [weight * prior[edges].sum() for edges in tree.edges_of_text]
    most = np.full(len(prior), -np.inf)  # the largest -w log P(T) of the texts that pass through an edge
    for edges, total in zip(tree.edges_of_text, prior_of_text, strict=True):
        most[edges] = np.maximum(most[edges], -total)
    heap = [(-most.max(), 0, 0.0)]
    nodes = 0
    best: list[tuple[float, int]] = []  # a heap of the k best texts found
    while heap:
        bound, node, so_far = heapq.heappop(heap)
        if len(best) == k and -bound < best[0][0]:
            break
        nodes += 1
        for edge in tree.edges_of_node[node]:
            total = so_far + likelihood[edge]
            for text in tree.texts_ending[edge]:
                heapq.heappush(best, (total - prior_of_text[text], -text))
                if len(best) > k:
                    heapq.heappop(best)
            if tree.node_behind[edge] >= 0:
                heapq.heappush(heap, (-(total + most[edge]), tree.node_behind[edge], total))
    return nodes, [-text for _, text in sorted(best, reverse=True)]


def beam_search(
    tree: Tree, likelihood: np.ndarray, prior: np.ndarray, weight: float, beam: int
) -> tuple[int, list[int]]:
    """Nodes evaluated and the texts found, best first."""
    gain = likelihood - weight * prior
    front = [(0.0, 0)]
    found = []
    nodes = 0
    while front:
        nodes += len(front)
        reached = [(so_far + gain[edge], edge) for so_far, node in front for edge in tree.edges_of_node[node]]
        found += [(score, -text) for score, edge in reached for text in tree.texts_ending[edge]]
        going_on = [(score, tree.node_behind[edge]) for score, edge in reached if tree.node_behind[edge] >= 0]
        front = heapq.nlargest(beam, going_on)
    return nodes, [-text for _, text in sorted(found, reverse=True)]


def searches(tree: Tree, likelihoods: np.ndarray, prior: np.ndarray, weight: float) -> Iterator[dict[str, Any]]:
    """A row per search; `likelihoods` is [B, E]."""
    scores = np.stack([(likelihoods[:, edges] - weight * prior[edges]).sum(axis=1) for edges in tree.edges_of_text], 1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    settings = [("exact", exact_search, "k", k) for k in (1, 5)]
    settings += [("beam", beam_search, "beam", beam) for beam in (50, 100, 200, 400)]
    for name, search, setting, value in settings:
        results = [search(tree, likelihood, prior, weight, value) for likelihood in likelihoods]
        shares = [nodes / len(tree.edges_of_node) for nodes, _ in results]
        found = [texts for _, texts in results]
        first = [scores[i, texts[0]] >= scores[i, best[i, 0]] for i, texts in enumerate(found)]  # ties agree
        five = [len(set(texts[:5]) & set(best[i])) / 5 for i, texts in enumerate(found)]
        row = {"search": name, "prior_weight": weight, setting: value, "nodes_share": float(np.mean(shares))}
        row |= {"nodes_worst": max(shares), "top1_agreement": float(np.mean(first))}
        yield {**row, "top5_overlap": None if (setting, value) == ("k", 1) else float(np.mean(five))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, metavar="DIR")
    parser.add_argument("--shards", nargs="+", required=True, metavar="FILE.tar", help="photos")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="photos read (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    model = load_model(IGCaptionerForConditionalGeneration, options.model, dtype="float32")
    processor = load_processor(options.model)
    texts = compile_labels(model, processor.tokenizer, imagenet_labels(1000)).texts
    samples = read_decoded(options.shards, lambda key, files: image_of(files))
    photos = list(islice((photo for photo in samples if not isinstance(photo, Skipped)), options.limit))
    likelihoods = []
    with torch.no_grad():
        prior = model.edge_log_likelihoods(texts)[0]
        for start in tqdm(range(0, len(photos), BATCH)):
            pixels = processor.image_processor(images=photos[start : start + BATCH], return_tensors="pt")[
                "pixel_values"
            ]
            likelihoods.append(model.edge_log_likelihoods(texts, pixels))
    figures = torch.cat(likelihoods).double().numpy(), prior.double().numpy()
    tree = as_tree(texts.trie)
    rows = [row for weight in (0.0, 0.5, 1.0) for row in searches(tree, *figures, weight)]
    command = shlex.join(["python", "-m", "benchmarks.top_k", *arguments])
    run = circumstances(command, photos=len(photos), nodes=len(texts.trie.nodes))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"rows": rows, "run": run}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        cells = ((name, f"{value:.3g}" if isinstance(value, float) else value) for name, value in row.items())
        print(", ".join(f"{name} {value}" for name, value in cells))


if __name__ == "__main__":
    main()
