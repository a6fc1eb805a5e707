"""Captioners with real processors, tiny and random, as models in memory or as folders that load like those of the Hub.

The tokenizer is byte-level BPE without merges: any text is tokens, one per byte.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from captioner_builds import CLIP, GEMMA, LLAMA, OPT, QFORMER, SIGLIP, SMALL, T5, VISION, random_model
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from ig_captioner.captioners.prompts import Processors


PAD, START, END, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPECIAL = [PAD, START, END, IMAGE, "<turn>", "</turn>", "[DEC]"]
VOCABULARY = len(SPECIAL) + 256
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def tokenizer(template: str = "$A", **kwargs: Any) -> hf.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    names = [(name, words[name]) for name in SPECIAL]
    made.post_processor = TemplateProcessing(single=template, special_tokens=names)
    roles = {"pad_token": PAD, "bos_token": START, "eos_token": END, "cls_token": START, "sep_token": END}
    extra = {"extra_special_tokens": {"image_token": IMAGE}} if kwargs.pop("knows_images", True) else {}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **roles, **extra, **kwargs)


def photo(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    noise = torch.randint(256, (*size[::-1], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def text_config(config: dict) -> dict:
    return {**config, **IDS, "vocab_size": VOCABULARY, "max_position_embeddings": 512}


CLIP_IMAGES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SQUARE = {"size": {"height": 16, "width": 16}}


def llava() -> tuple[hf.PreTrainedModel, Any]:
    config = hf.LlavaConfig(
        vision_config=CLIP, text_config=text_config(LLAMA), image_token_index=3, vision_feature_layer=-2
    )
    images = hf.CLIPImageProcessorPil(**CLIP_IMAGES)
    settings = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(images, tokenizer(f"{START} $A"), chat_template=CHAT, **settings)
    return random_model(hf.LlavaForConditionalGeneration, config), processor


def blip() -> tuple[hf.PreTrainedModel, Any]:
    text = {**SMALL, **IDS, "bos_token_id": 6, "sep_token_id": 2, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    text |= {"encoder_hidden_size": 32, "projection_dim": 32, "max_position_embeddings": 128, "is_decoder": True}
    config = hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=32)
    images = hf.BlipImageProcessorPil(**SQUARE)
    return random_model(hf.BlipForConditionalGeneration, config), hf.BlipProcessor(
        images, tokenizer(f"{START} $A {END}")
    )


def git() -> tuple[hf.PreTrainedModel, Any]:
    text = {**SMALL, **IDS, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 128}
    model = random_model(hf.GitForCausalLM, hf.GitConfig(vision_config=VISION, **text))
    return model, hf.GitProcessor(hf.CLIPImageProcessorPil(**CLIP_IMAGES), tokenizer(f"{START} $A {END}"))


def paligemma() -> tuple[hf.PreTrainedModel, Any]:
    sizes = {"projection_dim": 32, "hidden_size": 32, "vocab_size": VOCABULARY, "image_token_index": 3}
    text = {**text_config(GEMMA), "model_type": "gemma"}
    model = random_model(
        hf.PaliGemmaForConditionalGeneration, hf.PaliGemmaConfig(vision_config=SIGLIP, text_config=text, **sizes)
    )
    images = hf.SiglipImageProcessorPil(**SQUARE)
    images.image_seq_length = 16
    return model, hf.PaliGemmaProcessor(images, tokenizer(f"{START} $A"))


def vit_gpt2() -> tuple[hf.PreTrainedModel, Any]:
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
    decoder = hf.GPT2Config(**sizes, add_cross_attention=True, is_decoder=True, bos_token_id=1, eos_token_id=2)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = random_model(hf.VisionEncoderDecoderModel, config)
    model.generation_config.decoder_start_token_id = 1
    return model, (tokenizer(), hf.ViTImageProcessorPil(**SQUARE))


QUERIES = {"vision_config": VISION, "qformer_config": {**QFORMER, "vocab_size": VOCABULARY}, "num_query_tokens": 6}


def blip2_opt() -> tuple[hf.PreTrainedModel, Any]:
    config = hf.Blip2Config(text_config=text_config(OPT), **QUERIES, image_token_index=3)
    processor = hf.Blip2Processor(
        hf.BlipImageProcessorPil(**SQUARE), tokenizer(f"{START} $A", knows_images=False), num_query_tokens=6
    )
    return random_model(hf.Blip2ForConditionalGeneration, config), processor


def blip2_t5() -> tuple[hf.PreTrainedModel, Any]:
    text = {**T5, "vocab_size": VOCABULARY, "eos_token_id": 2}
    config = hf.Blip2Config(text_config=text, **QUERIES, image_token_index=3)
    processor = hf.Blip2Processor(
        hf.BlipImageProcessorPil(**SQUARE), tokenizer(f"$A {END}", knows_images=False), num_query_tokens=6
    )
    model = random_model(hf.Blip2ForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = 0
    return model, processor


def florence2() -> tuple[hf.PreTrainedModel, Any]:
    vision = {"model_type": "florence_vision", "embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 4]}
    vision |= {"num_groups": [2, 4], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    vision |= {"patch_prenorm": [False, True], "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0}
    vision |= {"max_temporal_embeddings": 4, "max_position_embeddings": 8}
    text = {**IDS, "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 256}
    for side in ("encoder", "decoder"):
        text |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    text |= {"decoder_start_token_id": 2, "forced_bos_token_id": 1}
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=3)
    model = random_model(hf.Florence2ForConditionalGeneration, config)
    settings = model.generation_config
    settings.decoder_start_token_id, settings.forced_bos_token_id, settings.forced_eos_token_id = 2, 1, None
    with torch.no_grad():
        num_tokens = model.model.get_image_features(torch.zeros(1, 3, 32, 32)).pooler_output.shape[1]
    made = tokenizer(f"{START} $A {END}")
    made.image_token, made.image_token_id = IMAGE, 3
    images = hf.CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    images.image_seq_length = num_tokens
    return model, hf.Florence2Processor(images, made)


def pix2struct() -> tuple[hf.PreTrainedModel, Any]:
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    text |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 64, "d_kv": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "patch_size": 4, "seq_len": 64}
    config = hf.Pix2StructConfig(text_config=text, vision_config=vision)
    images = hf.Pix2StructImageProcessorPil(patch_size={"height": 4, "width": 4}, max_patches=24, is_vqa=False)
    model = random_model(hf.Pix2StructForConditionalGeneration, config)
    model.generation_config.decoder_start_token_id = 0
    return model, hf.Pix2StructProcessor(images, tokenizer(f"$A {END}"))


def idefics3() -> tuple[hf.PreTrainedModel, Any]:
    sizes = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": False}
    images, made = hf.Idefics3ImageProcessorPil(**sizes), tokenizer(f"{START} $A")
    processor = hf.Idefics3Processor(images, made, image_seq_len=4, chat_template=CHAT)
    text = {**text_config(LLAMA), "vocab_size": len(made)}
    config = hf.Idefics3Config(vision_config=VISION, text_config=text, image_token_id=3, scale_factor=2)
    return random_model(hf.Idefics3ForConditionalGeneration, config), processor


def kosmos2() -> tuple[hf.PreTrainedModel, Any]:
    made = tokenizer(knows_images=False, unk_token="[DEC]")
    processor = hf.Kosmos2Processor(hf.CLIPImageProcessorPil(**CLIP_IMAGES), made, num_patch_index_tokens=4)
    text = {"vocab_size": len(made), "embed_dim": 32, "ffn_dim": 64, "layers": 2, "attention_heads": 4}
    text |= {"max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=64)
    return random_model(hf.Kosmos2ForConditionalGeneration, config), processor


FOLDERS: dict[str, Callable[[], tuple[hf.PreTrainedModel, Any]]] = {
    "llava": llava,
    "blip": blip,
    "git": git,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "vit_gpt2": vit_gpt2,
    "blip2_opt": blip2_opt,
    "blip2_t5": blip2_t5,
    "florence2": florence2,
    "pix2struct": pix2struct,
    "kosmos2": kosmos2,
}


@cache
def captioner(name: str) -> tuple[hf.PreTrainedModel, Processors]:
    """A model and its processors, made once; tests leave them as they are."""
    model, processor = FOLDERS[name]()
    if isinstance(processor, tuple):
        return model, Processors(*processor)
    return model, Processors(processor.tokenizer, processor.image_processor, processor)


def save_folder(name: str, directory: Path) -> str:
    """Writes the folder of a captioner, as `from_pretrained` reads it."""
    model, processors = captioner(name)
    model.save_pretrained(directory)
    if processors.processor is not None:
        processors.processor.save_pretrained(directory)
    else:
        processors.tokenizer.save_pretrained(directory)
        processors.image_processor.save_pretrained(directory)
    return str(directory)
