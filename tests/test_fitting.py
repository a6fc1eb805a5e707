"""Checkpoints whose configuration does not fit their weights, or that name other models: one clear error, at once."""

import json

import pytest
from small_checkpoint import save_checkpoint

from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.checkpoint import folder_or_repository, load_model
from ig_captioner.fitting import read_shapes


@pytest.fixture
def folder(tmp_path):
    return save_checkpoint(tmp_path / "tiny")


def change(folder, path: str, value) -> None:
    """Sets one field of config.json."""
    config = json.loads((folder / "config.json").read_text())
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    (folder / "config.json").write_text(json.dumps(config))


FITTING = {
    "text_config.vocab_size": (
        4000,
        r"embed_tokens.weight is \d+ x 16 in the weights and 4000 x 16 by the .*\(text_config.vocab_size 4000",
    ),
    "text_config.num_hidden_layers": (
        5,
        r"model.decoder.layers are 2 in the weights and 5 by the .*text_config.num_hidden_layers 5",
    ),
    "vision_config.num_hidden_layers": (1, r"vision_model.layers are 2 in the weights and 1 by the configuration"),
    "text_config.max_position_embeddings": (13, r"embed_positions.weight is 12 x 16 .* 13 x 16 .*max_position_emb"),
    "vision_config.intermediate_size": (
        48,
        r"is 32 x 16 in the weights and 48 x 16 .*vision_config.intermediate_size 48",
    ),
}


@pytest.mark.parametrize("field", FITTING)
def test_fields_and_shapes_are_named(folder, field):
    value, message = FITTING[field]
    change(folder, field, value)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(IGCaptionerForConditionalGeneration, folder)
    assert f"the weights of {folder} do not fit its configuration" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_config.num_hidden_layers", 200_000),
        ("vision_config.num_hidden_layers", 200_000),
        ("num_labels", 10**8),
        ("text_config.num_labels", 10**8),
        ("text_config.hidden_size", 10**12),
        ("text_config.vocab_size", 10**9),
        ("text_config.intermediate_size", 10**9),
        ("vision_config.image_size", [10**6, 10**6]),
        ("num_reference_images", 10**9),
    ],
)
def test_absurd_sizes_are_refused_before_anything_of_that_size_is_made(folder, field, value, monkeypatch):
    change(folder, field, value)
    loaded = []
    monkeypatch.setattr(IGCaptionerForConditionalGeneration, "from_pretrained", lambda *args, **_: loaded.append(args))
    with pytest.raises(ValueError, match=field.rpartition(".")[2]):
        load_model(IGCaptionerForConditionalGeneration, folder)
    assert not loaded


def test_what_fits_is_loaded(folder):
    shapes = read_shapes(folder)
    model = load_model(IGCaptionerForConditionalGeneration, folder)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items() if name in shapes} == shapes
    (folder / "model.safetensors").write_bytes(b"no header")
    assert read_shapes(folder) is None


def test_an_adapter_does_not_redirect_the_load(folder, tmp_path):
    other = save_checkpoint(tmp_path / "other")
    described = {"base_model_name_or_path": str(other), "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"tiny holds an adapter \(adapter_config.json\): merge it"):
        load_model(IGCaptionerForConditionalGeneration, folder)


def test_misspelt_folders_are_named_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "final").mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    for name, message in (
        ("my-modle", "no such model folder: 'my-modle'; did you mean 'my-model'?"),
        ("runs/finale", "no such model folder: 'runs/finale'; did you mean 'runs/final'?"),
        ("nothing-like-it", "no such model folder: 'nothing-like-it', and a repository of the Hub is named owner/name"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            folder_or_repository(name)
        assert str(caught.value) == message
