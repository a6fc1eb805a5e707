"""Prefixes, which a model has read before a text begins: image and prompt, as a cache that any texts continue.

Legend: B images, R rows that go on from them, V vocabulary. Log-likelihoods are in nats.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache


# Their `update` makes new tensors, so a copy of the layer may share the old ones. All others may write in place.
GROWING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class Prefix:
    """Image and prompt of B images, read.

    Args:
        cache: keys and values (or states) of all layers; never continued itself, only its forks are.
        next_log_probs: log P of each token after the prompt, [B, V], float32.
        positions: of the first token of a text, [B].
        constants: what the model is given with every continuation, [B, ...] each, such as encoder states.
    """

    cache: Cache
    next_log_probs: Tensor
    positions: Tensor
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Counts the images, B."""
        return len(self.next_log_probs)

    @property
    def length(self) -> int:
        """Tokens in the cache that a text attends to."""
        return int(self.cache.get_seq_length())

    @property
    def numbers_per_image(self) -> int:
        """Floats that one image holds in the cache."""
        return sum(tensor.numel() for layer in _layers(self.cache) for tensor in _tensors(layer)) // len(self)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the cache, which quantised weights do not tell."""
        return next(tensor.dtype for layer in _layers(self.cache) for tensor in _tensors(layer))

    def expand(self, images: Tensor) -> "Prefix":
        """Forks the cache for R rows, of which row r goes on from image `images[r]`."""
        cache = fork(self.cache)
        if images.tolist() != list(range(len(self))):
            cache.reorder_cache(images)
        constants = {name: values[images.to(values.device)] for name, values in self.constants.items()}
        here = images.to(self.positions.device)
        return Prefix(cache, self.next_log_probs[here], self.positions[here], constants)


def fork(cache: Cache) -> Cache:
    """Copies a cache so that continuing the copy leaves the original as it is; tensors are shared where they may be.

    A `DynamicCache` grows in place: reused for label after label, it would let a label read the labels before it.
    """
    if isinstance(cache, EncoderDecoderCache):
        new = copy.copy(cache)
        new.self_attention_cache = fork(cache.self_attention_cache)
        new.cross_attention_cache = fork(cache.cross_attention_cache)
        new.is_updated = dict(cache.is_updated)
        return new
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) if type(layer) in GROWING_LAYERS else copy.deepcopy(layer) for layer in cache.layers]
    return new


def is_recurrent(cache: Cache) -> bool:
    """Tells whether a layer sums up the past in a state, so that texts in one pass would read one another."""
    return any(hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states") for layer in _layers(cache))


def _layers(cache: Cache) -> list:
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return cache.layers


def _tensors(layer) -> list[Tensor]:
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in held if tensor is not None and tensor.numel()]
