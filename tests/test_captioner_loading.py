"""Which models are loaded, and what is said of those that are not."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from captioner_builds import BUILDS, build_of
from captioner_folders import CHAT, captioner, photo, save_folder

from ig_captioner import CaptionScorer
from ig_captioner.captioners.families import FAMILIES
from ig_captioner.captioners.loading import auto_class_for, why_refused
from ig_captioner.captioners.prompts import Prompt
from tiny import BFLOAT16_ATTENTION_FAILS, BFLOAT16_REASON


def load(folder) -> CaptionScorer:
    return CaptionScorer.from_pretrained(folder)


@pytest.mark.parametrize("name", BUILDS)
def test_every_family_that_is_tested_is_accepted(name):
    config = build_of(name).model.config.to_dict()
    assert why_refused({**config, "architectures": [type(build_of(name).model).__name__]}) is None
    assert issubclass(type(build_of(name).model), hf.PreTrainedModel)
    auto_class = auto_class_for(config)
    assert type(build_of(name).model) is auto_class._model_mapping[type(build_of(name).model.config)]


def test_the_registry_names_types_that_transformers_has():
    assert all(name in hf.CONFIG_MAPPING for name in FAMILIES)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "clip"}, "compare images and texts but write none; use transformers' own pipeline"),
        ({"model_type": "siglip"}, "pipeline\\('zero-shot-image-classification'"),
        ({"model_type": "llama"}, "read no images"),
        ({"model_type": "vit"}, "do not write texts about images"),
        ({"model_type": "blip", "architectures": ["BlipModel"]}, "compares images and texts but writes none"),
        ({"model_type": "blip", "architectures": ["BlipForImageTextRetrieval"]}, "a BlipForImageTextRetrieval"),
        ({"model_type": "blip", "architectures": ["BlipForQuestionAnswering"]}, "a BlipForQuestionAnswering, not"),
        ({"model_type": "diffusion_gemma"}, "diffusion"),
        ({"model_type": "evolla"}, "proteins"),
        ({"model_type": "pi0"}, "robot"),
        ({"model_type": "never_heard_of"}, "knows no model of type 'never_heard_of'"),
        ({"model_type": "moondream1", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "--trust-remote-code"),
    ],
)
def test_what_cannot_be_scored_with_is_refused_with_the_reason(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=f"cannot be scored with: .*{reason}"):
        load(tmp_path)


def test_remote_code_is_accepted_when_it_is_trusted():
    config = {"model_type": "moondream1", "auto_map": {"AutoModelForCausalLM": "x.Y"}}
    assert why_refused(config, trust_remote_code=True) is None
    assert auto_class_for(config) is hf.AutoModelForCausalLM
    config["auto_map"] = {"AutoModelForImageTextToText": "x.Y"}
    assert auto_class_for(config) is hf.AutoModelForImageTextToText


def test_a_captioner_saved_from_another_class_is_not_filled_with_random_weights(tmp_path):
    """`architectures` may be missing; the text decoder then is, too."""
    config = captioner("blip")[0].config
    hf.BlipModel(config).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del described["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ValueError, match="do not fill a BlipForConditionalGeneration: text_decoder.*would be random"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    save_folder("blip", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(captioner("blip")[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no weights in safetensors; pickled ones are refused"):
        load(tmp_path)


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        load(tmp_path)


def test_a_family_without_its_processor_says_so():
    model, processors = captioner("llava")
    with pytest.raises(ValueError, match="needs the checkpoint's processor"):
        CaptionScorer(model, replace(processors, processor=None))


def test_device_and_device_map_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="were both given"):
        CaptionScorer.from_pretrained(save_folder("blip", tmp_path), device="cpu", device_map="auto")


TEXTS = ["a cat", "a cat on a mat", "two dogs"]


def test_a_device_map_scores_as_one_device(tmp_path):
    folder = save_folder("llava", tmp_path)
    spread = CaptionScorer.from_pretrained(folder, device_map={"": "cpu"})
    expected = load(folder).score(photo(), TEXTS).information_gain
    assert (spread.score(photo(), TEXTS).information_gain - expected).abs().max() < 1e-4


def test_weights_offloaded_to_disk_score_as_others(tmp_path):
    folder = save_folder("llava", tmp_path / "model")
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    placed = {**parts, "model.language_model": "disk"}
    spread = CaptionScorer.from_pretrained(folder, device_map=placed, offload_folder=str(tmp_path / "offload"))
    expected = load(folder).score(photo(), TEXTS).information_gain
    assert (spread.score(photo(), TEXTS).information_gain - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "dtype",
    [pytest.param("bfloat16", marks=pytest.mark.skipif(BFLOAT16_ATTENTION_FAILS, reason=BFLOAT16_REASON)), "float16"],
)
def test_low_precision_is_near_to_float32(dtype, tmp_path):
    folder = save_folder("llava", tmp_path)
    scorer = CaptionScorer.from_pretrained(folder, dtype=dtype)
    scores = scorer.score(photo(), TEXTS)
    expected = load(folder).score(photo(), TEXTS)
    assert scores.caption_log_likelihood.dtype == torch.float32
    assert scorer.verification.mode != "generate"
    assert (scores.caption_log_likelihood - expected.caption_log_likelihood).abs().max() < 3


def test_weights_quantised_by_torchao_are_scored_with(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    folder = save_folder("llava", tmp_path)
    config = hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    scorer = CaptionScorer.from_pretrained(folder, quantization_config=config, device_map="cpu")
    scores = scorer.score(photo(), TEXTS)
    assert scorer.verification.mode == "tree"
    expected = load(folder).score(photo(), TEXTS)
    difference = (scores.caption_log_likelihood - expected.caption_log_likelihood).abs().max()
    assert 0 < difference < 1  # 8 bits, not 32
    labels = scorer.compile_labels(TEXTS, "{}")
    assert labels.texts.fingerprint != load(folder).compile_labels(TEXTS, "{}").texts.fingerprint


# Prompts


def prompt_of(template: str, instruction: str = "What is it?") -> Prompt:
    model, processors = captioner("llava")
    processor = copy.copy(processors.processor)
    processor.chat_template = template
    return Prompt(model, replace(processors, processor=processor), instruction)


def test_a_text_ends_with_the_token_that_ends_a_turn():
    prompt = prompt_of(CHAT)
    assert prompt.lead == "" and prompt.tokenizer.convert_ids_to_tokens(prompt.end_token_id) == "</turn>"
    assert prompt.encode(["cat"]).input_ids[0, -1] == prompt.end_token_id


def test_a_template_that_ends_answers_with_nothing_falls_back_to_the_end_of_generate():
    template = CHAT.replace("</turn>\n", " ").replace("assistant\n", "assistant:").replace("role'] }}\n", "role'] }}: ")
    prompt = prompt_of(template)
    assert prompt.context.endswith("assistant:") and prompt.lead == " "
    assert prompt.end_token_id == 2
    words = prompt.tokenizer.decode(prompt.encode(["cat"]).input_ids[0])
    assert words == " cat</s>"


def test_thinking_is_switched_off_where_the_template_can():
    template = CHAT + "{% if add_generation_prompt and enable_thinking is not defined %}<think>\n{% endif %}"
    assert "<think>" not in prompt_of(template).context


def test_a_template_that_always_thinks_is_refused():
    template = CHAT + "{% if add_generation_prompt %}<think>\n{% endif %}"
    with pytest.raises(ValueError, match="opens a thinking block before every answer"):
        prompt_of(template)


def test_an_instruction_with_a_placeholder_is_the_whole_prompt():
    scorer = CaptionScorer(*captioner("llava"), prompt="USER: <image>\nWhat is it? ASSISTANT:")
    assert scorer.prompt.context == "USER: <image>\nWhat is it? ASSISTANT:" and scorer.prompt.lead == " "
    ids = scorer.prompt.inputs()["input_ids"][0]
    assert 3 not in ids and scorer.processors.tokenizer.decode(ids) == "<s>USER: \nWhat is it? ASSISTANT:"
    assert (scorer.prompt.inputs(photo())["input_ids"] == 3).sum() == 16


def test_tokens_that_prompt_and_text_share_are_scored_as_part_of_the_text(monkeypatch):
    """A tokenizer that merges across the border: the prompt is cut where all encodings still agree with it."""
    scorer = CaptionScorer(*captioner("blip"), prompt="a ")
    plain = type(scorer.prompt)._tokens

    def merged(self, texts):
        """A space and the letter behind it are one token, written as that letter's with 7 added."""
        out = []
        for text in texts:
            ids, skip = [], False
            for index, token in enumerate(plain(self, [text])[0]):
                follows = index + 1 < len(text) and text[index] == " "
                if skip:
                    ids.append(token + 7)
                elif not follows:
                    ids.append(token)
                skip = follows
            out.append(ids)
        return out

    monkeypatch.setattr(type(scorer.prompt), "_tokens", merged)
    encoded = scorer.prompt.encode(["cat", "dog"])
    assert encoded.dropped == 1 and encoded.input_ids.shape[1] == 4  # (space + c), a, t, end
    whole, cut = scorer.prompt.inputs(photo()), scorer.prompt.inputs(photo(), encoded.dropped)
    assert cut["input_ids"].tolist() == whole["input_ids"][:, :-1].tolist()
    assert cut["pixel_values"].shape == whole["pixel_values"].shape


def test_blip_begins_with_its_own_start_token():
    """[DEC], where the tokenizer would put [CLS] and [SEP] around a prompt."""
    scorer = CaptionScorer(*captioner("blip"), prompt="a photo of")
    ids = scorer.prompt.inputs(photo())["input_ids"][0].tolist()
    assert ids[0] == 6 and ids[-1] != 2
    assert scorer.prompt.encode(["a cat"]).input_ids[0, -1] == 2
    assert scorer.processors.tokenizer("a photo of")["input_ids"][0] == 1


def test_paligemma_prompt_tokens_are_of_the_type_that_sees_all():
    scorer = CaptionScorer(*captioner("paligemma"))
    for image in (photo(), None):
        inputs = scorer.prompt.inputs(image)
        assert not inputs["token_type_ids"].any() and "labels" not in inputs
        assert scorer.processors.tokenizer.decode(inputs["input_ids"][0]).endswith("<s>caption en\n")
