"""big_vision's CapPa and `ig_captioner`, name by name: one table for both directions.

Upstream: https://github.com/google-research/big_vision, `models/proj/cappa/cappa.py` and `models/vit.py`. Names are
relative to the parameters' root.

Axes of the leaves: p, q patch height and width, C channels, P patches, E encoder width, h encoder heads, d their size,
M encoder MLP; L text positions, D decoder width, H decoder heads, G their size, F decoder MLP, R rows of the token
embedding, V vocabulary. With `scan`, the blocks of a stack share one leaf, with the layers on axis 0 in the encoder
and, as upstream's `nn.scan` has it, on axis 1 in the decoder.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .reading import ConversionError, Leaf


class Entry(NamedTuple):
    """A leaf, the weight it becomes, its axes, how, and the field of [`Structure`] that says whether it exists.

    How: "in" and "in2" are kernels with one and two input axes (torch's weight is the transpose), "conv" a
    convolution, "flat" a bias split into heads, "first" a table with an axis of 1 in front, "same" as it stands.
    """

    leaf: str
    weight: str
    axes: str
    how: str = "same"
    only_if: str = ""


def _attention(leaf: str, weight: str, read: str, split: str, size: str) -> list[Entry]:
    """Projections without biases: queries from `size`, keys and values from `read`, `split` into heads."""
    entries = [Entry(f"{leaf}/query/kernel", f"{weight}.q_proj.weight", f"{size} {split}", "in")]
    for name, short in (("key", "k"), ("value", "v")):
        entries.append(Entry(f"{leaf}/{name}/kernel", f"{weight}.{short}_proj.weight", f"{read} {split}", "in"))
    return [*entries, Entry(f"{leaf}/out/kernel", f"{weight}.o_proj.weight", f"{split} {size}", "in2")]


def _norm(leaf: str, weight: str, size: str, bias_if: str = "") -> list[Entry]:
    return [
        Entry(f"{leaf}/scale", f"{weight}.weight", size),
        Entry(f"{leaf}/bias", f"{weight}.bias", size, only_if=bias_if),
    ]


def _mlp(leaf: str, size: str, inner: str, bias_if: str = "") -> list[Entry]:
    return [
        Entry(f"{leaf}/Dense_0/kernel", "mlp.up_proj.weight", f"{size} {inner}", "in"),
        Entry(f"{leaf}/Dense_0/bias", "mlp.up_proj.bias", inner, only_if=bias_if),
        Entry(f"{leaf}/Dense_1/kernel", "mlp.down_proj.weight", f"{inner} {size}", "in"),
        Entry(f"{leaf}/Dense_1/bias", "mlp.down_proj.bias", size, only_if=bias_if),
    ]


VISION, DECODER = "model.vision_model", "model.decoder"
DECODER_POSITIONS = f"{DECODER}.embed_positions.weight"
ENTRIES = [
    Entry("encoder/embedding/kernel", f"{VISION}.embeddings.projection.weight", "p q C E", "conv"),
    Entry("encoder/embedding/bias", f"{VISION}.embeddings.projection.bias", "E"),
    Entry(
        "encoder/pos_embedding",
        f"{VISION}.embeddings.position_embedding",
        "1 P E",
        "first",
        only_if="learned_positions",
    ),
    *_norm("encoder/Transformer/encoder_norm", f"{VISION}.norm", "E"),
    Entry("pos_embedding_decoder", DECODER_POSITIONS, "1 L D", "first", only_if="learned_positions"),
    Entry("decoder/EmbedTargets/embedding", f"{DECODER}.embed_tokens.weight", "R D"),
    *_norm("decoder/LayerNorm", f"{DECODER}.norm", "D"),
    Entry("decoder/LogitsDense/kernel", "lm_head.weight", "D V", "in"),
    Entry("decoder/LogitsDense/bias", "lm_head.bias", "V"),
]
_ATTENTION = "MultiHeadDotProductAttention_0"
ENCODER_BLOCK = [
    *_norm("LayerNorm_0", "self_attn_norm", "E"),
    *_attention(_ATTENTION, "self_attn", "E", "h d", "E"),
    *(Entry(f"{_ATTENTION}/{n}/bias", f"self_attn.{n[0]}_proj.bias", "h d", "flat") for n in ("query", "key", "value")),
    Entry(f"{_ATTENTION}/out/bias", "self_attn.o_proj.bias", "E"),
    *_norm("LayerNorm_1", "mlp_norm", "E"),
    *_mlp("MlpBlock_0", "E", "M"),
]
DECODER_BLOCK = [
    *_norm("LayerNorm1", "self_attn_norm", "D", "decoder_bias"),
    *_attention("SelfAttn", "self_attn", "D", "H G", "D"),
    *_norm("LayerNorm2", "cross_attn_norm", "D", "decoder_bias"),
    *_attention("CrossAttn", "cross_attn", "E", "H G", "D"),
    *_norm("LayerNorm3", "mlp_norm", "D", "decoder_bias"),
    *_mlp("MLP", "D", "F", "decoder_bias"),
]
ENCODER_STACK, DECODER_STACK = "encoder/Transformer/encoderblock", "decoder/EncDecBlock"


@dataclass(frozen=True)
class Structure:
    """Structure of a checkpoint, as the names of its leaves tell it."""

    encoder_layers: int
    decoder_layers: int
    encoder_scan: bool
    decoder_scan: bool
    decoder_bias: bool
    learned_positions: bool


@dataclass(frozen=True)
class Placement:
    """One leaf of a checkpoint and the weight it becomes, or the weights, if layers are stacked on `scan_axis`."""

    leaf: str
    weights: tuple[str, ...]
    axes: tuple[str, ...]
    how: str
    scan_axis: int | None = None

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The leaf's shape."""
        shape = self._layer_shape(sizes)
        if self.scan_axis is not None:
            shape.insert(self.scan_axis, len(self.weights))
        return tuple(shape)

    def _layer_shape(self, sizes: dict[str, int]) -> list[int]:
        return [1 if axis == "1" else sizes[axis] for axis in self.axes]

    def to_weights(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """`(name, weight)`, layer by layer; weights may be views of `array`."""
        layers = [array] if self.scan_axis is None else np.moveaxis(array, self.scan_axis, 0)
        for name, layer in zip(self.weights, layers, strict=True):
            if self.how == "conv":
                yield name, layer.transpose(3, 2, 0, 1)
            elif self.how in ("in", "in2"):
                inputs = math.prod(layer.shape[: 2 if self.how == "in2" else 1])
                yield name, layer.reshape(inputs, -1).T
            else:
                yield name, layer[0] if self.how == "first" else layer.reshape(-1) if self.how == "flat" else layer

    def to_leaf(self, weight: Callable[[str], np.ndarray], sizes: dict[str, int]) -> np.ndarray:
        """The inverse of `to_weights`: the leaf, contiguous."""
        shape = self._layer_shape(sizes)
        layers = []
        for name in self.weights:
            value = weight(name)
            if self.how == "conv":
                value = value.transpose(2, 3, 1, 0)
            elif self.how in ("in", "in2"):
                value = value.T
            layers.append(value.reshape(shape))
        leaf = layers[0] if self.scan_axis is None else np.stack(layers, axis=self.scan_axis)
        return np.ascontiguousarray(leaf)


def placements(structure: Structure) -> list[Placement]:
    """Every leaf a checkpoint of this structure has, in an order in which shapes can be checked."""
    found = []
    for entry in ENTRIES:
        if not entry.only_if or getattr(structure, entry.only_if):
            found.append(Placement(entry.leaf, (entry.weight,), tuple(entry.axes.split()), entry.how))
    stacks = [
        (ENCODER_STACK, "_", ENCODER_BLOCK, VISION, structure.encoder_layers, structure.encoder_scan, 0),
        (DECODER_STACK, "", DECODER_BLOCK, DECODER, structure.decoder_layers, structure.decoder_scan, 1),
    ]
    for stack, separator, block, module, layers, scan, scan_axis in stacks:
        for entry in block:
            if entry.only_if and not getattr(structure, entry.only_if):
                continue
            names = tuple(f"{module}.layers.{i}.{entry.weight}" for i in range(layers))
            axes = tuple(entry.axes.split())
            if scan:
                found.append(Placement(f"{stack}/{entry.leaf}", names, axes, entry.how, scan_axis))
            else:
                leaves = (f"{stack}{separator}{i}/{entry.leaf}" for i in range(layers))
                found += [Placement(leaf, (name,), axes, entry.how) for leaf, name in zip(leaves, names, strict=True)]
    return found


def find_structure(leaves: dict[str, Leaf]) -> Structure:
    """Raises ConversionError if the leaves are not a CapPa's at all, naming what they look like."""
    encoder_scan, encoder_layers = _count_layers(leaves, ENCODER_STACK, "_", scan_axis=0)
    decoder_scan, decoder_layers = _count_layers(leaves, DECODER_STACK, "", scan_axis=1)
    if not encoder_layers or not decoder_layers:
        raise ConversionError(
            f"these are not the leaves of a big_vision Cap or CapPa ({_guess_family(leaves)}): expected "
            f"{ENCODER_STACK}_0/... and {DECODER_STACK}0/..., found {', '.join(sorted(leaves)[:4])}, ..."
        )
    bias = re.compile(rf"{DECODER_STACK}\d*/(LayerNorm\d/bias|MLP/Dense_\d/bias)")
    return Structure(
        encoder_layers,
        decoder_layers,
        encoder_scan,
        decoder_scan,
        decoder_bias=any(bias.fullmatch(name) for name in leaves),
        learned_positions=any(name in leaves for name in ("encoder/pos_embedding", "pos_embedding_decoder")),
    )


def _count_layers(leaves: dict[str, Leaf], stack: str, separator: str, scan_axis: int) -> tuple[bool, int]:
    """Tells whether a stack is scanned, and how many layers it has; (False, 0) if there is none."""
    for name, leaf in leaves.items():
        if name.startswith(f"{stack}/"):
            return True, leaf.shape[scan_axis] if len(leaf.shape) > scan_axis else 0
    pattern = re.compile(rf"{stack}{separator}(\d+)/")
    numbers = [int(match[1]) for name in leaves if (match := pattern.match(name))]
    return False, max(numbers, default=-1) + 1


def _guess_family(leaves: dict[str, Leaf]) -> str:
    signs = {
        "clip-jax": r"(text|vision)/",
        "a big_vision two-tower model such as SigLIP": r"(img|txt)/",
        "a big_vision ViT without a decoder": r"(Transformer/|embedding/|encoder/Transformer/)",
        "a PyTorch or transformers model": r"[^/]*\.",
    }
    for family, sign in signs.items():
        if any(re.match(sign, name) for name in leaves):
            return f"they look like {family}"
    return "of an unknown family"


def find_sizes(leaves: dict[str, Leaf], plan: list[Placement]) -> dict[str, int]:
    """The length of every axis. Raises ConversionError listing missing, unexpected and misshapen leaves."""
    expected = {placement.leaf for placement in plan}
    missing = sorted(expected - leaves.keys())
    unexpected = sorted(leaves.keys() - expected)
    if missing or unexpected:
        raise ConversionError(
            f"{len(missing)} leaves are missing{_listed(missing)}\n"
            f"{len(unexpected)} leaves belong to no weight{_listed(unexpected)}"
        )
    sizes: dict[str, int] = {}
    misshapen = []
    for placement in plan:
        shape = list(leaves[placement.leaf].shape)
        axes = list(placement.axes)
        if placement.scan_axis is not None:
            axes.insert(placement.scan_axis, str(len(placement.weights)))
        wanted = [int(axis) if axis.isdigit() else sizes.get(axis) for axis in axes]
        fits = len(shape) == len(axes) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))
        if not fits:
            misshapen.append(f"{placement.leaf} is {tuple(shape)}, expected {_described(axes, wanted)}")
            continue
        sizes |= {axis: n for axis, n in zip(axes, shape, strict=True) if not axis.isdigit()}
    if misshapen:
        raise ConversionError(f"{len(misshapen)} leaves have the wrong shape{_listed(misshapen)}")
    return sizes


def _described(axes: list[str], wanted: list[int | None]) -> str:
    return f"({', '.join(axis if n is None else str(n) for axis, n in zip(axes, wanted, strict=True))})"


def _listed(names: list[str]) -> str:
    return "".join(f"\n  {name}" for name in names)
