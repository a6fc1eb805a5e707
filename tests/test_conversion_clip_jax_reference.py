"""clip-jax's CapPa in plain numpy, written from upstream's code alone: what conversions are compared with.

Nothing here is shared with `conversion/` or `ig_captioner/`. The first test checks it against upstream's own outputs,
where `../shared/golden` is there; `test_conversion_clip_jax.py` uses the rest.

Legend: B images, C classes, P patches, L text tokens, V vocabulary.
"""

import json

import numpy as np
import pytest
from test_conversion_reference import GOLDEN


CLIP_JAX = GOLDEN / "clip_jax_cappa"
needs_clip_jax = pytest.mark.skipif(
    not CLIP_JAX.is_dir(), reason=f"no reference sets in {GOLDEN} (IG_CAPTIONER_GOLDEN names another place)"
)
BOS, EOS, PAD, MASK = 1, 2, 3, 4
Leaves = dict[str, np.ndarray]

BLOCK = {"activations": ["gelu", "linear"], "normalize_qk": False, "use_bias": False, "force_scale": False}
BLOCK |= {"use_rmsnorm": True, "ln_type": "normformer"}
TEXT = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "mlp_dim": 20, "vocab_size": 29, "max_length": 9}
TEXT |= {"position_embedding_type": "rotary", "is_decoder": True, "use_causal_mask": True, "masked_pred_prob": 0.75}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "mask_token_id": MASK}
VISION = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 28, "image_size": 8, "patch_size": 4}
VISION |= {"position_embedding_type": "learnt", "position_embedding_shape": [2, 2], "registers": 2}
VISION |= {"position_embedding_factorized": False, "keep_registers": True, "use_causal_mask": False}


def make_config(block: dict | None = None, text: dict | None = None, vision: dict | None = None) -> dict:
    """Upstream's `config.json` of a tiny model, the towers of different widths."""
    towers = {"text_config": {**TEXT, **BLOCK, **(block or {}), **(text or {})}}
    towers["vision_config"] = {**VISION, **BLOCK, **(block or {}), **(vision or {})}
    return {**towers, "projection_dim": 8, "logit_scale_init_value": 2.3, "dtype": "float32"}


def _block_shapes(config: dict, source: int | None) -> dict[str, tuple[int, ...]]:
    width, heads, mlp = config["hidden_size"], config["num_heads"], config["mlp_dim"]
    head, bias, shapes = width // heads, config["use_bias"], {}

    def norm(name: str, size: int, scale: bool) -> None:
        shapes.update({f"{name}/scale": (size,)} if scale else {})
        shapes.update({f"{name}/bias": (size,)} if bias and not config["use_rmsnorm"] else {})

    for name, read in [("attention", width)] + [("cross_attention", source)] * (source is not None):
        for part, inputs in (("query", width), ("key", read), ("value", read)):
            shapes[f"{name}/{part}/kernel"] = (inputs, heads, head)
            shapes |= {f"{name}/{part}/bias": (heads, head)} if bias else {}
            if config["normalize_qk"] and part != "value":
                shapes[f"{name}/norm_{part}/scale"] = (head,)
        shapes[f"{name}/out/kernel"] = (heads, head, width)
        shapes |= {f"{name}/out/bias": (width,)} if bias else {}
        norm(f"pre_{name}_norm", width, config["force_scale"])
        if config["ln_type"] == "normformer":
            norm(f"post_{name}_norm", width, True)
    norm("mlp/pre_mlp_norm", width, config["force_scale"])
    if config["ln_type"] == "normformer":
        norm("mlp/mid_mlp_norm", mlp, config["force_scale"])
    inner = ["wi_0", "wi_1"] if len(config["activations"]) == 2 else ["wi"]
    for name in [*inner, "wo"]:
        shapes[f"mlp/{name}/kernel"] = (mlp, width) if name == "wo" else (width, mlp)
        shapes |= {f"mlp/{name}/bias": (width if name == "wo" else mlp,)} if bias else {}
    return shapes


def random_leaves(config: dict, seed: int = 0) -> Leaves:
    """The parameters that upstream creates, every value random."""
    text, vision = config["text_config"], config["vision_config"]
    width, patch, shapes = vision["hidden_size"], vision["patch_size"], {"logit_scale": (1,), "logit_bias": (1,)}
    shapes["vision/embeddings/patch_embeds/kernel"] = (patch, patch, 3, width)
    if vision["use_bias"]:
        shapes["vision/embeddings/patch_embeds/bias"] = (width,)
    rows, columns = vision["position_embedding_shape"]
    if vision["position_embedding_factorized"]:
        shapes["vision/embeddings/position_embeds_height"] = (1, rows, width)
        shapes["vision/embeddings/position_embeds_width"] = (1, columns, width)
    elif vision["position_embedding_type"] == "learnt":
        shapes["vision/embeddings/position_embeds"] = (1, rows * columns, width)
    if vision["registers"]:
        shapes["vision/embeddings/registers"] = (1, vision["registers"], width)
    shapes["text/embeddings/embeddings/embedding"] = (text["vocab_size"], text["hidden_size"])
    if text["position_embedding_type"] == "learnt":
        shapes["text/embeddings/position_embeds"] = (1, text["max_length"], text["hidden_size"])
    shapes["text/logits/kernel"] = (text["hidden_size"], text["vocab_size"])
    shapes["text/logits/bias"] = (text["vocab_size"],)
    for name, tower, source in (("vision", vision, None), ("text", text, width)):
        if tower["force_scale"]:
            shapes[f"{name}/final_norm/scale"] = (tower["hidden_size"],)
        if tower["use_bias"] and not tower["use_rmsnorm"]:
            shapes[f"{name}/final_norm/bias"] = (tower["hidden_size"],)
        for leaf, shape in _block_shapes(tower, source).items():
            shapes[f"{name}/encoder/layers/{leaf}"] = (tower["num_layers"], *shape)
    rng = np.random.default_rng(seed)

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape) * (0.25 if name.endswith("kernel") else 0.5)
        return (noise + name.endswith("scale")).astype(np.float32)

    return {name: value(name, shape) for name, shape in shapes.items()}


def _norm(x: np.ndarray, rmsnorm: bool, leaves: Leaves, name: str) -> np.ndarray:
    x = x if rmsnorm else x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * leaves.get(f"{name}/scale", 1.0) + leaves.get(f"{name}/bias", 0.0)


def _rotary(x: np.ndarray) -> np.ndarray:
    """x [B, L, heads, size]: pairs (i, i + size / 2) turned by position / 10000 ** (2 i / size)."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None, None] / 10000.0 ** (np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    turned = (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles))
    return np.concatenate(turned, axis=-1)


def _attend(x, read, config: dict, leaves: Leaves, name: str, mask=None) -> np.ndarray:
    def project(inputs, part):
        states = np.einsum("blw,whd->blhd", inputs, leaves[f"{name}/{part}/kernel"])
        states = states + leaves.get(f"{name}/{part}/bias", 0.0)
        if config["normalize_qk"] and part != "value":
            states = _norm(states, True, leaves, f"{name}/norm_{part}")
        rotary = config["position_embedding_type"] == "rotary" and name == "attention" and part != "value"
        return _rotary(states) if rotary else states

    query, key, value = project(x, "query"), project(read, "key"), project(read, "value")
    scores = np.einsum("blhd,bshd->bhls", query, key) / np.sqrt(query.shape[-1])
    scores = scores if mask is None else np.where(mask, scores, -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("bhls,bshd->blhd", weights, value)
    return np.einsum("blhd,hdw->blw", attended, leaves[f"{name}/out/kernel"]) + leaves.get(f"{name}/out/bias", 0.0)


def _mlp(x, config: dict, leaves: Leaves) -> np.ndarray:
    rms, inner = config["use_rmsnorm"], 1.0
    x = _norm(x, rms, leaves, "mlp/pre_mlp_norm")
    for i, act in enumerate(config["activations"]):
        name = "mlp/wi" if len(config["activations"]) == 1 else f"mlp/wi_{i}"
        y = x @ leaves[f"{name}/kernel"] + leaves.get(f"{name}/bias", 0.0)
        if act == "gelu":
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        inner = inner * (np.maximum(y, 0) if act == "relu" else y)
    if config["ln_type"] == "normformer":
        inner = _norm(inner, rms, leaves, "mlp/mid_mlp_norm")
    return inner @ leaves["mlp/wo/kernel"] + leaves.get("mlp/wo/bias", 0.0)


def _tower(x, config: dict, leaves: Leaves, name: str, image=None, mask=None) -> np.ndarray:
    rms, prefix = config["use_rmsnorm"], f"{name}/encoder/layers/"
    for i in range(config["num_layers"]):
        layer = {key.removeprefix(prefix): leaf[i] for key, leaf in leaves.items() if key.startswith(prefix)}
        for part in ["attention"] + ["cross_attention"] * (image is not None):
            normed = _norm(x, rms, layer, f"pre_{part}_norm")
            crosses = part == "cross_attention"
            out = _attend(normed, image if crosses else normed, config, layer, part, None if crosses else mask)
            x = x + (_norm(out, rms, layer, f"post_{part}_norm") if config["ln_type"] == "normformer" else out)
        x = x + _mlp(x, config, layer)
    return _norm(x, rms, leaves, f"{name}/final_norm")


def _resample(table: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Linear between the first and the last entry of an axis."""
    at = np.linspace(0, table.shape[axis] - 1, length)
    low = np.minimum(at.astype(int), max(table.shape[axis] - 2, 0))
    high = np.minimum(low + 1, table.shape[axis] - 1)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(table.ndim)])
    return np.take(table, low, axis) * (1 - share) + np.take(table, high, axis) * share


def _positions(config: dict, leaves: Leaves, rows: int, columns: int) -> np.ndarray:
    """[P, width]"""
    width, name = config["hidden_size"], "vision/embeddings/position_embeds"
    if config["position_embedding_type"] == "sincos2d":
        omega = 10000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
        y, x = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:rows, :columns])
        return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    if config["position_embedding_factorized"]:
        height = _resample(leaves[f"{name}_height"][0], rows, 0)
        return (height[:, None] + _resample(leaves[f"{name}_width"][0], columns, 0)).reshape(-1, width)
    table = leaves[name].reshape(*config["position_embedding_shape"], width)
    return _resample(_resample(table, rows, 0), columns, 1).reshape(-1, width)


def encode(config: dict, leaves: Leaves, images: np.ndarray) -> np.ndarray:
    """[B, height, width, 3] in [-1, 1] -> [B, P + registers, width]."""
    vision = config["vision_config"]
    size, batch = vision["patch_size"], len(images)
    rows, columns = images.shape[1] // size, images.shape[2] // size
    patches = images.reshape(batch, rows, size, columns, size, 3)
    x = np.einsum("bricjd,ijdw->brcw", patches, leaves["vision/embeddings/patch_embeds/kernel"])
    x = x.reshape(batch, rows * columns, -1) + leaves.get("vision/embeddings/patch_embeds/bias", 0.0)
    x = x + _positions(vision, leaves, rows, columns)
    if vision["registers"]:
        x = np.concatenate([x, np.repeat(leaves["vision/embeddings/registers"], batch, axis=0)], axis=1)
    return _tower(x, vision, leaves, "vision")


def decode(config: dict, leaves: Leaves, encoded: np.ndarray, input_ids: np.ndarray, mask=None) -> np.ndarray:
    """Logits [B, L, V]; `mask` [B, L] of the tokens makes it causal, without it every token is a mask token."""
    text, length = config["text_config"], input_ids.shape[1]
    inputs = np.full_like(input_ids, text["mask_token_id"]) if mask is None else input_ids
    x = leaves["text/embeddings/embeddings/embedding"][inputs]
    if text["position_embedding_type"] == "learnt":
        x = x + leaves["text/embeddings/position_embeds"][:, :length]
    seen = None
    if mask is not None:
        seen = np.tril(np.ones((length, length), bool)) & (mask[:, None, None, :] > 0) & (mask[:, None, :, None] > 0)
    x = _tower(x, text, leaves, "text", encoded, seen)
    return x @ leaves["text/logits/kernel"] + leaves["text/logits/bias"]


def score(config: dict, leaves: Leaves, encoded: np.ndarray, classes: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sums [B, C] of the log-likelihoods of classes [C, L] that begin with the start token."""
    scores = []
    for ids, mask in zip(classes, masks, strict=True):
        rows = np.tile(ids, (len(encoded), 1))
        logits = decode(config, leaves, encoded, rows, np.tile(mask, (len(encoded), 1)))[:, :-1]
        top = logits.max(-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        tokens = np.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
        scores.append((tokens * mask[1:]).sum(-1))
    return np.stack(scores, axis=1)


def random_reference(config: dict, leaves: Leaves, image_size: tuple[int, int], seed: int = 1) -> Leaves:
    """Inputs, and upstream's outputs for them, named as in the reference sets."""
    text, rng = config["text_config"], np.random.default_rng(seed)
    leaves = {name: leaf.astype(np.float64) for name, leaf in leaves.items()}

    def texts(number: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(5, text["vocab_size"], (number, text["max_length"])).astype(np.int32)
        mask = np.ones_like(ids)
        ids[:, 0] = BOS
        for row, seen, end in zip(ids, mask, rng.integers(1, text["max_length"], number), strict=True):
            row[end], row[end + 1 :], seen[end + 1 :] = EOS, PAD, 0
        return ids, mask

    images = rng.uniform(-1, 1, (3, *image_size, 3)).astype(np.float32)
    ids, mask = texts(3)
    classes, class_mask = texts(4)
    encoded = encode(config, leaves, images.astype(np.float64))
    reference = {"images": images, "input_ids": ids, "attention_mask": mask, "encoded": encoded}
    reference["labels"] = np.concatenate([ids[:, 1:], np.full((3, 1), PAD, np.int32)], axis=1)
    reference |= {"class_input_ids": classes, "class_attention_mask": class_mask}
    reference["logits_causal"] = decode(config, leaves, encoded, ids, mask)
    reference["logits_parallel"] = decode(config, leaves, encoded, ids)
    return {**reference, "class_scores": score(config, leaves, encoded, classes, class_mask)}


@needs_clip_jax
def test_the_numpy_model_agrees_with_upstream():
    config = json.loads((CLIP_JAX / "cj_A_config.json").read_text())
    with np.load(CLIP_JAX / "cj_A_ckpt.npz", allow_pickle=False) as file:
        leaves = {name.removeprefix("params/"): file[name].astype(np.float64) for name in file}
    with np.load(CLIP_JAX / "cj_A_ref.npz", allow_pickle=False) as file:
        expected = dict(file)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    encoded = encode(config, leaves, expected["images"].astype(np.float64))
    logits, real = decode(config, leaves, encoded, ids, mask), mask.astype(bool)
    assert np.abs(encoded - expected["encoded"]).max() < 2e-5
    assert np.abs(logits - expected["logits_causal"])[real].max() < 5e-5
    assert np.abs(decode(config, leaves, encoded, ids) - expected["logits_parallel"]).max() < 5e-5
    classes = score(config, leaves, encoded, expected["class_input_ids"], expected["class_attention_mask"])
    assert np.abs(classes - expected["class_scores"]).max() < 5e-5
    assert {name: leaf.shape for name, leaf in random_leaves(config).items()} == {k: v.shape for k, v in leaves.items()}
