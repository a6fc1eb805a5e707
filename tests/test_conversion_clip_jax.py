"""Checkpoints of clip-jax in their forms and settings, converted and compared with a reference in numpy."""

import json
import sys

import numpy as np
import pytest
import torch
from test_conversion import assert_same_weights
from test_conversion_clip_jax_reference import (
    BOS,
    CLIP_JAX,
    EOS,
    PAD,
    make_config,
    needs_clip_jax,
    random_leaves,
    random_reference,
)
from test_conversion_errors import BROKEN_FILES
from test_conversion_reference import save, to_bfloat16
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversion import convert_clip_jax
from conversion.config_clip_jax import build_config, find_grid, find_structure, read_config
from conversion.convert_clip_jax import convert
from conversion.key_map_clip_jax import placements
from conversion.reading import ConversionError
from ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerImageProcessor
from ig_captioner.checkpoint import load_model, load_processor


def write_config(folder, config: dict):
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


# Outputs


FACTORIZED = {"position_embedding_factorized": True}
CONFIGS = {
    "published": make_config(),
    "preln": make_config({"ln_type": "preln"}),
    "layernorm": make_config({"use_rmsnorm": False}),
    "preln_layernorm": make_config({"ln_type": "preln", "use_rmsnorm": False}),
    "scaled": make_config({"force_scale": True}),
    "scaled_layernorm": make_config({"force_scale": True, "use_rmsnorm": False}),
    "biased": make_config({"use_bias": True}),
    "biased_layernorm": make_config({"use_bias": True, "use_rmsnorm": False}),
    "everything": make_config({"use_bias": True, "use_rmsnorm": False, "force_scale": True, "normalize_qk": True}),
    "qk_norm": make_config({"normalize_qk": True}),
    "qk_norm_learnt": make_config({"normalize_qk": True}, {"position_embedding_type": "learnt"}),
    "one_activation": make_config({"activations": ["relu"], "ln_type": "preln"}),
    "factorized": make_config(vision=FACTORIZED),
    "no_registers": make_config(vision={"registers": 0, "keep_registers": False}),
    "sincos": make_config(vision={"position_embedding_type": "sincos2d", "position_embedding_shape": None}),
    "no_shape": make_config(vision={"position_embedding_shape": None}),
    "not_square": make_config(vision={"position_embedding_shape": [2, 3]}),
    "resampled": make_config(vision={"position_embedding_shape": [3, 5]}),
    "resampled_factorized": make_config(vision={**FACTORIZED, "position_embedding_shape": [3, 5]}),
}
IMAGE_SIZES = {"not_square": (8, 12), "resampled": (16, 12), "resampled_factorized": (16, 12)}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_the_reference(tmp_path, name):
    config, image_size = CONFIGS[name], IMAGE_SIZES.get(name, (8, 8))
    stated = dict(config["vision_config"])
    config["vision_config"]["position_embedding_shape"] = stated["position_embedding_shape"] or [2, 2]
    leaves = random_leaves(config, seed=len(name))
    np.savez(tmp_path / "reference.npz", **random_reference(config, leaves, image_size))
    file = write_config(tmp_path, {**config, "vision_config": stated})
    source = save(tmp_path / "checkpoint.npz", leaves, "params/")
    size = IMAGE_SIZES.get(name)
    report = convert(source, tmp_path / "out", config=file, image_size=size, verify=tmp_path / "reference.npz")
    assert set(report.differences) >= {"encoded", "logits_causal", "logits_parallel", "class_scores"}
    assert max(report.stored_differences.values()) < 5e-5
    assert any("logit_scale and logit_bias" in note for note in report.notes)
    processor = IGCaptionerImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": image_size[0], "width": image_size[1]}


@needs_clip_jax
def test_reference_set(tmp_path):
    arguments = {"config": CLIP_JAX / "cj_A_config.json", "verify": CLIP_JAX / "cj_A_ref.npz"}
    report = convert(CLIP_JAX / "cj_A_ckpt.npz", tmp_path / "out", **arguments)
    compared = {"encoded", "logits_causal", "seq_loglik_causal", "logits_parallel", "class_scores"}
    assert compared <= report.stored_differences.keys() and max(report.stored_differences.values()) < 1e-4
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    with np.load(CLIP_JAX / "cj_A_ref.npz") as file:
        images, expected = torch.from_numpy(file["images"]).permute(0, 3, 1, 2), file["generate_greedy"]
    generated = model.generate(pixel_values=images, max_length=expected.shape[1], do_sample=False).numpy()
    assert np.array_equal(generated, expected[:, : generated.shape[1]])
    assert (expected[:, generated.shape[1] :] == model.config.pad_token_id).all()


@needs_clip_jax
def test_the_published_form_of_the_reference_set(tmp_path):
    pytest.importorskip("tensorstore")
    convert(CLIP_JAX / "cj_A_ckpt.npz", tmp_path / "npz", config=CLIP_JAX / "cj_A_config.json")
    root = CLIP_JAX / "cj_A_orbax"
    for number, source in enumerate((root, root / "100", root / "100" / "default")):
        report = convert(source, tmp_path / f"orbax{number}", verify=CLIP_JAX / "cj_A_ref.npz")
        assert max(report.stored_differences.values()) < 1e-4
        assert_same_weights(tmp_path / "npz", tmp_path / f"orbax{number}")


def test_the_published_model_has_its_size():
    config = make_config(
        text={"hidden_size": 1024, "num_layers": 12, "num_heads": 16, "mlp_dim": 3072, "vocab_size": 65536,
              "max_length": 64},
        vision={"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 3072, "image_size": 256,
                "patch_size": 16, "position_embedding_shape": None, "registers": 8},
    )  # fmt: skip
    towers = {"text": config["text_config"], "vision": config["vision_config"]}
    towers["vision"] = {"attention_dropout": 0.0, **towers["vision"]}
    towers["text"] = {"attention_dropout": 0.0, **towers["text"]}
    structure, sizes = find_structure(towers), {"P": 256}
    assert find_grid(towers, sizes, (256, 256)) == (16, 16)
    with torch.device("meta"):
        model = IGCaptionerForConditionalGeneration(build_config(towers, structure, sizes, (16, 16)))
    names = [weight for placement in placements(structure) for weight in placement.weights]
    assert sorted(names) == sorted(model.state_dict())
    assert model.num_parameters() + 2 == 676_454_402  # and the two that a captioner does not use
    assert model.model.vision_model.num_parameters() == 328_237_056


# Forms


def save_orbax(folder, leaves, driver: str = "zarr", ocdbt: bool = True):
    """As Orbax writes a step: `default/`, names joined by dots, boxed parameters, and the optimizer's state beside."""
    import tensorstore

    path = folder / "default"
    path.mkdir(parents=True)
    (path / "_METADATA").write_text("{}")
    tree = {f"params.{name.replace('/', '.')}.value": leaf for name, leaf in leaves.items()}
    for name, leaf in {**tree, "opt_state.0.count": np.int32(7), "step": np.int32(9)}.items():
        kvstore = {"driver": "file", "path": f"{path}/" if ocdbt else f"{path}/{name}/"}
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/"}
        leaf = np.asarray(leaf)
        dtype = "bfloat16" if leaf.dtype == "V2" else leaf.dtype.name
        spec = {"driver": driver, "kvstore": kvstore}
        array = tensorstore.open(spec, create=True, dtype=getattr(tensorstore, dtype), shape=leaf.shape).result()
        array.write(leaf.view(tensorstore.bfloat16.numpy_dtype) if dtype == "bfloat16" else leaf).result()
    return folder


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbax_folders(tmp_path, driver, ocdbt):
    pytest.importorskip("tensorstore")
    config = make_config({"normalize_qk": True})
    leaves = random_leaves(config)
    save_orbax(tmp_path / "run" / "90", random_leaves(config, seed=5), driver, ocdbt)
    save_orbax(tmp_path / "run" / "1000", leaves, driver, ocdbt)
    file = write_config(tmp_path / "run", config)
    convert(save(tmp_path / "c.npz", leaves), tmp_path / "npz", config=file)
    report = convert(tmp_path / "run", tmp_path / "orbax")
    assert_same_weights(tmp_path / "npz", tmp_path / "orbax")
    assert any("2 leaves are not of this model" in note for note in report.notes)
    rounded = {name: to_bfloat16(leaf) for name, leaf in leaves.items()}
    convert(save_orbax(tmp_path / "b" / "1", rounded, driver, ocdbt), tmp_path / "orbax16", config=file)
    convert(save(tmp_path / "b.npz", rounded), tmp_path / "npz16", config=file)
    assert_same_weights(tmp_path / "npz16", tmp_path / "orbax16")
    data = [path for path in (tmp_path / "run" / "1000").rglob("*") if path.is_file() and path.name[0] != "_"]
    largest = max((path for path in data if path.suffix != ".json"), key=lambda path: path.stat().st_size)
    largest.unlink()
    with pytest.raises(ConversionError, match="truncated or damaged"):
        convert(tmp_path / "run", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_boxed_names_in_npz(tmp_path):
    config, leaves = write_config(tmp_path, make_config()), random_leaves(make_config())
    convert(save(tmp_path / "plain.npz", leaves), tmp_path / "plain", config=config)
    boxed = {f"{name}/value": leaf for name, leaf in leaves.items()}
    convert(save(tmp_path / "boxed.npz", boxed, "params/"), tmp_path / "boxed", config=config)
    assert_same_weights(tmp_path / "plain", tmp_path / "boxed")


def test_without_tensorstore_orbax_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "run" / "7" / "default").mkdir(parents=True)
    (tmp_path / "run" / "7" / "default" / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ConversionError, match="pip install tensorstore"):
        convert(tmp_path / "run", tmp_path / "out")


# What does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"is_decoder": False}}, "is_decoder is False"),
        ({"text": {"position_embedding_type": "sincos2d"}}, "supported: 'rotary', 'learnt'"),
        ({"text": {"mask_token_id": None}}, "does not say text_config.mask_token_id"),
        ({"text": {"vocab_size": 30}}, "vocab_size is 30 in the config, but 29 in the checkpoint"),
        ({"text": {"num_heads": 4}}, "text_config.num_heads is 4"),
        ({"text": {"num_layers": 4}}, r"is \(3, .*expected \(4, "),
        ({"vision": {"keep_registers": False}}, "keep_registers is False"),
        ({"vision": {"registers": 1}}, "registers is 1"),
        ({"vision": {"pool_type": "map"}}, "pool_type is 'map'"),
        ({"vision": {"patch_size": 2}}, "patch_size is 2"),
        ({"vision": {"position_embedding_shape": [2, 3]}}, "position_embedding_shape"),
        ({"block": {"activations": ["gelu", "gelu"]}}, "activations"),
        ({"block": {"activations": ["tanh", "linear"]}}, "'tanh'"),
        ({"block": {"ln_type": "postln"}}, "ln_type is 'postln'"),
        ({"block": {"ln_type": "preln"}}, "belong to no weight"),
        ({"block": {"normalize_qk": True}}, "are missing"),
        ({"block": {"use_bias": True}}, "are missing"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, changes, message):
    source = save(tmp_path / "c.npz", random_leaves(make_config()))
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", config=write_config(tmp_path, make_config(**changes)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "config.json"]


def test_leaves_that_do_not_fit(tmp_path):
    config, leaves = write_config(tmp_path, make_config()), random_leaves(make_config())

    def fails(message, changed, file=config):
        with pytest.raises(ConversionError, match=message):
            convert(save(tmp_path / "c.npz", changed), tmp_path / "out", config=file)

    fails("there is no config.json with", leaves, None)
    fails("not the leaves of a clip-jax CapPa", {"encoder/embedding/bias": np.ones(3, np.float32)})
    fails("no captioner", {k: v for k, v in leaves.items() if not k.startswith("text/logits")})
    fails("1 leaves are missing\n  text/logits/bias", {k: v for k, v in leaves.items() if k != "text/logits/bias"})
    fails("1 leaves belong to no weight\n  logit_scale", {**leaves, "logit_scale": np.ones(2, np.float32)})
    cut = {**leaves, "text/logits/bias": np.ones(28, np.float32)}
    fails(r"text/logits/bias is \(28,\), expected \(29\)", cut)
    spoiled = {**leaves, "text/logits/bias": np.full(29, np.nan, np.float32)}
    fails("29 values that are not finite", spoiled)
    (tmp_path / "other.json").write_text('{"model": {}}')
    fails("no configuration of clip-jax", leaves, tmp_path / "other.json")
    image = {"config": config, "image_size": (10, 8)}
    with pytest.raises(ConversionError, match="not made of patches of 4"):
        convert(save(tmp_path / "c.npz", leaves), tmp_path / "out", **image)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", ["truncated", "damaged", "doubled", "empty", "pickle", "object array", "torch", "array"]
)
def test_broken_files(tmp_path, kind):
    make, message = BROKEN_FILES[kind]
    make(tmp_path / "c.npz", random_leaves(make_config()))
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "c.npz", tmp_path / "out", config=write_config(tmp_path, make_config()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "config.json"]


def test_unknown_fields_are_noted(tmp_path):
    file = write_config(tmp_path, make_config(text={"novelty": 3}))
    assert "text_config.novelty" in read_config(file)[1]


# The tokenizer and the command


def write_tokenizer(folder, words=("<unk>", "<bos>", "<eos>", "<pad>", "<mask>", "a", "photo", "cat")):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def test_special_tokens_without_names_are_those_of_the_configuration(tmp_path):
    source, file = save(tmp_path / "c.npz", random_leaves(make_config())), write_config(tmp_path, make_config())
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").unlink()
    convert(source, tmp_path / "out", config=file, tokenizer=folder)
    tokenizer = load_processor(tmp_path / "out").tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<eos>", "<pad>", "<bos>")
    assert tokenizer("a cat")["input_ids"] == [5, 7, EOS]


def test_the_command_with_a_tokenizer(tmp_path, capsys):
    config, leaves = make_config(), random_leaves(make_config())
    source, file = save(tmp_path / "c.npz", leaves), write_config(tmp_path, config)
    arguments = ["--checkpoint", str(source), "--output_dir", str(tmp_path / "out"), "--config", str(file)]
    arguments += ["--tokenizer", str(write_tokenizer(tmp_path / "tokenizer"))]
    convert_clip_jax.main([*arguments, "--dry_run"])
    printed = capsys.readouterr().out
    assert "text/encoder/layers/mlp/wi_0/kernel (3, 16, 20) float32 -> model.decoder.layers.0.mlp.gate_proj" in printed
    assert not (tmp_path / "out").exists()
    convert_clip_jax.main(arguments)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "borisdayma/clip-jax" in card and "bos 1, eos 2, pad 3, mask 4" in card
    processor = load_processor(tmp_path / "out")
    encoded = processor(text=["a cat", "a photo"], padding="max_length", max_length=4)
    assert list(map(list, encoded["input_ids"])) == [[5, 7, EOS, PAD], [5, 6, EOS, PAD]]
    assert processor.tokenizer.model_max_length == 8 and processor.tokenizer.bos_token_id == BOS
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    ids = torch.tensor(list(encoded["input_ids"]))
    with torch.no_grad():
        scores = model.score(torch.zeros(1, 3, 8, 8), ids, prior_weight=0.0).caption_log_likelihood
        logits = model(input_ids=torch.tensor([[BOS, 5, 7]]), pixel_values=torch.zeros(1, 3, 8, 8)).logits
    by_hand = logits.log_softmax(-1)[0, range(3), [5, 7, EOS]].sum()
    torch.testing.assert_close(scores[0, 0], by_hand)


def test_tokenizers_that_do_not_fit(tmp_path):
    source, file = save(tmp_path / "c.npz", random_leaves(make_config())), write_config(tmp_path, make_config())
    words = ("<unk>", "<bos>", "<mask>", "<pad>", "<eos>", "a")
    with pytest.raises(ConversionError, match="eos_token_id is 2 in the config, but 4 in"):
        convert(source, tmp_path / "out", config=file, tokenizer=write_tokenizer(tmp_path / "one", words))
    words = ("<unk>", "<bos>", "<eos>", "<mask>", "<pad>", "a")
    with pytest.raises(ConversionError, match="pads with '<pad>', but token 3 is '<mask>'"):
        convert(source, tmp_path / "out", config=file, tokenizer=write_tokenizer(tmp_path / "two", words))
    words = ("<unk>", "<bos>", "<eos>", "<pad>", *map(str, range(30)))
    with pytest.raises(ConversionError, match="has 34 tokens, but the checkpoint 29"):
        convert(source, tmp_path / "out", config=file, tokenizer=write_tokenizer(tmp_path / "three", words))
