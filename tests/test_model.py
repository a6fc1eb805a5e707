"""Mask semantics of the three modes, positions, the image encoder, tying, and what the configuration promises."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import pipeline

from ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerImageProcessor,
    IGCaptionerModel,
    IGCaptionerVisionModel,
)
from ig_captioner.encoder_ig_captioner import sincos_position_embedding
from tiny import BOS, EOS, MASK, VARIANTS, VOCAB, random_images, random_texts, tiny_config, tiny_model


LENGTH = 5
IDS = torch.tensor([[BOS, 11, 22, 33, 44]])


def influence(model, images: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """[L, L] bool: whether token j changes the logits at position i."""
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=images, **kwargs).logits[0]
        changed = []
        for j in range(LENGTH):
            other = IDS.clone()
            other[0, j] = 55
            changed.append((model(input_ids=other, pixel_values=images, **kwargs).logits[0] - expected).abs().amax(-1))
    return torch.stack(changed, dim=1) > 1e-6


def image_influence(model) -> torch.Tensor:
    """[patches, L] bool: whether a patch of the image changes the logits at position i."""
    images = random_images(1)
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=images).logits[0]
        rows = []
        for y, x in ((0, 0), (0, 8), (8, 0), (8, 8)):
            other = images.clone()
            other[..., y : y + 8, x : x + 8] += 1.0
            rows.append((model(input_ids=IDS, pixel_values=other).logits[0] - expected).abs().amax(-1) > 1e-6)
    return torch.stack(rows)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_causal_with_and_without_an_image(variant, attn):
    model = tiny_model(variant, attn=attn)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert torch.equal(influence(model), causal)
    assert torch.equal(influence(model, random_images(1)), causal)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_sees_every_patch(variant):
    assert image_influence(tiny_model(variant)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parallel_mode_reads_no_token_and_only_positions_and_the_image(variant):
    model = tiny_model(variant)
    assert not influence(model, random_images(1), parallel_prediction=True).any()
    with torch.no_grad():
        logits = model(input_ids=IDS, pixel_values=random_images(1), parallel_prediction=True).logits
        other = model(input_ids=IDS, pixel_values=random_images(2)[1:], parallel_prediction=True).logits
    assert (logits - other).abs().amax(-1).min() > 1e-4


def attention_maps(model, **kwargs) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(output_attentions=True, **kwargs).attentions


@pytest.mark.parametrize("text_only_layers", [0, 1])
def test_masks_cell_by_cell(text_only_layers):
    """Which keys a query may see, read off the prefix decoder's attention weights: [queries, patches + text]."""
    model = IGCaptionerForConditionalGeneration.from_config(
        tiny_config({"num_text_only_layers": text_only_layers}), attn_implementation="eager"
    ).eval()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    prefix = torch.cat([torch.ones(LENGTH, 4, dtype=torch.bool), causal], dim=1)
    everything = torch.ones(LENGTH, 4 + LENGTH, dtype=torch.bool)

    def check(maps, fused):
        for i, weights in enumerate(maps):
            expected = fused if i >= text_only_layers else fused[:, -LENGTH:]
            assert torch.equal(weights[0, 0] > 0, expected), f"layer {i}"

    check(attention_maps(model, input_ids=IDS, pixel_values=random_images(1)), prefix)
    check(attention_maps(model, input_ids=IDS, pixel_values=random_images(1), parallel_prediction=True), everything)
    for weights in attention_maps(model, input_ids=IDS):
        assert torch.equal(weights[0, 0] > 0, causal)


def test_padding_is_masked_in_causal_modes_and_seen_in_parallel_mode():
    model = tiny_model("prefix", attn="eager")
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    for weights in attention_maps(model, input_ids=IDS, pixel_values=random_images(1), attention_mask=mask):
        assert (weights[0, :, 2:, -LENGTH:-3] == 0).all()
    maps = attention_maps(
        model, input_ids=IDS, pixel_values=random_images(1), attention_mask=mask, parallel_prediction=True
    )
    assert all((weights > 0).all() for weights in maps)


def test_text_only_layers_never_see_the_image():
    model = tiny_model("prefix")
    with torch.no_grad():
        alone = model(input_ids=IDS, output_hidden_states=True).hidden_states
        seeing = model(input_ids=IDS, pixel_values=random_images(1), output_hidden_states=True).hidden_states
    assert torch.equal(alone[1], seeing[1])  # one text-only layer
    assert not torch.allclose(alone[2], seeing[2])


def naive_prefix_lm(model, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The prefix decoder as papers draw it: image and text in one sequence under one mask. Logits [1, L, V]."""
    decoder, config = model.model.decoder, model.config.text_config
    text = decoder.embed_tokens(input_ids) + decoder.embed_positions(torch.arange(input_ids.shape[1]))
    image = decoder.image_projection(model.model.vision_model(pixel_values).last_hidden_state)
    number = image.shape[1]
    for i, layer in enumerate(decoder.layers):
        if i == config.num_text_only_layers:
            text = torch.cat([image, text], dim=1)
        total, seen = text.shape[1], number if i >= config.num_text_only_layers else 0
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        allowed[:seen, :seen] = True
        x, attn = layer.self_attn_norm(text), layer.self_attn
        q, k, v = (p(x).view(1, total, 2, -1).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        text = text + attn.o_proj((weights @ v).transpose(1, 2).flatten(2))
        text = text + layer.mlp(layer.mlp_norm(text))
    return model.lm_head(decoder.norm(text[:, number:]))


@pytest.mark.parametrize("text_only_layers", [0, 1, 2])
def test_the_image_read_apart_equals_one_sequence_under_one_mask(text_only_layers):
    torch.manual_seed(0)
    model = IGCaptionerForConditionalGeneration(tiny_config({"num_text_only_layers": text_only_layers})).eval()
    with torch.no_grad():
        expected = naive_prefix_lm(model, random_images(1), IDS)
        logits = model(input_ids=IDS, pixel_values=random_images(1)).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_positions_matter_and_padding_on_the_left_does_not():
    for variant in VARIANTS:
        model = tiny_model(variant)
        ids = torch.tensor([[BOS, 11, 11, 11, 7]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            assert (logits[0, 1] - logits[0, 2]).abs().max() > 1e-4
            left = model(
                input_ids=torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
                attention_mask=torch.tensor([[0] * 3 + [1] * 5]),
            ).logits
        torch.testing.assert_close(left[:, 3:], logits, atol=1e-5, rtol=1e-5)


def test_mixed_parallel_and_causal_texts_in_training():
    """One pass over a batch of both kinds equals a pass per text."""
    model = tiny_model("prefix")
    labels = torch.tensor([[*random_texts((5,))[0]], [*random_texts((5, 5))[1]], [9, 8, 7, EOS, -100]])
    images = random_images(3)
    rows = torch.tensor([True, False, True])
    model._draw_parallel_rows = lambda *_: rows
    with torch.no_grad():
        mixed = model(pixel_values=images, labels=labels)
        parallel = model(input_ids=torch.full((3, 5), MASK), pixel_values=images, parallel_prediction=True).logits
        model._draw_parallel_rows = lambda *_: None
        causal = model(pixel_values=images, labels=labels)
    torch.testing.assert_close(mixed.logits[[0, 2]], parallel[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.logits[1], causal.logits[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.unconditional_loss, causal.unconditional_loss)
    targets = labels[[0, 2]].flatten()
    torch.testing.assert_close(
        mixed.parallel_loss, nn.functional.cross_entropy(parallel[[0, 2]].flatten(0, 1), targets)
    )
    both = nn.functional.cross_entropy(mixed.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(mixed.loss, 1.5 * both + 0.5 * mixed.unconditional_loss)


def test_parallel_texts_are_drawn_in_training_only():
    model = tiny_model("prefix", parallel_prediction_prob=0.5)
    labels, images = torch.randint(4, VOCAB, (64, 4)), random_images(64)
    with torch.no_grad():
        assert model(pixel_values=images, labels=labels).parallel_loss is None
        model.train()
        share = model._draw_parallel_rows(labels, False).float().mean()
        assert 0.2 < share < 0.8
        assert model(pixel_values=images, labels=labels).parallel_loss > 0


def test_input_ids_with_labels_are_the_text_itself():
    """As with causal language models: the same tokens twice, the prompt's labels -100."""
    model, images = tiny_model(), random_images(2)
    ids = torch.tensor([[11, 12, 13, EOS], [21, 22, 23, EOS]])
    with torch.no_grad():
        expected = model(pixel_values=images, labels=ids)
        assert torch.equal(model(pixel_values=images, input_ids=ids, labels=ids).logits, expected.logits)
        prompt = ids.clone()
        prompt[:, :2] = -100
        output = model(pixel_values=images, input_ids=ids, labels=prompt)
    assert torch.equal(output.logits, expected.logits)
    by_hand = nn.functional.cross_entropy(expected.logits[:, 2:].flatten(0, 1), ids[:, 2:].flatten())
    torch.testing.assert_close(output.captioning_loss, by_hand)
    with pytest.raises(ValueError, match=r"labels \(2, 3\) differ in shape from input_ids \(2, 4\)"):
        model(pixel_values=images, input_ids=ids, labels=prompt[:, 1:])


@pytest.mark.parametrize("name", ["inputs_embeds", "image_key_values", "position_ids", "cache"])
def test_arguments_without_a_meaning_beside_labels_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot be combined with labels"):
        tiny_model()(labels=torch.tensor([[11, EOS]]), **{name: torch.zeros(1)})


def test_losses_say_whether_trainer_may_leave_the_division_to_them():
    """Trainer multiplies the gradient by the accumulation steps where this is wrong."""
    assert tiny_model().accepts_loss_kwargs
    assert not tiny_model(loss_reduction="sequence").accepts_loss_kwargs
    assert IGCaptionerForZeroShotImageClassification(tiny_config()).accepts_loss_kwargs


def test_without_an_image_the_loss_is_unconditional():
    model, labels = tiny_model(), torch.tensor([[11, 12, EOS]])
    with torch.no_grad():
        alone, both = model(labels=labels), model(pixel_values=random_images(1), labels=labels)
    assert alone.captioning_loss is None
    torch.testing.assert_close(alone.unconditional_loss, both.unconditional_loss)


def test_images_and_texts_must_be_as_many():
    with pytest.raises(ValueError, match="3 images for 1 texts"):
        tiny_model()(input_ids=IDS, pixel_values=random_images(3))


def test_tying():
    tied, untied = tiny_model("prefix"), tiny_model("cross")
    assert tied.lm_head.weight is tied.model.decoder.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.decoder.embed_tokens.weight
    assert "lm_head.bias" in dict(untied.named_parameters())


def test_a_mask_token_outside_the_vocabulary_has_an_embedding_and_no_logit():
    config = tiny_config({**VARIANTS["cross"], "mask_token_id": VOCAB}, tie_word_embeddings=False)
    model = IGCaptionerForConditionalGeneration(config).eval()
    assert model.model.decoder.embed_tokens.num_embeddings == VOCAB + 1
    assert model(input_ids=IDS, pixel_values=random_images(1), parallel_prediction=True).logits.shape[-1] == VOCAB


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_implementations_agree(variant, attn):
    expected, other = tiny_model(variant, attn="eager"), tiny_model(variant, attn=attn)
    labels = torch.tensor([[11, 12, 13, EOS], [21, EOS, -100, -100]])
    with torch.no_grad():
        torch.testing.assert_close(
            other(pixel_values=random_images(2), labels=labels).logits,
            expected(pixel_values=random_images(2), labels=labels).logits,
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(variant, use_reentrant):
    model = tiny_model(variant, parallel_prediction_prob=0.5).train()
    labels, images = torch.tensor([[11, 12, 13, EOS], [21, EOS, -100, -100]]), random_images(2)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(pixel_values=images, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


# The image encoder


def test_positions_are_resampled_when_the_image_size_changes():
    model = IGCaptionerVisionModel(tiny_config().vision_config).eval()
    assert model(random_images(2)).last_hidden_state.shape == (2, 4, 16)
    assert model(random_images(2, 24, 40)).last_hidden_state.shape == (2, 15, 16)
    table = torch.arange(4.0)[:, None].expand(4, 16)  # a ramp stays a ramp between its corners
    model.embeddings.position_embedding.data = table.clone()
    resampled = model.embeddings.positions((3, 3))[:, 0].view(3, 3)
    torch.testing.assert_close(resampled, torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]))


def test_non_square_images_and_patches():
    config = tiny_config(vision={"image_size": [16, 24], "patch_size": [4, 8], "num_channels": 1})
    vision = IGCaptionerVisionModel(config.vision_config).eval()
    assert config.vision_config.grid_size == (4, 3)
    assert vision(torch.randn(2, 1, 16, 24)).last_hidden_state.shape == (2, 12, 16)
    wide, tall = torch.zeros(1, 1, 16, 24), torch.zeros(1, 1, 16, 24)
    wide[..., :4, 8:16], tall[..., 4:8, :8] = 1, 1  # patch 1, and patch 3 of row-by-row order
    base = vision.embeddings(torch.zeros(1, 1, 16, 24))
    changed = [(vision.embeddings(x) - base).abs().sum(-1).nonzero()[:, 1].tolist() for x in (wide, tall)]
    assert changed == [[1], [3]]


def test_sincos_positions_by_hand():
    table = sincos_position_embedding((2, 3), 8, torch.device("cpu"))
    assert table.shape == (6, 8)
    for row, (y, x) in enumerate((y, x) for y in range(2) for x in range(3)):
        omega = torch.tensor([1.0, 1e-4])
        expected = torch.cat([(x * omega).sin(), (x * omega).cos(), (y * omega).sin(), (y * omega).cos()])
        torch.testing.assert_close(table[row], expected)
    model = IGCaptionerVisionModel(tiny_config(vision={"position_embedding": "sincos2d"}).vision_config)
    assert not any("position" in name for name in model.state_dict())
    assert model(random_images(1, 8, 24)).last_hidden_state.shape == (1, 3, 16)


def test_factorized_positions_are_a_row_and_a_column():
    config = tiny_config(vision={"position_embedding": "factorized", "image_size": [16, 24]}).vision_config
    embeddings = IGCaptionerVisionModel(config).embeddings
    height, width = embeddings.position_embedding_height, embeddings.position_embedding_width
    assert (height.shape, width.shape) == ((2, 16), (3, 16)) and "position_embedding" not in embeddings._parameters
    torch.testing.assert_close(embeddings.positions((2, 3))[5], height[1] + width[2])
    resampled = embeddings.positions((3, 5)).view(3, 5, 16)
    torch.testing.assert_close(resampled[2, 4], height[1] + width[2])
    torch.testing.assert_close(resampled[1, 1], height.mean(0) + (width[0] + width[1]) / 2)


def test_registers_are_read_but_not_pooled():
    config = tiny_config(vision={"num_register_tokens": 3}).vision_config
    output = IGCaptionerVisionModel(config).eval()(random_images(2))
    assert output.last_hidden_state.shape == (2, 7, 16)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, :4].mean(dim=1))


# The configuration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": {"num_text_only_layers": 3}}, "got 3"),
        ({"text": {"num_text_only_layers": -1}}, "got -1"),
        ({"text": {"fusion": "early"}}, "early"),
        ({"text": {"hidden_size": 25}}, "25"),
        ({"text": {"eos_token_id": VOCAB}}, f"eos_token_id {VOCAB}"),
        ({"text": {"bos_token_id": None}}, "start token"),
        ({"text": {"mask_token_id": VOCAB}, "tie_word_embeddings": True}, "mask_token_id"),
        ({"text": {"mask_token_id": None}, "parallel_prediction_prob": 0.5}, "mask_token_id"),
        ({"text": {"encoder_hidden_size": 8}}, "8 differs"),
        ({"text": {"vocab_size": "many"}}, "vocab_size"),
        ({"vision": {"image_size": 20}}, "20"),
        ({"vision": {"image_size": [16, 16, 3]}}, "image_size"),
        ({"vision": {"patch_size": 0}}, "patch_size"),
        ({"vision": {"num_register_tokens": -2}}, "-2"),
        ({"vision": {"position_embedding": "sincos2d", "hidden_size": 6}}, "6"),
        ({"vision": {"norm_scale": False}}, "norm_scale=False needs norm_bias=False"),
        ({"text": {"norm_scale": False}}, "norm_scale=False needs norm_bias=False"),
        ({"text": {"position_embedding": "factorized"}}, "factorized"),
        ({"parallel_prediction_prob": 1.5}, "1.5"),
        ({"unconditional_weight": -1.0}, "-1.0"),
        ({"loss_reduction": "max"}, "max"),
        ({"prior_weight": float("nan")}, "prior_weight.*nan"),
        ({"text": {"hidden_act": "swish2"}}, "swish2"),
        ({"text": {"dropout": 1.5}}, "dropout.*1.5"),
        ({"text": {"max_position_embeddings": 0}}, "max_position_embeddings.*0"),
        ({"vision": {"num_attention_heads": 0}}, "num_attention_heads.*0"),
        ({"vision": {"norm_eps": -1.0}}, "norm_eps.*-1"),
    ],
)
def test_wrong_configurations_are_named(arguments, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**arguments)


def test_sub_configurations_are_of_their_kind_and_not_changed():
    config = tiny_config()
    text = type(config.text_config)(hidden_size=24, num_attention_heads=2)
    assert IGCaptionerConfig(text_config=text).text_config.encoder_hidden_size == 768
    assert text.encoder_hidden_size is None
    with pytest.raises(ValueError, match="of type .ig_captioner_text_model.: AutoModel knows no such model"):
        IGCaptionerConfig(vision_config=text)
    with pytest.raises(TypeError, match="'large'"):
        IGCaptionerConfig(vision_config="large")


def test_special_tokens_have_one_source_of_truth(tmp_path):
    config = tiny_config()
    config.eos_token_id = 9
    assert config.text_config.eos_token_id == 9
    config.save_pretrained(tmp_path)
    assert IGCaptionerConfig.from_pretrained(tmp_path).eos_token_id == 9
    assert '"eos_token_id"' not in (tmp_path / "config.json").read_text().split('"text_config"')[0]


# Saving


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_load_each_others_weights(variant, tmp_path):
    captioner = tiny_model(variant)
    captioner.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    classifier, info = IGCaptionerForZeroShotImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, ids = random_images(2), torch.tensor(random_texts((4, 4)))
    with torch.no_grad():
        expected, scores = captioner.score(images, ids), classifier.eval().score(images, ids)
    assert torch.equal(scores.information_gain, expected.information_gain)
    base = IGCaptionerModel.from_pretrained(tmp_path)
    assert torch.equal(base.decoder.norm.weight, captioner.model.decoder.norm.weight)


@pytest.mark.parametrize("saved_class", [IGCaptionerForConditionalGeneration, IGCaptionerModel])
def test_the_encoder_loads_from_a_whole_captioner(saved_class, tmp_path):
    whole = tiny_model(model_class=saved_class)
    whole.save_pretrained(tmp_path / "whole")
    encoder, info = IGCaptionerVisionModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    encoder.save_pretrained(tmp_path / "encoder")
    again = IGCaptionerVisionModel.from_pretrained(tmp_path / "encoder")
    expected = getattr(whole, "model", whole).vision_model
    for model in (encoder, again):
        assert torch.equal(model(random_images(1)).pooler_output, expected(random_images(1)).pooler_output)


def test_image_features_under_the_names_of_other_models(tmp_path):
    """`get_image_features` of all classes, and transformers' pipeline for features: the encoder's tokens and mean."""
    model, images = tiny_model(), random_images(2)
    with torch.no_grad():
        expected = model.model.vision_model(pixel_values=images)
        for found in (
            model.get_image_features(images),
            model.model.get_image_features(images),
            model.model(None, images),
        ):
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
            assert torch.equal(found.pooler_output, expected.last_hidden_state.mean(dim=1))
        as_tuple = model.get_image_features(images, return_dict=False)
        assert torch.equal(as_tuple[1], expected.pooler_output)
    with pytest.raises(ValueError, match="neither labels nor input_ids"):
        model(pixel_values=images)
    model.save_pretrained(tmp_path)
    IGCaptionerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    photo = Image.linear_gradient("L").convert("RGB")
    pixels = extract.image_processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.model.vision_model(pixel_values=pixels)
    assert torch.allclose(torch.tensor(extract(photo)), expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(torch.tensor(extract(photo, pool=True)), expected.pooler_output, atol=1e-5)
