"""Generation: the cache, beams, samples, prompts and padding change how captions are computed, not what they are."""

import pytest
import torch
from transformers import StaticCache

from ig_captioner import IGCaptionerForConditionalGeneration
from tiny import (
    BOS,
    EOS,
    PAD,
    VARIANTS,
    assert_clear_order,
    naive_log_likelihoods,
    padded,
    random_images,
    tiny_config,
    tiny_model,
)


NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_model(request.param)


def greedy(model, images: torch.Tensor | None, prompt: list[int], number: int = 6) -> list[int]:
    """Token by token without a cache, end-of-sequence forbidden: slow and obvious."""
    ids = torch.tensor([prompt])
    for _ in range(number):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=images, use_cache=False).logits[0, -1]
        logits[EOS] = -torch.inf
        assert_clear_order(logits.topk(2).values)
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return ids[0].tolist()


@pytest.mark.core
def test_greedy_equals_a_loop_without_a_cache(model):
    images = random_images(2)
    expected = [greedy(model, image[None], [BOS]) for image in images]
    assert model.generate(pixel_values=images, **NEW).tolist() == expected
    assert model.generate(pixel_values=images, use_cache=False, **NEW).tolist() == expected
    assert model.generate(pixel_values=images, cache_implementation="static", **NEW).tolist() == expected
    assert expected[0] != expected[1]


def test_cached_logits_equal_full_logits(model):
    ids, images = torch.tensor([[BOS, 11, 22, 33, 44]]), random_images(1)
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=images).logits
        read = model.read_image(images)
        cache, steps = None, []
        for token in ids[0]:
            output = model(input_ids=token.view(1, 1), image_key_values=read, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == ids.shape[1]  # the image is not in the cache


def test_static_cache_equals_full_logits(model):
    ids, images = torch.tensor([[BOS, 11, 22, 33]]), random_images(1)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        full = model(input_ids=ids, pixel_values=images).logits
        first = model(input_ids=ids[:, :3], pixel_values=images, past_key_values=cache, use_cache=True).logits
        read = model.read_image(images)
        last = model(
            input_ids=ids[:, 3:],
            image_key_values=read,
            past_key_values=cache,
            position_ids=torch.tensor([[3]]),
            use_cache=True,
        ).logits
    torch.testing.assert_close(torch.cat([first, last], dim=1), full, atol=1e-5, rtol=1e-5)


def test_the_image_is_encoded_once(monkeypatch):
    model, calls = tiny_model(), []
    encode = model.model.encode_image
    monkeypatch.setattr(model.model, "encode_image", lambda pixels, _: (calls.append(len(pixels)), encode(pixels))[1])
    model.generate(pixel_values=random_images(2), num_beams=3, **NEW)
    assert calls == [2]


def test_wide_beams_find_the_best_caption_of_an_exhaustive_search():
    """A vocabulary of 5 words, captions of 2 tokens: 25 candidates, all scored one by one."""
    model = IGCaptionerForConditionalGeneration(tiny_config({"vocab_size": 5, "mask_token_id": 3})).eval()
    image = random_images(1)
    with torch.no_grad():
        totals = {
            (a, b): sum(naive_log_likelihoods(model, image[0], [a, b])) for a in (0, 1, 3, 4) for b in (0, 1, 3, 4)
        }
    best = max(totals, key=totals.get)
    assert_clear_order(torch.tensor([*totals.values()]).topk(2).values)
    beams = model.generate(
        pixel_values=image, num_beams=4, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=EOS
    )
    assert tuple(beams[0, 1:].tolist()) == best


def test_beams_and_samples_have_the_right_shapes(model):
    images = random_images(2)
    assert model.generate(pixel_values=images, num_beams=3, num_return_sequences=3, **NEW).shape == (6, 7)
    torch.manual_seed(0)
    samples = model.generate(pixel_values=images, do_sample=True, num_return_sequences=4, **NEW)
    assert samples.shape == (8, 7)
    assert len({tuple(sample) for sample in samples.tolist()}) > 2


def test_generation_stops_at_end_of_sequence():
    model = tiny_model("cross")
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1000
    assert model.generate(pixel_values=random_images(2), max_new_tokens=6).tolist() == [[BOS, EOS]] * 2


def test_without_an_image_text_is_generated_from_the_start_token(model):
    assert model.generate(**NEW)[0].tolist() == greedy(model, None, [BOS])


def test_prompts_in_scored_form_continue_the_text(model):
    """The tokenizer ends a text with end-of-sequence; as a prompt it is what stands before that."""
    images = random_images(2)
    texts = [[11, 12, 13, EOS], [21, EOS]]
    expected = [greedy(model, image[None], [BOS, *text[:-1]]) for image, text in zip(images, texts, strict=True)]
    for side in ("right", "left"):
        ids, mask = padded(texts, side=side)
        for mask_given in ({"attention_mask": mask}, {}):
            output = model.generate(pixel_values=images, input_ids=ids, **mask_given, **NEW)
            assert output[0].tolist() == expected[0]
            assert output[1, 2:].tolist() == expected[1]
            assert output.shape[1] == ids.shape[1] + 6


def test_prompts_with_a_start_token_are_taken_as_they_are(model):
    images = random_images(2)
    prompts = [[BOS, 11, 12, 13], [BOS, 21]]
    expected = [greedy(model, image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
    ids, mask = padded(prompts, side="left")
    output = model.generate(pixel_values=images, input_ids=ids, attention_mask=mask, **NEW)
    assert [output[0].tolist(), output[1, 2:].tolist()] == expected


@pytest.mark.core
def test_generation_continues_from_a_cache(model):
    images = random_images(1)
    whole = model.generate(pixel_values=images, **NEW)
    first = model.generate(
        pixel_values=images, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, use_cache=True
    )
    second = model.generate(
        first.sequences,
        pixel_values=images,
        past_key_values=first.past_key_values,
        max_new_tokens=3,
        min_new_tokens=3,
    )
    assert torch.equal(second, whole)


def test_the_start_token_may_be_the_padding_token():
    """big_vision's convention: texts start with id 0, which also pads."""
    model = tiny_model("cross")
    model.config.text_config.decoder_start_token_id = PAD
    model.config.bos_token_id = model.generation_config.bos_token_id = PAD
    images = random_images(2)
    expected = [greedy(model, image[None], [PAD]) for image in images]
    assert model.generate(pixel_values=images, **NEW).tolist() == expected
    starts = torch.full((2, 1), PAD)
    assert model.generate(pixel_values=images, input_ids=starts, **NEW).tolist() == expected


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="21 tokens, but the model knows 20"):
        tiny_model()(input_ids=torch.full((1, 21), 5))


def test_pixels_are_no_prompt():
    with pytest.raises(ValueError, match=r"token ids, got torch.float32, shape \(1, 3, 16, 16\)"):
        tiny_model().generate(random_images(1))
