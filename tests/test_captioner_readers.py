"""Every family of captioners, tiny and random: tree = rows = one pass per text = forced `generate()`.

The reference is the slow, obvious one: prompt and text through the model's public `forward`, without a cache.
"""

import pytest
import torch
import transformers
from captioner_builds import BUILDS, Build, build_of, random_texts, trie_of
from torch import Tensor

from ig_captioner.captioners.families import family_of
from ig_captioner.captioners.readers import forced_log_likelihoods, read_rows, read_tree
from ig_captioner.captioners.verification import why_no_tree


TOLERANCE = 1e-4  # nats, float32
TEXTS = random_texts()
ROWS_ONLY = ("qwen3_5", "lfm2_vl", "blip2_t5", "instructblip_t5", "florence2", "pix2struct", "kosmos2")
LLAMA4_IS_BROKEN = transformers.__version__ == "5.24.0"
FAMILY_PARAMETERS = [
    pytest.param(
        name,
        marks=[pytest.mark.skipif(name == "llama4" and LLAMA4_IS_BROKEN, reason="5.24.0 has a Llama 4 that fails")],
    )
    for name in BUILDS
]


def one_pass_per_text(build: Build, inputs: dict[str, Tensor], texts: list[list[int]]) -> Tensor:
    """log P of each text, [N], from the public forward pass on prompt and text."""
    return torch.stack([log_likelihood(build.model, inputs, torch.tensor([text])) for text in texts])


def log_likelihood(model, inputs: dict[str, Tensor], text: Tensor) -> Tensor:
    length, given = text.shape[1], dict(inputs)
    if "decoder_input_ids" in given:
        given["decoder_input_ids"] = torch.cat([given["decoder_input_ids"], text], dim=1)
    else:
        # zero for token types, which makes a text token "no image"; PaliGemma alone calls its texts 1
        fill = {"attention_mask": 1, "token_type_ids": int(model.config.model_type == "paligemma")}
        fill |= {"mm_token_type_ids": 0, "image_embeds_position_mask": 0}
        for name in fill.keys() & given.keys():
            given[name] = torch.cat([given[name], torch.full_like(text, fill[name], dtype=given[name].dtype)], dim=1)
        if "cross_attention_mask" in given:
            seen = given["cross_attention_mask"]
            given["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, length, -1, -1)], dim=1)
        given["input_ids"] = torch.cat([given["input_ids"], text], dim=1)
    if "pixel_values" not in given and model.config.model_type in ("blip", "blip-2", "instructblip"):
        model = model.text_decoder if model.config.model_type == "blip" else model.language_model
    logits = model(**given).logits[0, -length - 1 : -1]
    return logits.log_softmax(dim=-1).gather(-1, text[0][:, None]).sum()


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("name", FAMILY_PARAMETERS)
@torch.no_grad()
def test_all_ways_of_reading_agree(name):
    """With an image, without, and with it again: labels of several lengths, one of them the beginning of another."""
    build, trie = build_of(name), trie_of(TEXTS)
    family = family_of(build.model)
    for inputs in filter(None, (build.inputs, build.without_image, build.inputs)):
        truth = one_pass_per_text(build, inputs, TEXTS)
        assert 5 < largest(truth) < 80  # neither certain nor without meaning
        forced = torch.stack([forced_log_likelihoods(family, inputs, text).sum() for text in TEXTS[:2]])
        assert largest(forced - truth[:2]) < TOLERANCE
        prefix = family.prefill(inputs)
        length = prefix.length
        assert largest(trie.sum_over_texts(read_rows(family, prefix, trie))[0] - truth) < TOLERANCE
        forbidden = why_no_tree(family, prefix, max(map(len, TEXTS)))
        assert (forbidden is not None) == (name in ROWS_ONLY), forbidden
        for _ in range(0 if forbidden else 2):
            assert largest(trie.sum_over_texts(read_tree(family, prefix, trie))[0] - truth) < TOLERANCE
        assert prefix.length == length  # no text is left behind


@pytest.mark.parametrize("name", FAMILY_PARAMETERS)
@torch.no_grad()
def test_two_images_together_are_read_as_one_by_one(name):
    build, trie = build_of(name), trie_of(TEXTS)
    family = family_of(build.model)
    images = [build.image(seed) for seed in (1, 2)]
    alone = [family.prefill(inputs) for inputs in images]
    together = family.prefill({key: torch.cat([image[key] for image in images]) for key in build.inputs})
    for reader in [read_rows] if name in ROWS_ONLY else [read_rows, read_tree]:
        expected = torch.cat([reader(family, prefix, trie) for prefix in alone])
        assert largest(expected[0] - expected[1]) > 0.01  # the image matters
        assert largest(reader(family, together, trie) - expected) < TOLERANCE


@torch.no_grad()
def test_texts_of_one_token_need_no_further_pass():
    build = build_of("llava")
    family = family_of(build.model)
    prefix = family.prefill(build.inputs)
    expected = prefix.next_log_probs[:, [7, 9]]
    for reader in (read_tree, read_rows):
        assert largest(reader(family, prefix, trie_of([[7], [9]])) - expected) == 0


@torch.no_grad()
def test_memory_limits_change_no_score(monkeypatch):
    build, trie = build_of("llava"), trie_of(TEXTS)
    family = family_of(build.model)
    images = [build.image(seed) for seed in (1, 2, 3)]
    prefix = family.prefill({key: torch.cat([image[key] for image in images]) for key in build.inputs})
    for reader in (read_tree, read_rows):
        expected = reader(family, prefix, trie)
        monkeypatch.setattr("ig_captioner.captioners.readers.NUMBERS_PER_PASS", {"cpu": 1, "other": 1})
        assert largest(reader(family, prefix, trie) - expected) < TOLERANCE
        monkeypatch.undo()
