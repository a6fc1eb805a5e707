"""Checkpoints that cannot be converted, or not without being told more: each a clear error, and nothing is written."""

import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_conversion_reference import random_leaves, save

from conversion.convert_big_vision import convert
from conversion.reading import ConversionError, open_checkpoint
from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.checkpoint import load_model


# What does not fit


def test_missing_extra_and_misshapen_leaves_are_all_listed(tmp_path):
    leaves = random_leaves()
    del leaves["decoder/EncDecBlock1/CrossAttn/out/kernel"]
    del leaves["decoder/LogitsDense/bias"]
    leaves["encoder/cls"] = np.ones((1, 1, 24), np.float32)
    with pytest.raises(ConversionError) as error:
        convert(save(tmp_path / "bad.npz", leaves), tmp_path / "out")
    for name in ("decoder/EncDecBlock1/CrossAttn/out/kernel", "decoder/LogitsDense/bias", "encoder/cls"):
        assert f"\n  {name}" in str(error.value)
    leaves = random_leaves()
    leaves["encoder/Transformer/encoder_norm/bias"] = np.ones(25, np.float32)
    leaves["decoder/EncDecBlock0/CrossAttn/key/kernel"] = np.ones((16, 2, 8), np.float32)
    with pytest.raises(ConversionError) as error:
        convert(save(tmp_path / "bad.npz", leaves), tmp_path / "out")
    assert "encoder_norm/bias is (25,), expected (24)" in str(error.value)
    assert "CrossAttn/key/kernel is (16, 2, 8), expected (24, 2, 8)" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


@pytest.mark.parametrize(
    "change",
    [
        lambda leaves: leaves.pop("encoder/pos_embedding"),
        lambda leaves: leaves.pop("decoder/EncDecBlock0/LayerNorm2/scale"),
        lambda leaves: leaves.update({"decoder/EncDecBlock0/SelfAttn/query/bias": np.ones((2, 8), np.float32)}),
        lambda leaves: leaves.update({"decoder/EncDecBlock0/LayerNorm1/bias": np.ones(16, np.float32)}),
        lambda leaves: leaves.update({"encoder/head/bias": np.ones(16, np.float32)}),
        lambda leaves: leaves.update({"decoder/EmbedTargets/embedding": np.ones((31, 16), np.float32)}),
        lambda leaves: leaves.update({"decoder/LayerNorm/scale": np.full(16, np.nan, np.float32)}),
        lambda leaves: leaves.update({"decoder/LayerNorm/scale": np.full(16, np.inf, np.float32)}),
        lambda leaves: leaves.update({"decoder/LayerNorm/scale": np.ones(16, np.int32)}),
        lambda leaves: leaves.update({"other/thing": np.ones(16, np.float32)}),
    ],
)
def test_every_broken_leaf_is_refused_and_nothing_is_written(tmp_path, change):
    leaves = random_leaves()
    change(leaves)
    source = save(tmp_path / "bad.npz", leaves)
    with pytest.raises(ConversionError):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def torch_file(path, leaves):
    torch.save({"weight": torch.ones(3)}, path)


def object_array(path, leaves):
    np.savez(path, **{"params/encoder/x": np.array([{"a": 1}], dtype=object)})


def damaged_data(path, leaves):
    save(path, leaves)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def orbax(path, leaves):
    (path / "100" / "default").mkdir(parents=True)
    (path / "100" / "_CHECKPOINT_METADATA").write_text("{}")


def doubled(path, leaves):
    save(path, leaves)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(f"{next(iter(leaves))}.npy", npy(np.ones(3, np.float32)))


def half(path, leaves):
    save(path, leaves)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN_FILES = {
    "truncated": (half, "truncated or damaged"),
    "damaged": (damaged_data, "truncated or damaged"),
    "orbax": (orbax, "Orbax checkpoint, as clip-jax"),
    "doubled": (doubled, "the same name twice"),
    "empty": (lambda path, leaves: path.write_bytes(b""), "empty"),
    "pickle": (lambda path, leaves: path.write_bytes(pickle.dumps({"a": 1})), "pickle"),
    "object array": (object_array, "pickle"),
    "torch": (torch_file, "PyTorch"),
    "array": (lambda path, leaves: path.write_bytes(npy(np.ones(3))), "single array"),
    "safetensors": (lambda path, leaves: save_file({"a": np.ones(3)}, path), "safetensors"),
    "text": (lambda path, leaves: path.write_text("nonsense"), "no .npz"),
    "missing": (lambda path, leaves: None, "no such checkpoint"),
    "folder": (lambda path, leaves: path.mkdir(), "no arrays"),
    "folder of files": (lambda path, leaves: (path / "layer").mkdir(parents=True), "no zarr array"),
}


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(tmp_path, name):
    make, message = BROKEN_FILES[name]
    source = tmp_path / "checkpoint.npz"
    make(source, random_leaves())
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) <= 1


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["text/encoder/layers/a", "vision/embed/kernel"], "clip-jax"),
        (["params/img/embedding/kernel", "params/txt/x"], "two-tower"),
        (["embedding/kernel", "Transformer/encoderblock_0/x"], "ViT without a decoder"),
        (["encoder.layers.0.weight"], "PyTorch"),
        (["something/else"], "unknown family"),
    ],
)
def test_other_families_are_named(tmp_path, names, family):
    source = save(tmp_path / "other.npz", {name: np.ones(3, np.float32) for name in names})
    with pytest.raises(ConversionError, match=f"not the leaves of a big_vision.*{family}"):
        convert(source, tmp_path / "out")


def test_an_unknown_subtree(tmp_path):
    checkpoint = save(tmp_path / "checkpoint.npz", random_leaves())
    with pytest.raises(ConversionError, match="no parameters under 'img/'; at its top are decoder, encoder, pos_emb"):
        open_checkpoint(f"{checkpoint}:img")


# Config


def test_what_the_file_cannot_tell_is_asked_for(tmp_path):
    wide = save(tmp_path / "wide.npz", random_leaves(grid=(2, 3)))
    with pytest.raises(ConversionError, match="6 patches are no square: give --image_size"):
        convert(wide, tmp_path / "out")
    for image_size in ((8, 8), (9, 12)):
        with pytest.raises(ConversionError, match="patches of 4 x 4, but the checkpoint has 6"):
            convert(wide, tmp_path / "out", image_size=image_size)
    fixed = save(tmp_path / "fixed.npz", random_leaves(learned=False))
    config = tmp_path / "config.json"
    with pytest.raises(ConversionError, match="has no position embeddings.*--config"):
        convert(fixed, tmp_path / "out", image_size=(8, 8))
    config.write_text(json.dumps({"posemb_type": "sincos2d", "seq_len": 9}))
    with pytest.raises(ConversionError, match="positions are fixed: give --image_size"):
        convert(fixed, tmp_path / "out", config=config)
    config.write_text(json.dumps({"model": {"posemb_type": "sincos2d", "seq_len": 9}, "image_size": 8}))
    convert(fixed, tmp_path / "out", config=config)


@pytest.mark.parametrize(
    "stated",
    [
        {"num_heads": 4},
        {"num_layers": 3},
        {"decoder_num_layers": 2},
        {"mlp_dim": 41},
        {"decoder_emb_dim": 0},
        {"vocab_size": 30},
        {"seq_len": 64},
        {"patches": [8, 8]},
        {"posemb_type": "sincos2d"},
        {"masked_pred_prob": 0.0},
        {"decoder_bias": True},
        {"model": {}, "mask_token_id": 3},
        {"model": {}, "pad_id": 1},
        {"model": {}, "activation": "gelu"},
        {"model": {}, "encoder_ln_eps": 1e-5},
        {"model": {}, "image_size": [8, 12]},
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_checkpoint(tmp_path, stated):
    checkpoint = save(tmp_path / "checkpoint.npz", random_leaves())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(stated))
    with pytest.raises(ConversionError, match="but|image of 8 x 12"):
        convert(checkpoint, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()


def test_a_config_that_agrees(tmp_path):
    checkpoint = save(tmp_path / "checkpoint.npz", random_leaves())
    model = {"num_heads": 3, "num_layers": 2, "mlp_dim": 40, "emb_dim": 24, "vocab_size": 29, "seq_len": 9}
    model |= {"patches": [4, 4], "posemb_type": "learn", "decoder_num_layers": 3, "decoder_num_heads": 2}
    model |= {"decoder_mlp_dim": 36, "decoder_emb_dim": 16, "decoder_bias": False, "scan": True}
    model |= {"masked_pred_prob": 0.75, "masking_ratio": 1.0, "dec_dropout_rate": 0.1}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": model, "image_size": [8, 8], "eos_id": 5, "seed": 3}))
    convert(checkpoint, tmp_path / "out", config=config)
    converted = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    text = converted.config.text_config
    ids = (text.pad_token_id, text.bos_token_id, text.eos_token_id, text.decoder_start_token_id, text.mask_token_id)
    assert ids == (0, None, 5, 0, 29)
    assert converted.config.parallel_prediction_prob == 0.75 and converted.config.loss_reduction == "sequence"
    assert converted.generation_config.eos_token_id == 5 and converted.generation_config.decoder_start_token_id == 0
    assert converted.config.prior_weight == 0 and text.dropout == 0.1
    cap = save(tmp_path / "cap.npz", random_leaves(mask_row=False))
    convert(cap, tmp_path / "cap")
    assert load_model(IGCaptionerForConditionalGeneration, tmp_path / "cap").config.mask_token_id is None
