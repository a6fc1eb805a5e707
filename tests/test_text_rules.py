"""Special tokens in scores, labels and prompts: what can be meant in one way is read so, and the rest is told."""

import warnings

import pytest
import torch

from ig_captioner import IGCaptionerWarning
from ig_captioner.text_rules import scored_form
from tests.tiny import BOS, EOS, PAD, naive_scores, padded, random_images, tiny_config, tiny_model


TEXTS = [[5, 6, 7, EOS], [8, EOS], [9, 10, EOS]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def scores(model, input_ids, attention_mask=None) -> torch.Tensor:
    """log P(T|I) [B, C], with warnings as errors."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        return model.score(random_images(2), input_ids, attention_mask).caption_log_likelihood


def test_what_generate_returns_is_scored_without_its_start_token(model):
    images = random_images(2)
    model.generation_config.eos_token_id = EOS
    generated = model.generate(pixel_values=images, max_new_tokens=6)
    generated[:, -1] = EOS  # a random model rarely ends by itself
    with torch.no_grad():
        whole, bare = (model.score(images, tokens) for tokens in (generated, generated[:, 1:]))
    assert torch.equal(whole.caption_log_likelihood, bare.caption_log_likelihood)
    texts = [[token for token in row if token != PAD] for row in generated[:, 1:].tolist()]
    texts = [row[: row.index(EOS) + 1] for row in texts]
    assert torch.allclose(bare.caption_log_likelihood, naive_scores(model, images, texts), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("has_start", [True, False])
@pytest.mark.parametrize("mask", ["right", "all", "none"])
def test_start_and_padding_count_for_nothing(model, side, has_start, mask):
    expected = naive_scores(model, random_images(2), TEXTS)
    ids, right = padded([[BOS, *text] if has_start else text for text in TEXTS], side=side)
    given = {"right": right, "all": torch.ones_like(ids), "none": None}[mask]
    assert torch.allclose(scores(model, ids, given), expected, atol=1e-4)


@pytest.mark.parametrize(
    "special",
    [
        {"bos_token_id": EOS, "decoder_start_token_id": EOS, "pad_token_id": EOS},  # GPT-2's
        {"bos_token_id": EOS, "decoder_start_token_id": EOS},
        {"bos_token_id": PAD, "decoder_start_token_id": PAD},  # big_vision's
        {"pad_token_id": EOS},
    ],
)
@pytest.mark.parametrize("has_start", [True, False])
def test_tokens_of_several_meanings(special, has_start):
    config = tiny_config(special).text_config
    texts = [[config.decoder_start_token_id, *text] if has_start else text for text in [*TEXTS, [EOS]]]
    length = max(map(len, texts))
    padding = config.pad_token_id
    ids = torch.tensor([text + [padding] * (length - len(text)) for text in texts])
    right = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    for mask in (right, None):
        found, found_mask = scored_form(ids, mask, config)
        read = [row[kept.bool()].tolist() for row, kept in zip(found, found_mask, strict=True)]
        assert read == [*TEXTS, [EOS]]


def read_texts(ids, mask, special: dict) -> list[list[int]]:
    """What is left of texts in scored form."""
    found, found_mask = scored_form(torch.tensor(ids), mask, tiny_config(special).text_config)
    return [row[kept.bool()].tolist() for row, kept in zip(found, found_mask, strict=True)]


@pytest.mark.parametrize("ids", [[[5, 6, EOS], [EOS, 7, EOS]], [[EOS, 5, 6, EOS, EOS], [EOS, EOS, 7, EOS, EOS]]])
def test_padding_that_is_the_end_token_may_stand_before_texts_without_a_mask(ids):
    assert read_texts(ids, None, {"pad_token_id": EOS}) == [[5, 6, EOS], [7, EOS]]


@pytest.mark.parametrize("has_mask", [True, False])
def test_padding_behind_the_other_of_two_end_tokens_is_no_text(has_mask):
    ids = [[5, 6, 4, EOS], [7, 4, EOS, EOS]]
    mask = torch.ones(2, 4) if has_mask else None
    assert read_texts(ids, mask, {"pad_token_id": EOS, "eos_token_id": [EOS, 4]}) == [[5, 6, 4], [7, 4]]


def test_words_behind_an_end_are_not_left_out_without_a_word():
    with pytest.warns(IGCaptionerWarning, match="1 of 2 texts have start, end-of-sequence or padding tokens inside"):
        read_texts([[5, EOS, 6, EOS], [7, EOS, EOS, EOS]], None, {"pad_token_id": EOS})


def test_texts_without_an_end_and_special_tokens_inside_are_told(model):
    with pytest.warns(IGCaptionerWarning, match=r"2 of 3 texts do not end with .*\[2\].*; text 0 has the tokens \[5\]"):
        model.score(random_images(1), torch.tensor([[5], [EOS], [6]]))
    with pytest.warns(IGCaptionerWarning, match=r"1 of 2 texts have start, .* inside.*; text 1 has .* \[5, 2, 6, 2\]"):
        model.score(random_images(1), torch.tensor([[5, 6, EOS, PAD], [5, EOS, 6, EOS]]))
    with pytest.warns(IGCaptionerWarning, match="1 of 2 texts have start"):  # only some have a start token
        model.compile_texts(torch.tensor([[BOS, 6, EOS], [5, 6, EOS]]))
    for nothing in ([[BOS]], [[PAD, PAD]]):
        with pytest.raises(ValueError, match="text 0 of input_ids has no tokens"):
            model.score(random_images(1), torch.tensor(nothing))


def test_prompts_that_cannot_be_meant_are_told(model):
    def generated(ids):
        return model.generate(input_ids=torch.tensor(ids), max_new_tokens=3, min_new_tokens=3)

    with pytest.warns(
        IGCaptionerWarning, match=r"1 of 2 prompts do not begin with the start token 1.*prompt 1 has .*\[5, 6\]"
    ):
        generated([[BOS, 6], [5, 6]])
    with pytest.warns(IGCaptionerWarning, match="1 of 2 prompts end with an end-of-sequence token"):
        generated([[BOS, 6], [BOS, EOS]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", IGCaptionerWarning)
        whole = generated([[BOS, 5, 6]])
        assert torch.equal(generated([[5, 6, EOS]]), whole)  # as the tokenizer makes it
        assert torch.equal(generated([[BOS, 5, 6, EOS]]), whole)  # as generate has returned it
