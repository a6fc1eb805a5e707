"""clip-jax's CapPa and `ig_captioner`, name by name.

Upstream: https://github.com/borisdayma/clip-jax, `clip_jax/modeling.py`. Names are relative to the parameters' root.
Which leaves there are follows from upstream's configuration; the layers of a tower share one leaf, on axis 0.

Axes of the leaves: p, q patch height and width, C channels, P patches, Y rows and X columns of them, N registers; of
the vision tower and the text tower: E and D width, h and H heads, d and G their size, M and F MLP; L text positions,
V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .key_map_big_vision import DECODER, VISION, Entry, Placement
from .reading import ConversionError, Leaf


# Parameters of the contrastive loss, which upstream creates for captioners too and never reads.
UNUSED = {"logit_scale": (1,), "logit_bias": (1,)}


class Axes(NamedTuple):
    width: str
    heads: str
    size: str
    mlp: str


VISION_AXES = Axes("E", "h", "d", "M")
TEXT_AXES = Axes("D", "H", "G", "F")


@dataclass(frozen=True)
class Tower:
    """Facts about the leaves of a tower, from upstream's configuration."""

    layers: int
    gated: bool
    bias: bool
    rmsnorm: bool
    scale: bool
    normformer: bool
    qk_norm: bool
    positions: str
    registers: bool = False

    @property
    def norm_bias(self) -> bool:
        return self.bias and not self.rmsnorm

    @property
    def norm_scale(self) -> bool:
        """Tells whether norms have a scale here: a LayerNorm with a bias has one, of ones where upstream has none."""
        return self.scale or self.norm_bias


@dataclass(frozen=True)
class Structure:
    vision: Tower
    text: Tower


class Norm(NamedTuple):
    leaf: str
    weight: str
    axis: str
    always_scaled: bool = False


def _block_norms(tower: Tower, axes: Axes, cross: bool) -> list[Norm]:
    names = [("attention", "self_attn"), ("cross_attention", "cross_attn")][: 1 + cross]
    norms = [Norm(f"pre_{leaf}_norm", f"{weight}_norm", axes.width) for leaf, weight in names]
    norms.append(Norm("mlp/pre_mlp_norm", "mlp_norm", axes.width))
    if tower.normformer:
        norms += [Norm(f"post_{leaf}_norm", f"{weight}_post_norm", axes.width, True) for leaf, weight in names]
        norms.append(Norm("mlp/mid_mlp_norm", "mlp.mid_norm", axes.mlp))
    return norms


def _norm_entries(tower: Tower, norm: Norm) -> list[Entry]:
    entries = []
    if tower.scale or norm.always_scaled:
        entries.append(Entry(f"{norm.leaf}/scale", f"{norm.weight}.weight", norm.axis))
    if tower.norm_bias:
        entries.append(Entry(f"{norm.leaf}/bias", f"{norm.weight}.bias", norm.axis))
    return entries


def _attention(tower: Tower, leaf: str, weight: str, axes: Axes, read: str) -> list[Entry]:
    split = f"{axes.heads} {axes.size}"
    entries = []
    for name in ("query", "key", "value"):
        inputs = axes.width if name == "query" else read
        short = name[0]
        entries.append(Entry(f"{leaf}/{name}/kernel", f"{weight}.{short}_proj.weight", f"{inputs} {split}", "in"))
        if tower.bias:
            entries.append(Entry(f"{leaf}/{name}/bias", f"{weight}.{short}_proj.bias", split, "flat"))
        if tower.qk_norm and name != "value":
            entries.append(Entry(f"{leaf}/norm_{name}/scale", f"{weight}.{short}_norm.weight", axes.size))
    entries.append(Entry(f"{leaf}/out/kernel", f"{weight}.o_proj.weight", f"{split} {axes.width}", "in2"))
    if tower.bias:
        entries.append(Entry(f"{leaf}/out/bias", f"{weight}.o_proj.bias", axes.width))
    return entries


def _mlp(tower: Tower, axes: Axes) -> list[Entry]:
    names = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if tower.gated else {"wi": "up", "wo": "down"}
    entries = []
    for leaf, name in names.items():
        inputs, outputs = (axes.mlp, axes.width) if leaf == "wo" else (axes.width, axes.mlp)
        entries.append(Entry(f"mlp/{leaf}/kernel", f"mlp.{name}_proj.weight", f"{inputs} {outputs}", "in"))
        if tower.bias:
            entries.append(Entry(f"mlp/{leaf}/bias", f"mlp.{name}_proj.bias", outputs))
    return entries


def _block(tower: Tower, axes: Axes, cross: bool) -> list[Entry]:
    entries = _attention(tower, "attention", "self_attn", axes, axes.width)
    if cross:
        entries += _attention(tower, "cross_attention", "cross_attn", axes, VISION_AXES.width)
    entries += _mlp(tower, axes)
    for norm in _block_norms(tower, axes, cross):
        entries += _norm_entries(tower, norm)
    return entries


FINAL_NORMS = {
    "vision": Norm("vision/final_norm", f"{VISION}.norm", "E"),
    "text": Norm("text/final_norm", f"{DECODER}.norm", "D"),
}


def _outer_entries(structure: Structure) -> list[Entry]:
    """All but the blocks."""
    vision = structure.vision
    text = structure.text
    embeddings = f"{VISION}.embeddings"
    positions = {"learned": {"": "P"}, "factorized": {"_height": "Y", "_width": "X"}}.get(vision.positions, {})
    entries = [Entry("vision/embeddings/patch_embeds/kernel", f"{embeddings}.projection.weight", "p q C E", "conv")]
    if vision.bias:
        entries.append(Entry("vision/embeddings/patch_embeds/bias", f"{embeddings}.projection.bias", "E"))
    for name, axis in positions.items():
        leaf = f"vision/embeddings/position_embeds{name}"
        weight = f"{embeddings}.position_embedding{name}"
        entries.append(Entry(leaf, weight, f"1 {axis} E", "first"))
    if vision.registers:
        entries.append(Entry("vision/embeddings/registers", f"{embeddings}.register_tokens", "1 N E", "first"))
    entries.append(Entry("text/embeddings/embeddings/embedding", f"{DECODER}.embed_tokens.weight", "V D"))
    if text.positions == "learned":
        leaf = "text/embeddings/position_embeds"
        entries.append(Entry(leaf, f"{DECODER}.embed_positions.weight", "1 L D", "first"))
    entries += _norm_entries(vision, FINAL_NORMS["vision"]) + _norm_entries(text, FINAL_NORMS["text"])
    entries.append(Entry("text/logits/kernel", "lm_head.weight", "D V", "in"))
    return [*entries, Entry("text/logits/bias", "lm_head.bias", "V")]


def placements(structure: Structure) -> list[Placement]:
    """Every leaf a checkpoint of this structure has, except the unused ones."""
    found = [Placement(e.leaf, (e.weight,), tuple(e.axes.split()), e.how) for e in _outer_entries(structure)]
    towers = [("vision", VISION, structure.vision, VISION_AXES), ("text", DECODER, structure.text, TEXT_AXES)]
    for name, module, tower, axes in towers:
        for entry in _block(tower, axes, cross=name == "text"):
            weights = tuple(f"{module}.layers.{i}.{entry.weight}" for i in range(tower.layers))
            leaf = f"{name}/encoder/layers/{entry.leaf}"
            found.append(Placement(leaf, weights, tuple(entry.axes.split()), entry.how, scan_axis=0))
    return found


def constants(structure: Structure, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Weights that upstream does without: scales of ones beside a bias, and the zero bias of the last LayerNorm."""
    filled: dict[str, np.ndarray] = {}
    towers = [("vision", VISION, structure.vision, VISION_AXES), ("text", DECODER, structure.text, TEXT_AXES)]
    for name, module, tower, axes in towers:
        if tower.norm_scale and not tower.scale:
            norms = [FINAL_NORMS[name]]
            for i in range(tower.layers):
                block = _block_norms(tower, axes, cross=name == "text")
                norms += [n._replace(weight=f"{module}.layers.{i}.{n.weight}") for n in block if not n.always_scaled]
            filled |= {f"{norm.weight}.weight": np.ones(sizes[norm.axis], np.float32) for norm in norms}
    text = structure.text
    if text.scale and not text.norm_bias and not text.rmsnorm:
        filled[f"{DECODER}.norm.bias"] = np.zeros(sizes["D"], np.float32)
    return filled


def check_family(leaves: dict[str, Leaf]) -> None:
    """Raises ConversionError if the leaves are not those of a clip-jax captioner."""
    if not any(name.startswith("vision/encoder/layers/") for name in leaves):
        raise ConversionError(
            "these are not the leaves of a clip-jax CapPa: expected vision/encoder/layers/... and "
            f"text/encoder/layers/..., found {', '.join(sorted(leaves)[:4])}, ..."
        )
    if "text/logits/kernel" not in leaves:
        raise ConversionError("this clip-jax checkpoint is no captioner: it has no text/logits/kernel")


def split_unused(leaves: dict[str, Leaf]) -> tuple[dict[str, Leaf], list[str]]:
    """The leaves to be converted, and the names of those that nothing reads."""
    unused = [name for name, shape in UNUSED.items() if name in leaves and leaves[name].shape == shape]
    return {name: leaf for name, leaf in leaves.items() if name not in unused}, unused
