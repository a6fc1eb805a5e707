"""`model.score` against a slow per-pair loop, and everything that must not change a score."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload

from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    scoring_ig_captioner,
)
from tiny import (
    BOS,
    EOS,
    VARIANTS,
    naive_log_likelihoods,
    naive_scores,
    padded,
    random_images,
    random_texts,
    tiny_config,
    tiny_model,
)


HEADS = [IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification]
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_score_is_the_sum_of_token_log_likelihoods(variant, attn):
    model, images, texts = tiny_model(variant, attn=attn), random_images(), random_texts()
    scores = model.score(images, *padded(texts), prior_weight=0.7)
    likelihood, prior = naive_scores(model, images, texts), naive_scores(model, None, texts)
    torch.testing.assert_close(scores.caption_log_likelihood, likelihood, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.prior_log_likelihood, prior, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.information_gain, likelihood - 0.7 * prior, atol=1e-4, rtol=0)
    # the test means something: the images matter, and the prior is not small
    assert (likelihood[0] - likelihood[1]).abs().min() > 1e-3
    assert prior.abs().min() > 1


def test_mean_reduction_divides_by_the_number_of_tokens():
    model, images, texts = tiny_model(), random_images(), random_texts()
    lengths = torch.tensor([len(text) for text in texts])
    total, mean = model.score(images, *padded(texts)), model.score(images, *padded(texts), reduction="mean")
    torch.testing.assert_close(mean.caption_log_likelihood, total.caption_log_likelihood / lengths)
    torch.testing.assert_close(mean.prior_log_likelihood, total.prior_log_likelihood / lengths)
    torch.testing.assert_close(mean.information_gain, total.information_gain / lengths)


def test_prior_weight_comes_from_the_config_unless_given():
    model, images, texts = tiny_model(prior_weight=0.25), random_images(), padded(random_texts())
    scores = model.score(images, *texts)
    expected = scores.caption_log_likelihood - 0.25 * scores.prior_log_likelihood
    torch.testing.assert_close(scores.information_gain, expected)
    torch.testing.assert_close(
        model.score(images, *texts, prior_weight=0).information_gain, scores.caption_log_likelihood
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_order_batch_and_chunks_change_nothing(variant):
    model, images, texts = tiny_model(variant), random_images(), random_texts()
    expected = model.score(images, *padded(texts))

    def check(scores, columns=slice(None), rows=slice(None)):
        for name in ("caption_log_likelihood", "information_gain"):
            torch.testing.assert_close(scores[name], expected[name][rows][:, columns], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            scores.prior_log_likelihood, expected.prior_log_likelihood[columns], atol=1e-5, rtol=1e-5
        )

    check(model.score(images, *padded(texts, length=12)))
    check(model.score(images, *padded(texts, length=9, side="left")))
    check(model.score(images, padded(texts)[0]))  # the mask is found from the padding
    for chunk_size in (1, 2, 7, 1000):
        check(model.score(images, *padded(texts), chunk_size=chunk_size))
    order = [3, 0, 4, 2, 1]
    check(model.score(images, *padded([texts[i] for i in order])), columns=order)
    check(model.score(images, *padded([texts[1], texts[1]])), columns=[1, 1])
    check(model.score(images[1:2], *padded(texts)), rows=slice(1, 2))
    for i, text in enumerate(texts):
        check(model.score(images, torch.tensor([text])), columns=[i])


@pytest.mark.parametrize("head", HEADS)
def test_the_prior_never_sees_the_pixels(head):
    model, texts = tiny_model(model_class=head), padded(random_texts())
    for images in (random_images(), torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), float("nan"))):
        prior = model.score(images, *texts).prior_log_likelihood
        assert torch.equal(prior, model.score(random_images(1), *texts).prior_log_likelihood)


def test_heads_agree_and_logits_are_the_information_gain():
    captioner, classifier = tiny_model(), tiny_model(model_class=HEADS[1])
    images, texts = random_images(), padded(random_texts())
    expected = captioner.score(images, *texts)
    output = classifier(pixel_values=images, input_ids=texts[0], attention_mask=texts[1])
    assert torch.equal(output.logits_per_image, expected.information_gain)
    assert torch.equal(output.logits_per_text, expected.information_gain.T)
    labels = torch.tensor([0, 1, 4])
    loss = classifier(pixel_values=images, input_ids=texts[0], attention_mask=texts[1], labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected.information_gain, labels))


def test_the_classifier_passes_on_what_score_takes_and_refuses_the_rest():
    model, images, texts = tiny_model(model_class=HEADS[1]), random_images(), padded(random_texts())
    inputs = {"pixel_values": images, "input_ids": texts[0], "attention_mask": texts[1]}
    for options in (
        {"prior_source": "reference_images", "prior_weight": 0.5},
        {"reference_pixel_values": images[:1], "chunk_size": 1},
    ):
        expected = model.score(images, *texts, **options)
        output = model(**inputs, **options)
        assert torch.equal(output.logits_per_image, expected.information_gain)
        assert torch.equal(output.prior_log_likelihood, expected.prior_log_likelihood)
    with pytest.raises(ValueError, match="chunk_size"):
        model(**inputs, chunk_size=0)
    with pytest.raises(TypeError, match="prior_wieght, reduction"):
        model(**inputs, prior_wieght=0.5, reduction="mean")
    harmless = {"output_attentions": True, "output_hidden_states": True, "return_loss": True, "position_ids": None}
    first, *_ = model(**inputs, **harmless, return_dict=False)
    assert torch.equal(first, model.score(images, *texts).information_gain)


def count_calls(monkeypatch, model) -> list[str]:
    """What the decoder does, in order: the text-only layers, and the fusion layers with and without an image."""
    calls, decoder = [], model.model.decoder
    run, fuse = decoder._run_text_only_layers, decoder.fuse

    def counted_fuse(states, key_values=None, **kwargs):
        calls.append("prior" if key_values is None else "caption")
        return fuse(states, key_values, **kwargs)

    monkeypatch.setattr(decoder, "_run_text_only_layers", lambda text: (calls.append("text only"), run(text))[1])
    monkeypatch.setattr(decoder, "fuse", counted_fuse)
    return calls


def test_what_needs_no_image_is_computed_once_per_set_of_texts(monkeypatch):
    model, images, texts = tiny_model("prefix"), random_images(), padded(random_texts())
    calls = count_calls(monkeypatch, model)
    expected = model.score(images, *texts)
    assert calls == ["text only", "prior", "caption"]
    calls.clear()
    compiled = model.compile_texts(*texts)
    scores = [model.score(images, compiled) for _ in range(2)]
    assert calls == ["text only", "prior", "caption", "caption"]
    assert all(torch.equal(again.information_gain, expected.information_gain) for again in scores)
    scores[0].prior_log_likelihood.zero_()  # the caller's own copy
    assert torch.equal(model.score(images, compiled).information_gain, expected.information_gain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_are_kept_up_to_a_limit_and_change_no_score(variant, monkeypatch):
    model, images, texts = tiny_model(variant), random_images(), padded(random_texts())
    compiled = model.compile_texts(*texts)
    kept = model.score(images, compiled)
    heads, width = 2, model.config.text_config.hidden_size // 2
    blocks, size = compiled.trie.tokens.shape
    assert compiled.projections.shape == (3, blocks, heads, size, width)
    assert not compiled.projections.requires_grad
    monkeypatch.setattr(scoring_ig_captioner, "MAX_NUMBERS_OF_PROJECTIONS", compiled.projections.numel() - 1)
    bare = model.compile_texts(*texts)
    assert bare.projections is None
    for other in (model.score(images, bare), model.score(images, *texts)):
        torch.testing.assert_close(other.information_gain, kept.information_gain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        kept.caption_log_likelihood, naive_scores(model, images, random_texts()), atol=1e-4, rtol=0
    )


def test_with_compiled_texts_the_first_fusion_layer_projects_no_text():
    model, images = tiny_model("prefix"), random_images()
    compiled = model.compile_texts(*padded(random_texts()))
    projected = []
    attention = model.model.decoder.fusion_layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.register_forward_hook(lambda module, inputs, output: projected.append(output.shape[1]))
    model.score(images, dataclasses.replace(compiled, fingerprint=""))
    assert projected == [4, 4], "keys and queries of four image tokens, and of no text"


@pytest.mark.parametrize("variant", ["prefix_rotary", "cross"])
def test_gradients_with_compiled_texts_are_those_of_the_texts(variant):
    """Where no text-only layers are compiled; what was compiled as numbers gives the weights behind it no gradient."""
    model, images, texts = tiny_model(variant), random_images(), padded(random_texts())
    compiled = model.compile_texts(*texts)
    gradients = []
    for given in ((compiled,), texts):
        model.zero_grad()
        with torch.enable_grad():
            model.score(images, *given).caption_log_likelihood.sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert compiled.projections is not None
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, msg=name)


def test_what_lies_between_weights_and_scores_is_noticed():
    """Another attention implementation, autocast, hooks, another start token: all change the prior."""
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    expected = model.score(images, *texts)

    def difference() -> float:
        prior = model.score(images, *texts).prior_log_likelihood
        return (prior - expected.prior_log_likelihood).abs().max().item()

    model.set_attn_implementation("eager")
    torch.testing.assert_close(model.score(images, *texts).information_gain, expected.information_gain)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference() > 1e-3
    assert difference() < 1e-4
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * plain(states)
    assert difference() > 1e-3
    del model.lm_head.forward
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    assert difference() > 1e-3
    hook.remove()
    assert difference() < 1e-4
    model.config.decoder_start_token_id = EOS
    assert difference() > 1e-3


def test_gradients_reach_both_paths():
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    with torch.enable_grad():
        scores = model.score(images, *texts)
        again = model.score(images, *texts)
        scores.information_gain.sum().backward()
        again.prior_log_likelihood.sum().backward()
    assert model.model.vision_model.embeddings.projection.weight.grad.abs().sum() > 0
    assert model.model.decoder.embed_tokens.weight.grad.abs().sum() > 0
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(model.model.decoder.fusion_layers[0].self_attn, projection).weight
        assert weight.grad.abs().sum() > 0, projection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    expected = model.score(images, *texts)
    half = model.to(dtype).score(images, *texts)
    assert half.information_gain.dtype == torch.float32
    torch.testing.assert_close(half.caption_log_likelihood, expected.caption_log_likelihood, atol=0.5, rtol=0.02)


def test_padding_may_share_its_id_with_end_of_sequence():
    texts = random_texts()
    expected = tiny_model().score(random_images(), *padded(texts))
    shared = tiny_model()
    shared.config.pad_token_id = shared.config.eos_token_id
    ids, mask = padded(texts, length=9)
    scores = shared.score(random_images(), ids.masked_fill(mask == 0, shared.config.eos_token_id))
    torch.testing.assert_close(scores.information_gain, expected.information_gain, atol=1e-5, rtol=1e-5)


def test_labels_are_aligned_with_hand_computed_values():
    """With silenced blocks, token i follows from token i - 1 and its position alone: the score can be done by hand."""
    model = tiny_model("prefix")
    decoder = model.model.decoder
    for layer in decoder.layers:
        for silenced in (layer.self_attn.o_proj, layer.mlp.down_proj):
            silenced.weight.zero_()
            silenced.bias.zero_()
    texts, by_hand = random_texts((3, 2)), []
    for text in texts:
        read = torch.tensor([BOS, *text[:-1]])
        states = decoder.embed_tokens.weight[read] + decoder.embed_positions.weight[: len(text)]
        log_p = (decoder.norm(states) @ model.lm_head.weight.T).log_softmax(dim=-1)
        by_hand.append(sum(log_p[i, token] for i, token in enumerate(text)))
    scores = model.score(random_images(2), *padded(texts))
    torch.testing.assert_close(scores.caption_log_likelihood, torch.stack(by_hand).expand(2, -1))
    torch.testing.assert_close(scores.prior_log_likelihood, torch.stack(by_hand))


def test_loss_is_the_mean_of_the_same_log_likelihoods():
    model, images, texts = tiny_model(), random_images(2), random_texts((5, 3))
    ids, mask = padded(texts)
    output = model(pixel_values=images, labels=ids.masked_fill(mask == 0, -100))
    conditional = [naive_log_likelihoods(model, image, text) for image, text in zip(images, texts, strict=True)]
    unconditional = [naive_log_likelihoods(model, None, text) for text in texts]
    by_hand = [-sum(map(sum, values)) / 8 for values in (conditional, unconditional)]
    assert output.captioning_loss.item() == pytest.approx(by_hand[0], abs=1e-4)
    assert output.unconditional_loss.item() == pytest.approx(by_hand[1], abs=1e-4)
    assert output.loss.item() == pytest.approx(1.5 * by_hand[0] + 0.5 * by_hand[1], abs=1e-4)
    model.config.loss_reduction = "sequence"
    by_text = -sum(sum(values) / len(values) for values in conditional) / 2
    output = model(pixel_values=images, labels=ids.masked_fill(mask == 0, -100))
    assert output.captioning_loss.item() == pytest.approx(by_text, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"\(0, 3\)"),
        ({"input_ids": torch.tensor([5, 2])}, r"\(2,\)"),
        ({"input_ids": torch.tensor([[5, 2], [0, 0]])}, "text 1 of input_ids has no tokens"),
        ({"input_ids": torch.tensor([[5, 2]]), "attention_mask": torch.ones(2, 2)}, r"\(2, 2\)"),
        ({"input_ids": torch.tensor([[5, 2]]), "reduction": "median"}, "'median'"),
        ({"input_ids": torch.tensor([[5, 2]]), "chunk_size": 0}, "got 0"),
        ({"input_ids": torch.tensor([[5, 2]]), "pixel_values": torch.zeros(0, 3, 16, 16)}, r"\(0, 3, 16, 16\)"),
        ({"input_ids": torch.full((1, 21), 5)}, "21 tokens"),
        ({"input_ids": torch.tensor([[5, 2, 61]])}, "text 0 of input_ids has token 61, outside the vocabulary of 61"),
        ({"input_ids": torch.tensor([[5, 2, -100]])}, "token -100"),
        ({"input_ids": torch.tensor([[5, 2]]), "reference_pixel_values": torch.zeros(0, 3, 16, 16)}, "no image"),
        ({"input_ids": torch.tensor([[5, 2]]), "prior_source": "noise"}, "'noise'"),
        (
            {
                "input_ids": torch.tensor([[5, 2]]),
                "prior_source": "unconditional",
                "reference_pixel_values": random_images(1),
            },
            "'unconditional' uses no reference",
        ),
        ({"input_ids": torch.tensor([[5, 2]]), "pixel_values": torch.zeros(1, 1, 16, 16)}, r"\(1, 1, 16, 16\)"),
        ({"input_ids": torch.tensor([[5, 2]]), "pixel_values": torch.zeros(1, 3, 15, 16)}, "15 x 16"),
    ],
)
def test_bad_input_is_named(arguments, message):
    arguments = {"pixel_values": random_images(1), **arguments}
    with pytest.raises(ValueError, match=message):
        tiny_model().score(**arguments)


# Nothing is kept between calls


def prior_of(model, texts) -> torch.Tensor:
    return model.score(random_images(1), *texts).prior_log_likelihood


def test_scores_follow_every_change_of_the_model():
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    with torch.inference_mode():
        inside = model.score(images, *texts).prior_log_likelihood
    pixels = images.clone().requires_grad_()
    with torch.enable_grad():
        model.requires_grad_(False).score(pixels, *texts).information_gain.sum().backward()
    assert pixels.grad.abs().sum() > 0
    half = model.to(torch.bfloat16).score(images.bfloat16(), *texts).prior_log_likelihood
    assert (half - inside).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["fused step", "write to data"])
def test_changes_that_torch_does_not_count_are_seen(change):
    """Neither raises the version of a parameter; the model stays in evaluation mode throughout."""
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    before, compiled = prior_of(model, texts), model.compile_texts(*texts)
    if change == "fused step":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        with torch.enable_grad():
            model.score(images, *texts).prior_log_likelihood.sum().backward()
        optimizer.step()
    else:
        model.lm_head.weight.data *= 1.1
    fresh = tiny_model()
    fresh.load_state_dict(model.state_dict())
    assert (prior_of(model, texts) - before).abs().max() > 1e-2
    assert torch.equal(prior_of(model, texts), prior_of(fresh, texts))
    with pytest.raises(ValueError, match="compile them again"):
        model.score(images, compiled)


def test_threads_share_a_model():
    model, images = tiny_model(), random_images()
    sets_of_texts = [torch.tensor([[token, EOS], [token + 1, EOS]]) for token in range(4, 24)]
    expected = [model.score(images, texts).information_gain for texts in sets_of_texts]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda texts: model.score(images, texts).information_gain, sets_of_texts * 5))
    for one, other in zip(found, expected * 5, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_by_torch():
    classifier = tiny_model(model_class=HEADS[1])
    inputs = dict(zip(("input_ids", "attention_mask"), padded(random_texts()), strict=True))
    expected = classifier(pixel_values=random_images(), **inputs).logits_per_image
    actual = torch.compile(classifier, backend="eager")(pixel_values=random_images(), **inputs).logits_per_image
    torch.testing.assert_close(actual, expected)


def test_offloaded_models_score():
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    expected = model.score(images, *texts, prior_source="reference_images")
    compiled = tiny_model().compile_texts(*texts, prior_source="reference_images")
    offloaded = cpu_offload(model, torch.device("cpu"))
    again = offloaded.score(images, *texts, prior_source="reference_images")
    torch.testing.assert_close(again.information_gain, expected.information_gain)
    own = offloaded.compile_texts(*texts, prior_source="reference_images")
    assert torch.equal(offloaded.score(images, own).information_gain, again.information_gain)
    with pytest.raises(ValueError, match="compile them again"):
        offloaded.score(images, compiled)


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention"])
def test_attention_without_room_for_a_tree_gives_way_to_sdpa(attn):
    attention = tiny_model().model.decoder.layers[0].self_attn
    attention.config._attn_implementation = attn
    assert attention._implementation(torch.ones(1, 1, 2, 2, dtype=torch.bool)) == "sdpa"
    assert attention._implementation(None) == attention._implementation(torch.ones(1, 2)) == attn


def test_a_new_vocabulary_size_keeps_the_other_scores():
    model, images, texts = tiny_model(), random_images(), padded(random_texts())
    expected = model.score(images, *texts).prior_log_likelihood
    model.resize_token_embeddings(tiny_config().text_config.vocab_size + 3)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert (model.score(images, *texts).prior_log_likelihood <= expected).all()  # three more ways to be wrong


# Priors from reference images


def test_reference_images_give_the_mean_of_the_conditional_likelihoods():
    model, images, texts = tiny_model(), random_images(), random_texts()
    references = random_images(4) * 2
    likelihoods = naive_scores(model, references, texts)
    scores = model.score(images, *padded(texts), reference_pixel_values=references)
    torch.testing.assert_close(scores.prior_log_likelihood, likelihoods.exp().mean(dim=0).log(), atol=1e-4, rtol=0)
    unconditional = model.score(images, *padded(texts), prior_source="unconditional")
    assert torch.equal(scores.caption_log_likelihood, unconditional.caption_log_likelihood)
    assert (scores.prior_log_likelihood - unconditional.prior_log_likelihood).abs().max() > 1e-2


def test_plain_images_stand_in_for_reference_images_and_the_config_may_ask_for_it():
    texts = padded(random_texts())
    asked = tiny_model().score(random_images(), *texts, prior_source="reference_images")
    configured = tiny_model(prior_source="reference_images").score(random_images(), *texts)
    assert torch.equal(asked.information_gain, configured.information_gain)
    plain = torch.stack([torch.full((3, 16, 16), level) for level in (-1.0, 0.0, 1.0)])
    given = tiny_model().score(random_images(), *texts, reference_pixel_values=plain)
    torch.testing.assert_close(given.prior_log_likelihood, asked.prior_log_likelihood)


def test_a_geometric_mean_over_reference_images_is_that_of_log_likelihoods():
    model, texts, references = tiny_model(), random_texts(), random_images(4) * 2
    given = {"reference_pixel_values": references, "reference_mean": "geometric"}
    scores = model.score(random_images(), *padded(texts), **given)
    expected = naive_scores(model, references, texts).mean(dim=0)
    torch.testing.assert_close(scores.prior_log_likelihood, expected, atol=1e-4, rtol=0)
    compiled = model.compile_texts(*padded(texts), **given)
    torch.testing.assert_close(compiled.prior_log_likelihood, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="reference_mean must be one of .*, got 'median'"):
        model.score(random_images(), *padded(texts), reference_pixel_values=references, reference_mean="median")


def test_a_label_prior_is_added_to_information_gain():
    model, texts = tiny_model(), padded(random_texts((5, 2, 7)))
    plain = model.score(random_images(), *texts).information_gain
    given = model.score(random_images(), *texts, label_prior=[2, 1, 1]).information_gain
    torch.testing.assert_close(given, plain + torch.tensor([0.5, 0.25, 0.25]).log())
    with pytest.raises(ValueError, match="one number for each of 3 labels, got \\(2,\\)"):
        model.score(random_images(), *texts, label_prior=[1, 1])
