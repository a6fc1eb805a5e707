"""Many texts as one tree: what labels and templates have in common is read once.

A trie has one node per distinct beginning of a text (the decoder input that has read it) and one edge per distinct next
token, so that log P(text) is a sum over edges:

    [BOS] - a - photo - of - a -+- cat - . - [EOS]        9 nodes and 10 edges for 2 texts of 7 tokens
                                +- car - . - [EOS]

The last token of a text is an edge without a node: nothing is predicted after it. Nodes are numbered depth first, so
that the descendants of a node are an interval that begins right after it. The nodes are cut into blocks, which the
decoder reads as the rows of a batch; a block begins with copies of the ancestors of its first node, so that it needs no
other block. The attention mask within a block is two comparisons, `key <= query < ends[key]`.

Legend: C texts, L tokens of a text, N nodes, E edges, G blocks of Q positions. Log-likelihoods are in nats.
"""

import bisect
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


# Positions per block, at most: longer blocks spend more on attention, shorter ones on copies of ancestors.
BLOCK_SIZE = 256
# How many texts `sum_over_texts` adds up at a time: each holds the log P of all its edges meanwhile.
TEXTS_PER_SUM = 4096


@dataclass(frozen=True)
class TextTrie:
    """C texts as blocks of nodes; all fields are integer tensors.

    Args:
        tokens, depths: decoder inputs [G, Q] and their positions in a text.
        ends: [G, Q], one past the last descendant of each position, within the block.
        nodes: [N], the place of each node among the G * Q positions, ascending.
        edge_nodes, edge_tokens: [E], the node that an edge leaves, ascending, and the token that it adds.
        text_edges: [C, L], the edges of each text in its order; E after its end.
    """

    tokens: Tensor
    depths: Tensor
    ends: Tensor
    nodes: Tensor
    edge_nodes: Tensor
    edge_tokens: Tensor
    text_edges: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each text, [C]."""
        return (self.text_edges < len(self.edge_nodes)).sum(dim=-1)

    @cached_property
    def first_nodes(self) -> list[int]:
        """Block g holds the nodes `first_nodes[g]` to `first_nodes[g + 1]`."""
        blocks = torch.arange(len(self.tokens) + 1, device=self.nodes.device)
        return torch.searchsorted(self.nodes, blocks * self.tokens.shape[1]).tolist()

    @cached_property
    def first_edges(self) -> list[int]:
        """Node n is left by the edges `first_edges[n]` to `first_edges[n + 1]`."""
        nodes = torch.arange(len(self.nodes) + 1, device=self.nodes.device)
        return torch.searchsorted(self.edge_nodes, nodes).tolist()

    def to(self, device: torch.device | str) -> "TextTrie":
        return TextTrie(**{item.name: getattr(self, item.name).to(device) for item in dataclasses.fields(self)})

    def split(self, positions: int) -> Iterator[tuple[int, int]]:
        """Yields the first block of each pass over the trie, and the one after its last.

        Args:
            positions: about as many are read in a pass, and at least one block.
        """
        number, size = self.tokens.shape
        blocks = max(1, positions // size)
        for start in range(0, number, blocks):
            yield start, min(start + blocks, number)

    def sum_over_texts(self, edge_log_likelihoods: Tensor) -> Tensor:
        """log P of the edges [*, E] to log P of the texts [*, C]."""
        padded = F.pad(edge_log_likelihoods, (0, 1))  # edge E, after the end of a text, adds 0
        sums = [padded[..., edges].sum(dim=-1) for edges in self.text_edges.split(TEXTS_PER_SUM)]
        return torch.cat(sums, dim=-1)


def build_trie(
    input_ids: Tensor, attention_mask: Tensor, start_token_id: int, block_size: int = BLOCK_SIZE
) -> TextTrie:
    """Builds the trie of texts [C, L], padded on the right; texts may repeat. Indices are computed on the CPU.

    Node i of a text has read its first i tokens, and edge i, which leaves that node, is its token i. So both are
    indexed like the tokens, [C, L].

    Raises:
        ValueError: for a text without tokens.
    """
    lengths = attention_mask.sum(dim=-1).cpu().numpy()
    if not lengths.all():
        raise ValueError(f"text {int(lengths.argmin())} has no tokens")
    texts = input_ids.masked_fill(attention_mask == 0, -1).cpu().numpy()
    order = np.lexsort(texts.T[::-1])  # the last key of lexsort is the first to be compared
    texts = texts[order]
    lengths = lengths[order]
    is_new_node, is_new_edge = _additions(texts, lengths)
    node_of = _number(is_new_node)
    edge_of = _number(is_new_edge)

    row, depth = np.nonzero(is_new_node)  # of each node, in the order of their numbers
    is_root = depth == 0
    node_token = np.where(is_root, start_token_id, texts[row, depth - 1])
    parent = np.where(is_root, -1, node_of[row, depth - 1])

    # Edges were numbered text by text, but are kept node by node.
    edge_node = node_of[is_new_edge]
    edge_token = texts[is_new_edge]
    by_node = edge_node.argsort(kind="stable")
    after_end = len(by_node)
    new_number = np.append(by_node.argsort(), after_end)
    is_text = np.arange(texts.shape[1]) < lengths[:, None]
    text_edges = np.empty_like(edge_of)
    text_edges[order] = new_number[np.where(is_text, edge_of, after_end)]

    # Blocks of twice the longest text at least: a block is never more than half copies of ancestors.
    positions, is_copy = _cut_into_blocks(parent, depth, max(block_size, 2 * texts.shape[1]))
    holds_node = positions >= 0
    depths = np.where(holds_node, depth[positions], 0)
    arrays = {
        "tokens": np.where(holds_node, node_token[positions], start_token_id),
        "depths": depths,
        "ends": _ends_of_subtrees(np.where(holds_node, depths, -1)),
        "nodes": np.flatnonzero(holds_node & ~is_copy),
        "edge_nodes": edge_node[by_node],
        "edge_tokens": edge_token[by_node],
        "text_edges": text_edges,
    }
    return TextTrie(**{name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})


def _additions(texts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marks the nodes and the edges that each text adds to the trie of those before it, bool [C, L] each.

    Args:
        texts: [C, L], sorted, so that no text before has more in common with a text than the one right before it; -1
            after their ends.
        lengths: [C].
    """
    is_shared = (texts[1:] == texts[:-1]) & (texts[1:] >= 0)
    shared_edges = np.zeros_like(lengths)
    shared_nodes = np.zeros_like(lengths)
    shared_edges[1:] = is_shared.cumprod(axis=1).sum(axis=1)
    # k edges join k + 1 nodes; but where the text before has no more edges, its last one leads to no node.
    shared_nodes[1:] = np.minimum(shared_edges[1:] + 1, lengths[:-1])
    position = np.arange(texts.shape[1])
    is_text = position < lengths[:, None]
    return is_text & (position >= shared_nodes[:, None]), is_text & (position >= shared_edges[:, None])


def _number(is_new: np.ndarray) -> np.ndarray:
    """Numbers the true entries row by row; a false one has the number of the last true one above it. Both [C, L]."""
    numbers = np.where(is_new, is_new.cumsum().reshape(is_new.shape) - 1, 0)
    return np.maximum.accumulate(numbers, axis=0)  # numbers grow downwards, so that the last one is the largest


def _cut_into_blocks(parent: np.ndarray, depth: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts N nodes into as few blocks as `block_size` allows, all of the smallest size that needs no more of them.

    Returns:
        The node at each position [G, Q], -1 after the last one, and whether it is a copy of an ancestor [G, Q].
    """
    size = _smallest_size(depth, block_size)
    starts = _first_nodes(depth, size)
    positions = np.full((len(starts), size), -1)
    is_copy = np.zeros((len(starts), size), dtype=bool)
    for block, (start, end) in enumerate(zip(starts, [*starts[1:], len(depth)], strict=True)):
        ancestor = start
        for place in reversed(range(depth[start])):
            ancestor = parent[ancestor]
            positions[block, place] = ancestor
        is_copy[block, : depth[start]] = True
        positions[block, depth[start] : depth[start] + end - start] = np.arange(start, end)
    return positions, is_copy


def _smallest_size(depth: np.ndarray, block_size: int) -> int:
    """Finds the smallest size of blocks that needs no more of them than `block_size`; padding is read for nothing."""
    blocks = len(_first_nodes(depth, block_size))
    sizes = range(int(depth.max()) + 1, block_size)
    # bisection, since the number of blocks falls as their size grows
    return sizes.start + bisect.bisect_left(sizes, True, key=lambda size: len(_first_nodes(depth, size)) <= blocks)


def _first_nodes(depth: np.ndarray, size: int) -> list[int]:
    """First node of each block of `size` positions, of which the first ones are for the ancestors of that node."""
    starts = [0]
    while (end := starts[-1] + size - int(depth[starts[-1]])) < len(depth):
        starts.append(end)
    return starts


def _ends_of_subtrees(depths: np.ndarray) -> np.ndarray:
    """One past the last descendant of each position [G, Q]: the next one that is no deeper. Depth -1 is padding."""
    ends = np.full_like(depths, depths.shape[1])
    for position in range(depths.shape[1]):
        earlier = ends[:, :position]
        is_ended = depths[:, :position] >= depths[:, position, None]
        np.minimum(earlier, position, out=earlier, where=is_ended)
    return ends
