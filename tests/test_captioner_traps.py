"""What goes wrong without a word when texts are read behind a cached image: each trap with its guard taken out.

Every test shows that scores are right, and that they are wrong, by at least `HARM` nats, without the guard. The
reference is the model's own `generate()`, forced along the texts.
"""

import copy
import logging

import pytest
import torch
from captioner_builds import Build, build_of, gemma3, llama4, paligemma, random_texts, trie_of
from torch import Tensor

from ig_captioner.captioners import families, prefix, readers, verification
from ig_captioner.captioners.families import Family, family_of
from ig_captioner.captioners.readers import read_generated, read_rows, read_tree
from ig_captioner.captioners.verification import Verification, verify, why_no_tree


TEXTS = random_texts(6)
TRIE = trie_of(TEXTS)
RIGHT, HARM = 1e-4, 0.05


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def error(reader, build: Build, inputs: dict[str, Tensor] | None = None, family: Family | None = None) -> float:
    """Largest difference from `generate()`, in nats."""
    family, inputs = family or family_of(build.model), inputs or build.inputs
    truth = TRIE.sum_over_texts(read_generated(family_of(build.model), inputs, TRIE))
    return float((TRIE.sum_over_texts(reader(family, family.prefill(inputs), TRIE)) - truth).abs().max())


def test_a_cache_grows_in_place_and_is_forked(monkeypatch):
    build = build_of("llava")
    monkeypatch.setattr(readers, "NUMBERS_PER_PASS", {"cpu": 1, "other": 1})  # a pass per text
    assert error(read_rows, build) < RIGHT
    monkeypatch.setattr(prefix, "fork", lambda cache: cache)
    assert error(read_rows, build) > HARM


def test_states_are_overwritten_in_place_and_are_copied(monkeypatch):
    build = build_of("lfm2_vl")
    monkeypatch.setattr(readers, "NUMBERS_PER_PASS", {"cpu": 1, "other": 1})
    assert error(read_rows, build) < RIGHT
    monkeypatch.setattr(copy, "deepcopy", copy.copy)
    assert error(read_rows, build) > HARM


@pytest.mark.parametrize(
    ("name", "reader"),
    [("llava", read_tree), ("paligemma", read_tree), ("git", read_tree), ("git", read_rows)],
)
def test_positions_are_given(monkeypatch, name, reader):
    build = build_of(name)
    assert error(reader, build) < RIGHT
    takes = Family._takes
    monkeypatch.setattr(Family, "_takes", lambda self, name: name != "position_ids" and takes(self, name))
    assert error(reader, build) > HARM


@pytest.mark.parametrize("name", ["paligemma", "git", "qwen2_vl", "glm4v", "kosmos2"])
def test_positions_begin_where_the_family_has_them(monkeypatch, name):
    build = build_of(name)
    reader = read_rows if name == "kosmos2" else read_tree
    assert error(reader, build) < RIGHT
    family = family_of(build.model)
    monkeypatch.setattr(type(family), "first_positions", Family.first_positions)
    assert error(reader, build, family=family) > (1e-3 if name == "kosmos2" else HARM)


def test_an_earlier_image_moves_no_position_of_a_text_without_one(monkeypatch):
    build = build_of("qwen2_vl")
    family = family_of(build.model)
    family.prefill(build.inputs)  # the model keeps what this image did to positions
    assert error(read_tree, build, build.without_image) < RIGHT
    family.prefill(build.inputs)
    stale = build.model.model.rope_deltas.clone()
    monkeypatch.setattr(type(family), "first_positions", lambda self, lengths, inputs: lengths + stale.flatten())
    assert error(read_tree, build, build.without_image, family) > HARM


@pytest.mark.parametrize("name", ["florence2", "pix2struct", "blip2_t5"])
def test_a_decoder_without_positions_reads_no_tree(name):
    """Arguments that it does not know vanish in `**kwargs`."""
    build = build_of(name)
    family = family_of(build.model)
    assert "position_ids" in why_no_tree(family, family.prefill(build.inputs), 6)
    assert error(read_tree, build) > HARM


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_layers_with_states_read_no_tree(name):
    build = build_of(name)
    family = family_of(build.model)
    assert "state" in why_no_tree(family, family.prefill(build.inputs), 6)
    assert error(read_tree, build) > HARM


def test_a_model_with_a_mask_of_its_own_reads_no_tree():
    build = build_of("kosmos2")
    family = family_of(build.model)
    assert "mask" in why_no_tree(family, family.prefill(build.inputs), 6)
    with pytest.raises(ValueError):
        error(read_tree, build)


@pytest.mark.parametrize("name", ["blip", "git"])
def test_the_mask_is_additive(monkeypatch, name):
    """Their eager attention adds a mask of booleans as zeros and ones."""
    build, additive = build_of(name), readers._tree_mask
    assert error(read_tree, build) < RIGHT
    monkeypatch.setattr(readers, "_tree_mask", lambda *of: additive(*of) == 0)
    assert error(read_tree, build) > HARM


@pytest.mark.parametrize("make", [lambda: gemma3(window=8), lambda: gemma3(window=14), lambda: paligemma(True, 24)])
def test_a_tree_fits_into_every_attention_window(make):
    build = make()
    family = family_of(build.model)
    before = family.prefill(build.inputs)
    assert "window" in why_no_tree(family, before, 6)
    assert error(read_rows, build) < RIGHT
    assert verify(family, [build.inputs], TRIE).mode == "rows"


def test_beyond_a_window_a_tree_is_wrong():
    assert error(read_tree, gemma3(window=14)) > RIGHT


def test_chunked_attention_is_a_window(monkeypatch):
    family = family_of(llama4(chunk=8).model)
    assert min(family.windows) == 8


def test_a_window_that_no_layer_uses_forbids_nothing():
    model = copy.copy(gemma3(window=8).model)
    model.config.text_config.layer_types = ["full_attention"] * 4
    assert list(family_of(model).windows) == []


def test_attention_that_takes_no_mask_reads_no_tree(monkeypatch):
    build = build_of("llava")
    family = family_of(build.model)
    before = family.prefill(build.inputs)
    assert why_no_tree(family, before, 6) is None
    monkeypatch.setattr(verification, "attention_implementation", lambda config: "flash_attention_2")
    assert "flash_attention_2" in why_no_tree(family, before, 6)


def test_mllama_texts_see_the_tiles_that_the_prompt_sees():
    build = build_of("mllama")
    family = family_of(build.model)
    assert error(read_tree, build) < RIGHT
    family._prefix = lambda outputs, inputs, **constants: Family._prefix(family, outputs, inputs)
    assert error(read_tree, build, family=family) > HARM


def test_pix2struct_texts_see_no_padding_patches():
    build = build_of("pix2struct")
    family = family_of(build.model)
    assert error(read_rows, build) < RIGHT
    family._constants = lambda outputs, inputs: {"encoder_states": outputs.encoder_last_hidden_state}
    assert error(read_rows, build, family=family) > HARM


def test_a_paligemma_text_is_no_part_of_the_prompt():
    """In the prompt every token sees all others: a text that is put there sees what it is to predict."""
    build, text = build_of("paligemma"), torch.tensor([TEXTS[0]])
    together = dict(build.inputs)
    for name, fill in (("input_ids", text), ("attention_mask", torch.ones_like(text))):
        together[name] = torch.cat([together[name], fill], dim=1)
    together["token_type_ids"] = torch.zeros_like(together["input_ids"])
    logits = build.model(**together).logits[0, -text.shape[1] - 1 : -1]
    wrong = logits.log_softmax(dim=-1).gather(-1, text[0][:, None]).sum()
    truth = TRIE.sum_over_texts(read_generated(family_of(build.model), build.inputs, TRIE))[0, 0]
    assert abs(float(wrong - truth)) > HARM


def test_the_loss_of_blip_counts_padding():
    """With padding in `labels`, as the processor makes them; scores do not change with the texts beside them."""
    build = build_of("blip")
    start, text = build.inputs["input_ids"], torch.tensor([min(TEXTS, key=len)])
    padding = torch.zeros(1, 4, dtype=torch.long)

    def nats_by_loss(labels: Tensor) -> float:
        mask = (torch.arange(labels.shape[1]) < start.shape[1] + text.shape[1]).long()[None]
        loss = build.model(
            pixel_values=build.inputs["pixel_values"], input_ids=labels, attention_mask=mask, labels=labels
        ).loss
        return float(loss) * (labels.shape[1] - 1)

    alone = torch.cat([start, text], dim=1)
    assert abs(nats_by_loss(torch.cat([alone, padding], dim=1)) - nats_by_loss(alone)) > HARM
    assert error(read_tree, build) < RIGHT and error(read_rows, build) < RIGHT


def test_a_blip_text_begins_behind_its_own_start_token():
    """[DEC], which is not the tokenizer's [CLS]."""
    build = build_of("blip")
    family = family_of(build.model)
    other = dict(build.inputs, input_ids=build.inputs["input_ids"].clone())
    other["input_ids"][0, 0] = 5 if int(other["input_ids"][0, 0]) != 5 else 6
    right, wrong = (read_tree(family, family.prefill(inputs), TRIE) for inputs in (build.inputs, other))
    assert float((right - wrong).abs().max()) > HARM


def test_token_types_are_part_of_the_prompt():
    """Without them Gemma 3 reads the image from left to right only."""
    build = build_of("gemma3")
    family = family_of(build.model)
    without = {key: value for key, value in build.inputs.items() if key != "token_type_ids"}
    right, wrong = (read_tree(family, family.prefill(inputs), TRIE) for inputs in (build.inputs, without))
    assert float((right - wrong).abs().max()) > HARM


def test_a_generate_that_ignores_the_texts_is_noticed(monkeypatch):
    """Janus drops the logits processor when it writes text."""
    build = build_of("janus")
    assert error(read_tree, build) < RIGHT
    monkeypatch.setattr(families.Janus, "generate", Family.generate)
    with pytest.raises(ValueError, match="cannot be forced"):
        error(read_tree, build)


# The tripwire


def test_verification_tells_mode_and_differences():
    build = build_of("llava")
    found = verify(family_of(build.model), [build.inputs, build.without_image], TRIE)
    assert found.mode == "tree"
    assert 0 < found.errors["tree"] < RIGHT and 0 < found.errors["rows"] < RIGHT
    assert str(found).startswith("reading mode tree; nats from generate(): tree ")
    assert "(6 texts, float32)" in str(found)


def test_verification_drops_a_tree_that_no_rule_forbids(monkeypatch):
    """Florence-2, were it believed to take positions."""
    build = build_of("florence2")
    monkeypatch.setattr(families.EncoderDecoder, "takes_positions", True)
    found = verify(family_of(build.model), [build.inputs], TRIE)
    assert found.mode == "rows"
    assert found.errors["tree"] > HARM and "nats from generate()" in found.reasons["tree"]


def test_verification_falls_back_to_generate_with_the_numbers(monkeypatch, caplog):
    build = build_of("git")
    monkeypatch.setattr(families.Git, "first_positions", Family.first_positions)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        found = verify(family_of(build.model), [build.inputs], TRIE)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert found.mode == "generate"
    assert found.errors["rows"] > HARM
    assert f"rows {found.errors['rows']:.1e}" in caplog.text


def test_verification_falls_back_to_generate_where_the_cache_cannot_be_read(monkeypatch):
    build = build_of("llava")

    def fails(self, inputs):
        raise families.UnreadableCacheError("no cache")

    monkeypatch.setattr(Family, "prefill", fails)
    found = verify(family_of(build.model), [build.inputs], TRIE)
    assert found.mode == "generate" and "no cache" in found.reasons["rows"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_as_a_tree(dtype):
    """The error of a tree is compared with that of rows, which has the same rounding; log-softmax is float32."""
    build = copy.deepcopy(build_of("llava"))
    build.model.to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in build.inputs.items()}
    found = verify(family_of(build.model), [inputs], TRIE)
    assert found.mode == "tree" and found.dtype == dtype
    family = family_of(build.model)
    assert family.prefill(inputs).next_log_probs.dtype == torch.float32


def test_texts_to_compare_are_the_shortest_the_longest_and_one_that_branches_off():
    texts = [[7, 8, 9, 3, 2], [7, 8, 2], [7, 2], [7, 8, 4, 2], [5, 6, 2]]
    assert verification.texts_to_compare(texts) == [[7, 2], [7, 8, 9, 3, 2], [7, 8, 4, 2]]
    assert verification.texts_to_compare(texts[:1]) == texts[:1]


def test_a_verification_that_measured_nothing_says_so():
    assert "not measured" in str(Verification("rows"))
