"""Checkpoints of big_vision in all their forms, converted, compared with a reference in numpy, and exported again."""

import contextlib
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from test_conversion_reference import (
    BIG_VISION,
    as_scan,
    from_bfloat16,
    needs_golden,
    random_leaves,
    random_reference,
    save,
    save_reference,
    to_bfloat16,
)

from conversion import command, convert_big_vision, export_big_vision, writing
from conversion.config_big_vision import Given, build_config, infer_model
from conversion.convert_big_vision import convert
from conversion.export_big_vision import export
from conversion.key_map_big_vision import find_sizes, find_structure, placements
from conversion.reading import ConversionError, Leaf, open_checkpoint
from ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification
from ig_captioner.checkpoint import load_model
from tiny import assert_clear_order


@pytest.fixture
def leaves():
    return random_leaves()


@pytest.fixture
def checkpoint(tmp_path, leaves):
    return save(tmp_path / "checkpoint.npz", leaves)


def weights(folder) -> dict[str, torch.Tensor]:
    """Of a folder, or of a model."""
    model = folder if isinstance(folder, torch.nn.Module) else None
    return (model or load_model(IGCaptionerForConditionalGeneration, folder)).state_dict()


def assert_same_weights(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


def with_training_state(leaves, prefix="params/"):
    """As trainers store it: optimizer leaves in their own dtypes, counters, and non-finite values among them."""
    state = {"opt/0/count": np.int32(7), "chrono/accum_train_time": np.float64(3.5), "extra/steps": np.int64(1)}
    state |= {f"opt/1/mu/{name}": np.full(leaf.shape, np.nan, np.float32) for name, leaf in leaves.items()}
    return {prefix + name: leaf for name, leaf in leaves.items()} | state


# Outputs


CONFIGS = {
    "cappa": {},
    "same_widths": {"width": 16, "heads": 2, "mlp": 36, "depth": 3},
    "decoder_bias": {"decoder_bias": True, "decoder_width": 32, "decoder_heads": 4},
    "cap": {"mask_row": False},
    "one_layer_each": {"depth": 1, "decoder_depth": 1},
    "more_than_ten_blocks": {"depth": 12, "decoder_depth": 11},
    "not_square": {"grid": (2, 3), "patch": (4, 2)},
    "square_patches_in_a_wide_image": {"grid": (1, 4)},
    "sincos": {"learned": False, "grid": (2, 3), "decoder_bias": True},
}


CASES = [(name, "loop") for name in CONFIGS] + [(name, "scan") for name in ("cappa", "more_than_ten_blocks", "sincos")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_outputs_equal_the_reference(tmp_path, name, layout):
    settings = CONFIGS[name]
    leaves = random_leaves(seed=len(name), **settings)
    patch, grid = settings.get("patch", (4, 4)), settings.get("grid", (2, 2))
    image_size = (patch[0] * grid[0], patch[1] * grid[1])
    reference = save_reference(tmp_path / "reference.npz", leaves, image_size, 9)
    source = save(tmp_path / "checkpoint.npz", as_scan(leaves) if layout == "scan" else leaves, "params/")
    config = None
    if name == "sincos":
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"posemb_type": "sincos2d", "seq_len": 9}))
    report = convert(source, tmp_path / "out", config=config, image_size=image_size, verify=reference, atol=1e-4)
    assert len(report.differences) == (4 if name == "cap" else 6)
    assert max(report.stored_differences.values()) < 2e-5
    export(tmp_path / "out", tmp_path / "again.npz", scan=layout == "scan")
    with np.load(source) as first, np.load(tmp_path / "again.npz", allow_pickle=False) as second:
        assert sorted(first) == sorted(second)
        assert all(np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


@needs_golden
@pytest.mark.parametrize("name", ["bv_A_ckpt", "bv_A_ckpt_bare", "bv_A_ckpt_scan"])
def test_reference_sets(tmp_path, name):
    arguments = {"config": BIG_VISION / "bv_A_config.json", "verify": BIG_VISION / "bv_A_ref.npz"}
    report = convert(BIG_VISION / f"{name}.npz", tmp_path / "out", **arguments)
    compared = {"logits_causal", "logits_causal_short", "logits_parallel", "logits_parallel_short", "class_scores"}
    assert compared <= report.stored_differences.keys() and max(report.stored_differences.values()) < 1e-4
    convert(BIG_VISION / "bv_A_ckpt.npz", tmp_path / "other")
    convert_again, first = weights(tmp_path / "out"), weights(tmp_path / "other")
    assert all(torch.equal(first[key], convert_again[key]) for key in first)


@needs_golden
@pytest.mark.parametrize(
    ("name", "number"), [("bv_vitb16_pretrain_params", 281), ("bv_vitb16_pretrain_scan_params", 40)]
)
def test_the_tree_of_the_full_model_is_understood(name, number):
    tree = json.loads((BIG_VISION / f"{name}.json").read_text())
    leaves = {key.removeprefix("params/"): Leaf(tuple(shape), "float32") for key, shape in tree.items()}
    structure = find_structure(leaves)
    sizes = find_sizes(leaves, placements(structure))
    config = build_config(infer_model(structure, sizes), sizes, Given(), eos_token_id=1)
    with torch.device("meta"):
        model = IGCaptionerForConditionalGeneration(config)
    assert len(leaves) == number and model.num_parameters() == 191_669_504
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.mask_token_id) == (224, 16, 32000)


@needs_golden
def test_a_wrong_weight_is_noticed_and_nothing_is_left(tmp_path):
    with np.load(BIG_VISION / "bv_A_ckpt_bare.npz") as file:
        leaves = dict(file)
    name = "decoder/EncDecBlock1/SelfAttn/query/kernel"
    leaves[name] = leaves[name].transpose(1, 2, 0).reshape(leaves[name].shape)  # a square kernel, turned
    source = save(tmp_path / "wrong.npz", leaves)
    with pytest.raises(ConversionError, match="differs from the reference by more than 0.0001: logits_causal"):
        convert(source, tmp_path / "out", verify=BIG_VISION / "bv_A_ref.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.npz"]


def test_generation_and_both_heads(tmp_path, leaves, checkpoint):
    convert(checkpoint, tmp_path / "out")
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    reference = random_reference(leaves, (8, 8), 9)
    images = torch.from_numpy(reference["images"]).permute(0, 3, 1, 2)
    generated = model.generate(pixel_values=images, do_sample=False)
    assert generated.shape[1] <= 9 and bool((generated[:, 0] == 0).all())
    logits = model(input_ids=generated, pixel_values=images).logits
    assert_clear_order(logits.topk(2).values)
    for row, predicted in zip(generated, logits.argmax(-1), strict=True):
        tokens = row.tolist()
        length = tokens.index(1) if 1 in tokens else len(tokens) - 1
        assert predicted[:length].tolist() == tokens[1 : length + 1]
    classifier = load_model(IGCaptionerForZeroShotImageClassification, tmp_path / "out")
    classes = torch.from_numpy(reference["class_labels"]).long()
    with torch.no_grad():
        ranked = classifier(pixel_values=images, input_ids=classes).logits_per_image
    assert np.abs(ranked.numpy() - reference["class_scores"]).max() < 1e-4


@pytest.mark.parametrize("size", [20, 29, 30, 40])
def test_a_model_with_another_vocabulary_loads_again(tmp_path, leaves, checkpoint, size):
    """The mask token, number 29, stands outside the vocabulary: it comes into a larger one, and a smaller has none."""
    convert(checkpoint, tmp_path / "out")
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    with pytest.warns(UserWarning, match="mask token 29 is cut off") if size < 30 else contextlib.nullcontext():
        model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "resized")
    assert_same_weights(tmp_path / "resized", model)
    assert model.config.mask_token_id == (29 if size > 29 else None) and model.config.text_config.vocab_size == size
    rows = torch.from_numpy(leaves["decoder/EmbedTargets/embedding"][:size])
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)


# Forms on disk


def test_all_npz_forms_give_the_same_weights(tmp_path, leaves, checkpoint):
    convert(checkpoint, tmp_path / "bare")
    forms = {
        "params": {f"params/{name}": leaf for name, leaf in leaves.items()},
        "training": with_training_state(leaves),
        "old_flax": {**with_training_state(leaves, "opt/target/"), "opt/state/step": np.int32(3)},
        "scan": with_training_state(as_scan(leaves)),
    }
    forms["old_flax"] = {name: leaf for name, leaf in forms["old_flax"].items() if not name.startswith("opt/1/")}
    for name, form in forms.items():
        convert(save(tmp_path / f"{name}.npz", form), tmp_path / name)
        assert_same_weights(tmp_path / "bare", tmp_path / name)
    np.savez_compressed(tmp_path / "compressed.npz", **leaves)
    convert(tmp_path / "compressed.npz", tmp_path / "compressed")
    assert_same_weights(tmp_path / "bare", tmp_path / "compressed")
    both = {f"params/a/b/{name}": leaf for name, leaf in leaves.items()} | {"params/other/scale": np.ones(3)}
    convert(f"{save(tmp_path / 'both.npz', both)}:a/b", tmp_path / "subtree")
    assert_same_weights(tmp_path / "bare", tmp_path / "subtree")


def test_bfloat16_leaves(tmp_path, leaves):
    rounded = {name: to_bfloat16(leaf) for name, leaf in leaves.items()}
    assert all(leaf.dtype == "V2" for leaf in rounded.values())
    source = save(tmp_path / "bf16.npz", with_training_state(rounded))
    plain = save(tmp_path / "plain.npz", {name: from_bfloat16(leaf) for name, leaf in rounded.items()})
    for dtype in ("float32", "bfloat16"):
        convert(source, tmp_path / dtype, dtype=dtype)
        convert(plain, tmp_path / f"plain_{dtype}", dtype=dtype)
        assert_same_weights(tmp_path / dtype, tmp_path / f"plain_{dtype}")
    export(tmp_path / "bfloat16", tmp_path / "again.npz")
    with np.load(tmp_path / "again.npz", allow_pickle=False) as file:
        assert all(file[f"params/{name}"].tobytes() == leaf.tobytes() for name, leaf in rounded.items())
        assert file["params/decoder/LayerNorm/bias"].dtype == "V2"


def save_tensorstore(path, leaves, driver="zarr"):
    tensorstore = pytest.importorskip("tensorstore")
    for name, leaf in leaves.items():
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": str(path / name.replace("/", "~"))}}
        bfloat16 = leaf.dtype == "V2"
        dtype = tensorstore.bfloat16 if bfloat16 else leaf.dtype
        array = tensorstore.open(spec, create=True, dtype=dtype, shape=leaf.shape).result()
        value = leaf.view(np.uint16).view(tensorstore.bfloat16.numpy_dtype) if bfloat16 else leaf
        array.write(value).result()
    return path


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_tensorstore_folders(tmp_path, leaves, checkpoint, driver):
    leaves = {name: leaf.astype(np.float32) for name, leaf in leaves.items()}
    folder = save_tensorstore(tmp_path / "work" / "checkpoint.bv-000000010-tmp", with_training_state(leaves), driver)
    convert(checkpoint, tmp_path / "npz")
    (tmp_path / "work" / "checkpoint.bv-LAST").write_text("000000010-tmp")
    for number, source in enumerate((folder, tmp_path / "work", tmp_path / "work" / "checkpoint.bv")):
        convert(source, tmp_path / f"ts{number}")
        assert_same_weights(tmp_path / "npz", tmp_path / f"ts{number}")
    rounded = {f"params/{name}": to_bfloat16(leaf) for name, leaf in as_scan(leaves).items()}
    convert(save_tensorstore(tmp_path / "bf16", rounded, driver), tmp_path / "ts_bf16")
    convert(save(tmp_path / "bf16.npz", rounded), tmp_path / "npz_bf16")
    assert_same_weights(tmp_path / "npz_bf16", tmp_path / "ts_bf16")
    chunk = next(file for file in (folder / "params~encoder~pos_embedding").rglob("*") if file.name[0] in "0c")
    if chunk.is_dir():
        chunk = next(file for file in chunk.rglob("*") if file.is_file())
    chunk.unlink()
    with pytest.raises(ConversionError, match="truncated or damaged"):
        convert(folder, tmp_path / "never")


def test_a_tensorstore_folder_is_planned_without_tensorstore(tmp_path, leaves, monkeypatch, capsys):
    for name, leaf in leaves.items():
        folder = tmp_path / "checkpoint.bv-000000001" / f"params/{name}".replace("/", "~")
        folder.mkdir(parents=True)
        (folder / ".zarray").write_text(json.dumps({"shape": leaf.shape, "dtype": "<f4", "zarr_format": 2}))
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    source = tmp_path / "checkpoint.bv-000000001"
    convert_big_vision.main(["--checkpoint", str(source), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "decoder/EncDecBlock2/MLP/Dense_1/kernel (36, 16) float32 -> model.decoder.layers.2.mlp.down_proj" in printed
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="pip install tensorstore"):
        convert(source, tmp_path / "out")


def test_sharded_equals_unsharded(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "one")
    convert(checkpoint, tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same_weights(tmp_path / "one", tmp_path / "many")


# The folder and the command


def test_the_command_writes_and_replaces_only_what_it_may(tmp_path, leaves, checkpoint, capsys, monkeypatch):
    reference = save_reference(tmp_path / "reference.npz", leaves, (8, 8), 9)
    arguments = ["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    convert_big_vision.main([*arguments, "--verify", str(reference), "--license", "mit", "--dtype", "bfloat16"])
    assert "logits_parallel_short: " in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    digest = open_checkpoint(checkpoint).sha256()
    assert digest in card and "in float32" in card and "mit" in card and "github.com/google-research" in card
    assert (tmp_path / "out" / "modeling_ig_captioner.py").is_file()
    with pytest.raises(SystemExit, match="--overwrite"):
        convert_big_vision.main(arguments)
    convert_big_vision.main([*arguments, "--overwrite"])
    assert weights(tmp_path / "out")["lm_head.weight"].dtype == torch.float32
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(SystemExit, match="not overwritten"):
        convert_big_vision.main([*arguments[:3], str(tmp_path / "mine"), "--overwrite"])
    pushed = []
    monkeypatch.setattr(command, "push", lambda folder, name: pushed.append((folder.name, name)))
    convert_big_vision.main([*arguments[:3], str(tmp_path / "pushed"), "--push_to_hub", "me/it"])
    assert pushed == [("pushed", "me/it")]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupted_conversion_leaves_the_old_folder(tmp_path, checkpoint, monkeypatch):
    convert(checkpoint, tmp_path / "out")
    before = weights(tmp_path / "out")

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_card", fail)
    other = save(tmp_path / "other.npz", random_leaves(seed=5))
    with pytest.raises(KeyboardInterrupt):
        convert(other, tmp_path / "out", overwrite=True)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path / "out").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.npz", "other.npz", "out"]


def test_weights_that_change_on_disk_are_noticed(tmp_path, checkpoint, monkeypatch):
    def load_other(model_class, folder):
        model = load_model(model_class, folder)
        model.lm_head.bias.data[3] += 1
        return model

    monkeypatch.setattr(writing, "load_model", load_other)
    with pytest.raises(ConversionError, match="1 weights change when saved and loaded, such as lm_head.bias"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Export


def test_export_writes_what_convert_reads(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "out")
    arguments = ["--model", str(tmp_path / "out"), "--output", str(tmp_path / "again.npz"), "--bare"]
    export_big_vision.main(arguments)
    with np.load(checkpoint) as first, np.load(tmp_path / "again.npz", allow_pickle=False) as second:
        assert sorted(first) == sorted(second) and all(np.array_equal(first[key], second[key]) for key in first)
    with pytest.raises(SystemExit, match="--overwrite"):
        export_big_vision.main(arguments)
    convert(tmp_path / "again.npz", tmp_path / "back", config=tmp_path / "again.json")
    assert_same_weights(tmp_path / "out", tmp_path / "back")
    assert zipfile.ZipFile(tmp_path / "again.npz").testzip() is None


def test_models_that_big_vision_cannot_hold(tmp_path):
    from tiny import tiny_model

    tiny_model("prefix").save_pretrained(tmp_path / "prefix")
    with pytest.raises(ConversionError, match="cannot hold this model:\n.*fusion is 'prefix', not 'cross_attention'"):
        export(tmp_path / "prefix", tmp_path / "out.npz")
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".*"))


def test_trained_decoder_positions_beside_fixed_encoder_positions(tmp_path):
    source = save(tmp_path / "fixed.npz", random_leaves(learned=False))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"posemb_type": "sincos2d", "seq_len": 9, "image_size": 8}))
    convert(source, tmp_path / "out", config=config)
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    model.model.decoder.embed_positions.weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ConversionError, match="big_vision fixes both or neither"):
        export(tmp_path / "tuned", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()
