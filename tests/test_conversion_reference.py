"""big_vision's CapPa in plain numpy, written from upstream's description alone: what conversions are compared with.

Nothing here is shared with `conversion/` or `ig_captioner/`. The tests of this file check it against upstream's own
outputs, where `../shared/golden` is there; the other files use `random_leaves`, `forward` and `score`.

Legend: B images, C classes, P patches, L text tokens, E encoder width, D decoder width, V vocabulary.
"""

import os
from pathlib import Path

import numpy as np
import pytest


GOLDEN = Path(os.environ.get("IG_CAPTIONER_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
BIG_VISION = GOLDEN / "big_vision_cappa"
needs_golden = pytest.mark.skipif(
    not BIG_VISION.is_dir(), reason=f"no reference sets in {GOLDEN} (IG_CAPTIONER_GOLDEN names another place)"
)
ENCODER_BLOCK, DECODER_BLOCK = "encoder/Transformer/encoderblock_", "decoder/EncDecBlock"

Leaves = dict[str, np.ndarray]


def random_leaves(
    seed: int = 0,
    *,
    width: int = 24,
    heads: int = 3,
    mlp: int = 40,
    depth: int = 2,
    patch: tuple[int, int] = (4, 4),
    grid: tuple[int, int] = (2, 2),
    decoder_width: int = 16,
    decoder_heads: int = 2,
    decoder_mlp: int = 36,
    decoder_depth: int = 3,
    vocab: int = 29,
    length: int = 9,
    mask_row: bool = True,
    decoder_bias: bool = False,
    learned: bool = True,
) -> Leaves:
    """A checkpoint's leaves in the loop layout, bare names, every value random."""
    rng = np.random.default_rng(seed)
    e, d, heads_d = width, decoder_width, (decoder_heads, decoder_width // decoder_heads)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder/embedding/kernel": (*patch, 3, e),
        "encoder/embedding/bias": (e,),
        "encoder/Transformer/encoder_norm/scale": (e,),
        "encoder/Transformer/encoder_norm/bias": (e,),
        "decoder/EmbedTargets/embedding": (vocab + mask_row, d),
        "decoder/LayerNorm/scale": (d,),
        "decoder/LayerNorm/bias": (d,),
        "decoder/LogitsDense/kernel": (d, vocab),
        "decoder/LogitsDense/bias": (vocab,),
    }
    if learned:
        shapes["encoder/pos_embedding"] = (1, grid[0] * grid[1], e)
        shapes["pos_embedding_decoder"] = (1, length, d)
    for i in range(depth):
        block, attention = f"{ENCODER_BLOCK}{i}", f"{ENCODER_BLOCK}{i}/MultiHeadDotProductAttention_0"
        for name in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{block}/{name}/scale": (e,), f"{block}/{name}/bias": (e,)}
        for name in ("query", "key", "value"):
            shapes |= {f"{attention}/{name}/kernel": (e, heads, e // heads)}
            shapes |= {f"{attention}/{name}/bias": (heads, e // heads)}
        shapes |= {f"{attention}/out/kernel": (heads, e // heads, e), f"{attention}/out/bias": (e,)}
        shapes |= {f"{block}/MlpBlock_0/Dense_0/kernel": (e, mlp), f"{block}/MlpBlock_0/Dense_0/bias": (mlp,)}
        shapes |= {f"{block}/MlpBlock_0/Dense_1/kernel": (mlp, e), f"{block}/MlpBlock_0/Dense_1/bias": (e,)}
    for i in range(decoder_depth):
        block = f"{DECODER_BLOCK}{i}"
        for attention, source in (("SelfAttn", d), ("CrossAttn", e)):
            shapes |= {f"{block}/{attention}/query/kernel": (d, *heads_d)}
            shapes |= {f"{block}/{attention}/{name}/kernel": (source, *heads_d) for name in ("key", "value")}
            shapes |= {f"{block}/{attention}/out/kernel": (*heads_d, d)}
        shapes |= {f"{block}/LayerNorm{n}/scale": (d,) for n in (1, 2, 3)}
        shapes |= {f"{block}/MLP/Dense_0/kernel": (d, decoder_mlp), f"{block}/MLP/Dense_1/kernel": (decoder_mlp, d)}
        if decoder_bias:
            shapes |= {f"{block}/LayerNorm{n}/bias": (d,) for n in (1, 2, 3)}
            shapes |= {f"{block}/MLP/Dense_0/bias": (decoder_mlp,), f"{block}/MLP/Dense_1/bias": (d,)}

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape) * (0.25 if name.endswith("kernel") else 0.5)
        return (noise + name.endswith("scale")).astype(np.float32)

    return {name: value(name, shape) for name, shape in shapes.items()}


def as_scan(leaves: Leaves) -> Leaves:
    """The scan layout: encoder blocks stacked on axis 0, decoder blocks on axis 1."""
    scanned = {}
    for stack, separator, axis in (("encoder/Transformer/encoderblock", "_", 0), ("decoder/EncDecBlock", "", 1)):
        for name in [name for name in leaves if name.startswith(f"{stack}{separator}0/")]:
            tail = name.removeprefix(f"{stack}{separator}0/")
            depth = sum(key.startswith(f"{stack}{separator}") and key.endswith(f"/{tail}") for key in leaves)
            layers = [leaves[f"{stack}{separator}{i}/{tail}"] for i in range(depth)]
            scanned[f"{stack}/{tail}"] = np.stack(layers, axis=axis)
    rest = {name: leaf for name, leaf in leaves.items() if "encoderblock_" not in name and "EncDecBlock" not in name}
    return {**rest, **scanned}


def to_bfloat16(leaf: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as numpy's two nameless bytes."""
    bits = leaf.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view("V2")


def from_bfloat16(leaf: np.ndarray) -> np.ndarray:
    return (leaf.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def save(path: Path, leaves: Leaves, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: leaf for name, leaf in leaves.items()})
    return path


def _layer_norm(x: np.ndarray, leaves: Leaves, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return normed * leaves[f"{name}/scale"] + leaves.get(f"{name}/bias", 0.0)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _mlp(x: np.ndarray, leaves: Leaves, name: str) -> np.ndarray:
    inner = _gelu(x @ leaves[f"{name}/Dense_0/kernel"] + leaves.get(f"{name}/Dense_0/bias", 0.0))
    return inner @ leaves[f"{name}/Dense_1/kernel"] + leaves.get(f"{name}/Dense_1/bias", 0.0)


def _attend(
    queries: np.ndarray, source: np.ndarray, leaves: Leaves, name: str, mask: np.ndarray | None = None
) -> np.ndarray:
    def project(x: np.ndarray, part: str) -> np.ndarray:
        projected = np.einsum("blw,whd->bhld", x, leaves[f"{name}/{part}/kernel"])
        return projected + leaves.get(f"{name}/{part}/bias", np.zeros((1, 1)))[:, None, :]

    query, key, value = project(queries, "query"), project(source, "key"), project(source, "value")
    scores = np.einsum("bhld,bhsd->bhls", query, key) / np.sqrt(query.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    read = np.einsum("bhls,bhsd->blhd", weights, value)
    return np.einsum("blhd,hdw->blw", read, leaves[f"{name}/out/kernel"]) + leaves.get(f"{name}/out/bias", 0.0)


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:rows, :columns])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def _depth(leaves: Leaves, stack: str) -> int:
    return 1 + max(int(name.removeprefix(stack).split("/")[0]) for name in leaves if name.startswith(stack))


def encode(leaves: Leaves, images: np.ndarray) -> np.ndarray:
    """[B, height, width, 3] in [-1, 1] -> [B, P, E]."""
    kernel = leaves["encoder/embedding/kernel"]
    (ph, pw, _, width), (batch, height, columns, _) = kernel.shape, images.shape
    rows, columns = height // ph, columns // pw
    patches = images.reshape(batch, rows, ph, columns, pw, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("brcijk,ijkw->brcw", patches, kernel).reshape(batch, rows * columns, width)
    positions = leaves.get("encoder/pos_embedding")
    x = x + leaves["encoder/embedding/bias"] + (sincos(rows, columns, width) if positions is None else positions)
    for i in range(_depth(leaves, ENCODER_BLOCK)):
        block = f"{ENCODER_BLOCK}{i}"
        normed = _layer_norm(x, leaves, f"{block}/LayerNorm_0")
        x = x + _attend(normed, normed, leaves, f"{block}/MultiHeadDotProductAttention_0")
        x = x + _mlp(_layer_norm(x, leaves, f"{block}/LayerNorm_1"), leaves, f"{block}/MlpBlock_0")
    return _layer_norm(x, leaves, "encoder/Transformer/encoder_norm")


def decode(leaves: Leaves, encoded: np.ndarray, inputs: np.ndarray, causal: bool) -> np.ndarray:
    """Decoder inputs [B, L] -> logits [B, L, V]."""
    length, width = inputs.shape[1], leaves["decoder/EmbedTargets/embedding"].shape[1]
    positions = leaves.get("pos_embedding_decoder")
    x = leaves["decoder/EmbedTargets/embedding"][inputs]
    x = x + (sincos(1, length, width) if positions is None else positions[:, :length])
    mask = np.tril(np.ones((length, length), bool)) if causal else None
    for i in range(_depth(leaves, DECODER_BLOCK)):
        block = f"{DECODER_BLOCK}{i}"
        normed = _layer_norm(x, leaves, f"{block}/LayerNorm1")
        x = x + _attend(normed, normed, leaves, f"{block}/SelfAttn", mask)
        x = x + _attend(_layer_norm(x, leaves, f"{block}/LayerNorm2"), encoded, leaves, f"{block}/CrossAttn")
        x = x + _mlp(_layer_norm(x, leaves, f"{block}/LayerNorm3"), leaves, f"{block}/MLP")
    x = _layer_norm(x, leaves, "decoder/LayerNorm")
    return x @ leaves["decoder/LogitsDense/kernel"] + leaves["decoder/LogitsDense/bias"]


def forward(leaves: Leaves, images: np.ndarray, labels: np.ndarray, parallel: bool = False) -> np.ndarray:
    """Logits [B, L, V] that predict `labels` [B, L]."""
    leaves = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}
    shifted = np.concatenate([np.zeros_like(labels[:, :1]), labels[:, :-1]], axis=1)
    mask_token = leaves["decoder/LogitsDense/bias"].shape[0]
    inputs = np.full_like(labels, mask_token) if parallel else shifted
    return decode(leaves, encode(leaves, images.astype(np.float64)), inputs, causal=not parallel)


def score(leaves: Leaves, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """log P(class tokens | image) [B, C], tokens > 0 only."""
    scores = []
    for row in classes:
        labels = np.tile(row, (len(images), 1))
        logits = forward(leaves, images, labels)
        top = logits.max(-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        tokens = np.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
        scores.append((tokens * (labels > 0)).sum(-1))
    return np.stack(scores, axis=1)


def random_reference(leaves: Leaves, image_size: tuple[int, int], length: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Inputs, and upstream's outputs for them, named as in the reference sets."""
    rng = np.random.default_rng(seed)
    vocab = leaves["decoder/LogitsDense/bias"].shape[0]

    def texts(number: int, length: int) -> np.ndarray:
        tokens = rng.integers(2, vocab, (number, length)).astype(np.int32)
        for row, end in zip(tokens, rng.integers(0, length, number), strict=True):
            row[end:] = 0
            row[end] = 1
        return tokens

    images = rng.uniform(-1, 1, (3, *image_size, 3)).astype(np.float32)
    labels, short, classes = texts(3, length), texts(3, length - 3), texts(4, length - 2)
    reference = {"images": images, "labels": labels, "labels_short": short, "class_labels": classes}
    doubled = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}
    reference["encoded"] = encode(doubled, images.astype(np.float64))
    reference["logits_causal"] = forward(leaves, images, labels)
    reference["logits_causal_short"] = forward(leaves, images, short)
    if len(leaves["decoder/EmbedTargets/embedding"]) > vocab:
        reference["logits_parallel"] = forward(leaves, images, labels, parallel=True)
        reference["logits_parallel_short"] = forward(leaves, images, short, parallel=True)
    reference["class_scores"] = score(leaves, images, classes)
    return reference


def save_reference(path: Path, leaves: Leaves, image_size: tuple[int, int], length: int) -> Path:
    np.savez(path, **random_reference(leaves, image_size, length))
    return path


@needs_golden
def test_the_numpy_model_agrees_with_upstream():
    with np.load(BIG_VISION / "bv_A_ckpt_bare.npz", allow_pickle=False) as file:
        leaves = dict(file)
    with np.load(BIG_VISION / "bv_A_ref.npz", allow_pickle=False) as file:
        expected = dict(file)
    images, labels, short = expected["images"], expected["labels"], expected["labels_short"]
    found = {
        "encoded": encode(leaves, images),
        "logits_causal": forward(leaves, images, labels),
        "logits_causal_short": forward(leaves, images, short),
        "logits_parallel": forward(leaves, images, labels, parallel=True),
        "logits_parallel_short": forward(leaves, images, short, parallel=True),
        "class_scores": score(leaves, images, expected["class_labels"]),
    }
    for name, value in found.items():
        assert np.abs(value - expected[name]).max() < 2e-5, name


@needs_golden
def test_random_leaves_have_the_names_and_shapes_of_upstream():
    with np.load(BIG_VISION / "bv_A_ckpt_bare.npz", allow_pickle=False) as file:
        expected = {name: file[name].shape for name in file}
    settings = {"width": 64, "heads": 4, "mlp": 160, "patch": (8, 8), "grid": (4, 4), "vocab": 97, "length": 16}
    decoder = {"decoder_width": 64, "decoder_heads": 4, "decoder_mlp": 160, "decoder_depth": 2}
    assert {name: leaf.shape for name, leaf in random_leaves(**settings, **decoder).items()} == expected


@needs_golden
def test_the_scan_layout_is_that_of_upstream():
    with np.load(BIG_VISION / "bv_A_ckpt_scan.npz", allow_pickle=False) as file:
        expected = {name.removeprefix("params/"): file[name] for name in file}
    with np.load(BIG_VISION / "bv_A_ckpt_bare.npz", allow_pickle=False) as file:
        scanned = as_scan(dict(file))
    assert scanned.keys() == expected.keys()
    assert all(np.array_equal(scanned[name], expected[name]) for name in expected)
