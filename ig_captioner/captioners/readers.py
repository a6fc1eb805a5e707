"""Three ways to read texts after one image and prompt, each to log P of every edge of a trie of texts.

- `read_tree`: blocks of the trie in one pass each; shared beginnings are read once, the image is in memory once.
- `read_rows`: a row of a batch per text, each after its own copy of the image's cache; for models that take no
  positions, or sum up the past in a state.
- `read_generated`: the model's own `generate()`, forced along each text. Slow, needs no knowledge of the model, and is
  therefore what the other two are measured against.

Legend: B images, C texts, L tokens of a text, E edges, Q positions of a block, P cached tokens, V vocabulary.
Log-likelihoods are in nats, float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..label_trie import TextTrie
from .families import Family
from .prefix import Prefix


# Numbers held at once of what grows with texts: logits, and copies of the cache. 2**28 is 1 GiB in float32.
NUMBERS_PER_PASS = {"cpu": 2**25, "other": 2**28}

Reader = Callable[[Family, Prefix, TextTrie], Tensor]


def read_tree(family: Family, prefix: Prefix, trie: TextTrie) -> Tensor:
    """log P of all edges, [B, E]: block by block, for as many images at once as memory allows.

    The trie's root has been read already, as the prompt: its column of each block is left out.
    """
    edges = _edges_of_root(prefix, trie)
    for block in range(len(trie.tokens) if trie.tokens.shape[1] > 1 else 0):
        first = max(1, trie.first_nodes[block])
        last = trie.first_nodes[block + 1]
        at = trie.nodes[first:last] - block * trie.tokens.shape[1] - 1
        edge_slice = slice(trie.first_edges[first], trie.first_edges[last])
        from_node = trie.edge_nodes[edge_slice] - first
        token = trie.edge_tokens[edge_slice]
        tokens = trie.tokens[block, 1:]
        depths = trie.depths[block, 1:] - 1
        mask = _tree_mask(trie.ends[block, 1:] - 1, prefix)
        for images in torch.arange(len(prefix)).split(_rows_per_pass(prefix, len(tokens))):
            rows = prefix.expand(images)
            positions = rows.positions[:, None] + depths.to(rows.positions.device)
            logits = family.read(rows, tokens.expand(len(images), -1), positions, mask.expand(len(images), -1, -1, -1))
            logits = logits[:, at.to(logits.device)].float()
            log_p = logits[:, from_node, token] - logits.logsumexp(dim=-1)[:, from_node]
            edges[images, edge_slice] = log_p.to(edges.device)
    return edges


def _edges_of_root(prefix: Prefix, trie: TextTrie) -> Tensor:
    """[B, E], filled where the first token of a text is predicted."""
    edges = prefix.next_log_probs.new_zeros(len(prefix), len(trie.edge_nodes))
    first_tokens = trie.edge_tokens[: trie.first_edges[1]]
    edges[:, : len(first_tokens)] = prefix.next_log_probs[:, first_tokens]
    return edges


def _tree_mask(ends: Tensor, prefix: Prefix) -> Tensor:
    """Lets each position attend to the prompt and to its ancestors, [1, 1, Q, P + Q].

    Additive: some models add a boolean mask to the attention scores, as zeros and ones.
    """
    at = torch.arange(len(ends), device=ends.device)
    is_ancestor = (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])
    mask = torch.zeros(len(ends), prefix.length + len(ends), dtype=prefix.dtype, device=ends.device)
    mask[:, prefix.length :].masked_fill_(~is_ancestor, torch.finfo(prefix.dtype).min)
    return mask[None, None]


def read_rows(family: Family, prefix: Prefix, trie: TextTrie) -> Tensor:
    """log P of all edges, [B, E]: texts as rows padded at the end, where padding comes too late to be read."""
    edges = _edges_of_root(prefix, trie)
    tokens = tokens_of(trie)
    chunk_size = _rows_per_pass(prefix, tokens.shape[1] - 1)
    for image in range(len(prefix)):
        for texts in torch.arange(len(tokens), device=tokens.device).split(chunk_size):
            length = int(trie.lengths[texts].max())
            if length < 2:
                continue
            read = tokens[texts, : length - 1]
            predicted = tokens[texts, 1:length]
            rows = prefix.expand(torch.full((len(texts),), image))
            positions = rows.positions[:, None] + torch.arange(length - 1, device=rows.positions.device)
            logits = family.read(rows, read, positions).float()
            predicted = predicted.to(logits.device)
            log_p = logits.gather(-1, predicted[..., None])[..., 0] - logits.logsumexp(dim=-1)
            of_texts = trie.text_edges[texts, 1:length]
            is_token = of_texts < edges.shape[1]
            edges[image, of_texts[is_token]] = log_p.to(edges.device)[is_token]
    return edges


def tokens_of(trie: TextTrie) -> Tensor:
    """The texts of a trie again, [C, L]; token 0 after the end of each."""
    padded = torch.cat([trie.edge_tokens, trie.edge_tokens.new_zeros(1)])
    return padded[trie.text_edges]


def read_generated(family: Family, inputs: dict[str, Any], trie: TextTrie) -> Tensor:
    """log P of all edges for one image, [1, E], from `generate()` forced along each text."""
    edges = torch.zeros(1, len(trie.edge_nodes), device=trie.edge_tokens.device)
    for text, length, of_text in zip(tokens_of(trie), trie.lengths.tolist(), trie.text_edges, strict=True):
        edges[0, of_text[:length]] = forced_log_likelihoods(family, inputs, text[:length].tolist()).to(edges.device)
    return edges


def forced_log_likelihoods(family: Family, inputs: dict[str, Any], text: list[int]) -> Tensor:
    """log P of each token of a text, [L], from the logits of `generate()` that has no other choice."""
    forced = _Forced(text)
    outputs = family.generate(
        inputs,
        logits_processor=LogitsProcessorList([forced]),
        max_new_tokens=len(text),
        min_new_tokens=len(text),
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if forced.step != len(text):
        raise ValueError(f"generate() of {type(family.model).__name__} cannot be forced along a text")
    log_p = torch.stack(outputs.logits)[:, 0].float().log_softmax(dim=-1)  # [L, V]
    return log_p[torch.arange(len(text)), torch.tensor(text)]


class _Forced(LogitsProcessor):
    """Makes the tokens of a text, one after the other, the only possible ones."""

    def __init__(self, text: list[int]):
        self.text = text
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.text[self.step]] = 0
        self.step += 1
        return forced


def _rows_per_pass(prefix: Prefix, positions: int) -> int:
    """Copies of the cache, with the logits of their positions, that are held at once; at least one."""
    budget = NUMBERS_PER_PASS.get(prefix.next_log_probs.device.type, NUMBERS_PER_PASS["other"])
    return max(1, budget // (prefix.numbers_per_image + positions * prefix.next_log_probs.shape[1]))
