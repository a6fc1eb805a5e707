"""Encoders of transformers in the captioner: which are taken, what comes out, which tokens the decoder reads."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_encoders import CONVOLUTIONAL, ENCODERS, FIVE_TOKENS, SMALL_VIT, encoder_config, encoder_model, images_for
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    TimmWrapperConfig,
    VideoMAEConfig,
    ViTMAEConfig,
)

from ig_captioner import IGCaptionerConfig, IGCaptionerVisionConfig
from ig_captioner.compiled_labels import is_intercepted
from ig_captioner.vision_ig_captioner import as_map, find_layout
from tiny import padded, random_images, random_texts, tiny_model


# Configuration


def test_our_encoder_is_the_default():
    assert IGCaptionerConfig().has_own_encoder
    assert IGCaptionerConfig(vision_config={"hidden_size": 192}).vision_config.hidden_size == 192
    assert isinstance(
        IGCaptionerConfig(vision_config={"model_type": "ig_captioner_vision_model"}).vision_config,
        IGCaptionerVisionConfig,
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_width_and_grid_are_found(name):
    vision, (width, rows, columns, leading) = ENCODERS[name]
    config = encoder_config(name)
    layout = config.image_layout
    assert (layout.width, layout.rows, layout.columns, layout.leading) == (width, rows, columns, leading)
    assert config.text_config.encoder_hidden_size == width
    assert config.num_image_tokens == leading + rows * columns
    same = IGCaptionerConfig(vision_config=vision.to_dict(), text_config=config.text_config)
    assert type(same.vision_config) is type(vision)
    assert same.image_size == config.image_size


def test_composite_configurations_give_their_vision_part():
    for composite in (CLIPConfig, SiglipConfig):
        config = IGCaptionerConfig(vision_config=composite(vision_config=SMALL_VIT))
        assert config.vision_config.model_type == composite.model_type + "_vision_model"
        assert config.vision_config.hidden_size == 16


def test_the_given_configuration_is_not_changed():
    vision = ViTMAEConfig(**SMALL_VIT)
    assert IGCaptionerConfig(vision_config=vision).vision_config.mask_ratio == 0
    assert vision.mask_ratio == 0.75


def test_an_encoder_without_an_image_size_gets_224_pixels():
    assert IGCaptionerConfig(vision_config=ResNetConfig(depths=[1], hidden_sizes=[8])).image_size == (224, 224)


@pytest.mark.parametrize(
    "vision, reason",
    [
        (Siglip2VisionConfig(), "needs pixel_attention_mask, spatial_shapes beside pixel_values .as NaFlex"),
        (VideoMAEConfig(), "takes videos"),
        (BertConfig(), "does not take pixel_values"),
        ({"model_type": "no_such_model"}, "no model of type 'no_such_model'"),
    ],
)
def test_unsuitable_encoders_are_refused_with_the_reason(vision, reason):
    with pytest.raises(ValueError, match=reason):
        IGCaptionerConfig(vision_config=vision)


def test_timm_without_timm_is_refused_with_the_reason():
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="timm"):
            IGCaptionerConfig(vision_config=TimmWrapperConfig())
    else:
        pytest.skip("timm is installed")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_token_grids": []}, "image_token_grids must be None or positive"),
        ({"image_token_grids": [0]}, "image_token_grids must be None or positive"),
        (
            {"image_position_embedding": "sincos2d", "vision_config": {"hidden_size": 18, "num_attention_heads": 2}},
            "a multiple of 4",
        ),
    ],
)
def test_wrong_fields_of_image_tokens(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        IGCaptionerConfig(**fields)


# What the encoder returns


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_those_of_transformers(name):
    """The encoder is transformers' own, with its parameter names, in the order of the patches."""
    model = encoder_model(name)
    stock = AutoModel.from_config(model.config.vision_config).eval()
    weights = model.model.vision_model.state_dict()
    left = stock.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and all("pooler" in key or key.startswith("head.") for key in left.missing_keys)
    pixels = images_for(model)
    noise = {"noise": torch.arange(16.0).expand(3, -1)} if name == "vit_mae" else {}
    with torch.no_grad():
        expected = stock(pixel_values=pixels, **noise).last_hidden_state
        found = model.model.encode_features(pixels)
    if expected.ndim == 4:
        expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_masked_autoencoder_masks_and_shuffles_nothing():
    model = encoder_model("vit_mae")
    pixels = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model.model.encode_features(pixels), model.model.encode_features(pixels))


@pytest.mark.parametrize("name", ("siglip2", "vit_mae", "resnet", "dinov2"))
def test_other_image_sizes(name):
    model = encoder_model(name, image_token_grids=[2, 1])
    with torch.no_grad():
        assert model.model.encode_features(torch.randn(2, 3, 48, 32)).shape == (2, 5, model.model.image_tokens.width)


@pytest.mark.parametrize("name", ENCODERS)
def test_convolutions_run_channels_last(name):
    model, seen = encoder_model(name), []
    model.model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"].is_contiguous()), with_kwargs=True
    )
    with torch.no_grad():
        model.model.encode_features(images_for(model))
    assert seen == [name not in CONVOLUTIONAL]


# Image tokens


@pytest.mark.parametrize("name", ("convnext", "dinov2", "siglip2"))
def test_grids_are_means_over_cells(name):
    model = encoder_model(name, image_token_grids=[2, 1])
    plain = encoder_model(name)
    pixels = images_for(model)
    with torch.no_grad():
        tokens = plain.model.encode_features(pixels)
        found = model.model.encode_features(pixels)
    leading = ENCODERS[name][1][3]
    patches = tokens[:, leading:].unflatten(1, (4, 4))
    quarters = [patches[:, y : y + 2, x : x + 2].mean(dim=(1, 2)) for y in (0, 2) for x in (0, 2)]
    expected = torch.stack([*quarters, patches.mean(dim=(1, 2))], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.model.pooled_features(pixels), expected[:, 4], atol=1e-5, rtol=1e-5)


def test_registers_of_our_encoder_are_no_patches():
    model = tiny_model(vision={"num_register_tokens": 2}, image_token_grids=[1])
    images = random_images()
    with torch.no_grad():
        features = model.model.encode_features(images)
        expected = model.model.vision_model(images)
    torch.testing.assert_close(features[:, 0], expected.pooler_output)
    torch.testing.assert_close(model.model.pooled_features(images), expected.pooler_output)


def test_rows_and_columns_are_kept_apart():
    """Of 6 x 4 cells, one of which is marked."""
    tokens = torch.zeros(1, 25, 2)
    tokens[0, 1 + 4 * 4 + 3] = 1.0
    layout = find_layout(tokens, (48, 32), ViTMAEConfig(**SMALL_VIT))
    assert (layout.leading, layout.rows, layout.columns) == (1, 6, 4)
    assert as_map(tokens, layout)[0, 0].nonzero().tolist() == [[4, 3]]


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="35 tokens .* no grid of patches"):
        find_layout(torch.zeros(1, 35, 2), (8, 8), ResNetConfig())


def test_norm_and_positions_come_after_the_features():
    model = encoder_model("convnext", **FIVE_TOKENS)
    with torch.no_grad():
        features = model.model.encode_features(images_for(model))
        tokens = model.model.read_features(None, features)
    positions = model.model.image_tokens.positions(torch.device("cpu"))
    torch.testing.assert_close(tokens, F.layer_norm(features, (16,), eps=1e-6) + positions)
    assert len({tuple(row) for row in positions.tolist()}) == 5


def test_fixed_positions_without_grids_leave_class_tokens_alone():
    model = encoder_model("dinov2", image_position_embedding="sincos2d")
    positions = model.model.image_tokens.positions(torch.device("cpu"))
    assert positions.shape == (19, 16)
    assert not positions[:3].any()
    own = tiny_model(vision={"position_embedding": "sincos2d"}).model.vision_model.embeddings
    torch.testing.assert_close(positions[3:], own.positions((4, 4)))


def test_learned_positions_are_one_per_token():
    model = encoder_model("convnext", image_token_grids=[2, 1], image_position_embedding="learned")
    assert model.model.image_tokens.position_embedding.shape == (5, 16)
    with pytest.raises(ValueError, match="4 tokens of an image, but positions of 5"):
        model.model.read_features(None, torch.zeros(1, 4, 16))


# Features in place of pixels


@pytest.mark.parametrize("name", ENCODERS)
def test_kept_features_give_what_pixels_give(name):
    model = encoder_model(name, **FIVE_TOKENS)
    pixels, (ids, mask) = images_for(model), padded(random_texts((5, 2, 7)))
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        features = model.model.encode_features(pixels)
        same = {"pixel_values": pixels}, {"pixel_values": None, "image_features": features}
        scores = [model.score(input_ids=ids, attention_mask=mask, **images).information_gain for images in same]
        losses = [model(labels=labels, **images).loss for images in same]
        logits = [model(input_ids=ids, **images).logits for images in same]
        texts = [model.generate(max_new_tokens=4, do_sample=False, **images) for images in same]
    for first, second in (scores, losses, logits, texts):
        torch.testing.assert_close(first, second)


def test_pixels_and_features_together_are_refused():
    model = encoder_model("resnet")
    ids, mask = padded(random_texts())
    pixels = images_for(model)
    for images in ({"pixel_values": None}, {"pixel_values": pixels, "image_features": torch.zeros(3, 16, 16)}):
        with pytest.raises(ValueError, match="exactly one of pixel_values and image_features"):
            model.score(input_ids=ids, attention_mask=mask, **images)
    with pytest.raises(ValueError, match=r"image features must be \[B, P, 16\], got \(3, 16, 8\)"):
        model.score(None, ids, mask, image_features=torch.zeros(3, 16, 8))


# Frozen encoders


@pytest.mark.parametrize("name", ("resnet", "efficientnet"))
def test_batch_norms_of_a_frozen_encoder_stay_in_evaluation_mode(name):
    model = encoder_model(name)
    model.model.vision_model.requires_grad_(False)
    pixels, (ids, mask) = images_for(model), padded(random_texts((5, 2, 7)))
    before = {key: value.clone() for key, value in model.model.vision_model.state_dict().items()}
    with torch.no_grad():
        expected = model.model.encode_features(pixels)
    model.train()
    assert model.training and model.model.decoder.training and not model.model.vision_model.training
    model(pixel_values=pixels, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    torch.testing.assert_close(model.model.encode_features(pixels), expected)
    for key, value in model.model.vision_model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_only_the_frozen_batch_norms_of_a_trained_encoder_do():
    model = encoder_model("resnet")
    norms = [module for module in model.model.vision_model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    norms[0].requires_grad_(False)
    model.train()
    assert [norm.training for norm in norms] == [False] + [True] * (len(norms) - 1)
    model.eval()
    assert not any(norm.training for norm in norms)


def test_an_encoder_of_transformers_is_no_adapter():
    """Its class has a method `disable_adapters`, as peft's layers do, which are a reason to keep nothing of texts."""
    assert not any(is_intercepted(module) for module in encoder_model("siglip2").modules())
