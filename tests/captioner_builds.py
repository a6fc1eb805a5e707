"""Captioners of the Hub's families, tiny and random, with the tensors that their processors would make.

A build is a model, its inputs for one image, and its inputs without an image (None where it needs one). Texts are
made of tokens 3 to 79; 99 stands for an image token, 2 ends a text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers as hf
from torch import Tensor

from ig_captioner.label_trie import TextTrie, build_trie
from tiny import padded


VOCABULARY, IMAGE, END = 120, 99, 2
PROMPT = [10, 11, 12]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
VISION = {**SMALL, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
DECODER = {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": VOCABULARY, **SPECIAL}
LLAMA = {**DECODER, "model_type": "llama", "max_position_embeddings": 512}
GEMMA = {**DECODER, "num_hidden_layers": 4, "head_dim": 8, "max_position_embeddings": 512}
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}


@dataclass
class Build:
    model: hf.PreTrainedModel
    inputs: dict[str, Tensor]
    without_image: dict[str, Tensor] | None = None
    pixels: str = "pixel_values"

    def image(self, seed: int) -> dict[str, Tensor]:
        """The inputs with another random image."""
        pixels = self.inputs[self.pixels]
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
        if self.pixels == "flattened_patches":  # begins with row and column of each patch
            noise[..., :2] = pixels[..., :2]
        return {**self.inputs, self.pixels: noise}


def random_model(model_class, config, seed: int = 0) -> hf.PreTrainedModel:
    """Weights large enough that every part of a model matters, biases and norms included."""
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def prompted(before: list[int], num_image_tokens: int, after: list[int] = PROMPT) -> dict[str, Tensor]:
    ids = torch.tensor([[*before, *[IMAGE] * num_image_tokens, *after]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_only(*fields: str) -> dict[str, Tensor]:
    """The prompt without an image; further fields are zeros."""
    ids = torch.tensor([[1, *PROMPT]])
    return {"input_ids": ids, **{name: torch.zeros_like(ids) for name in fields}}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 3, 16, 16)), generator=torch.Generator().manual_seed(5))


def llava() -> Build:
    config = hf.LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, vision_feature_layer=-2)
    model = random_model(hf.LlavaForConditionalGeneration, config)
    return Build(model, {**prompted([1], 16), "pixel_values": pixels()}, text_only())


def vipllava() -> Build:
    config = hf.VipLlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE)
    config.vision_feature_layers = [-1, -2]
    config.vision_config.num_hidden_layers = 2
    model = random_model(hf.VipLlavaForConditionalGeneration, config)
    return Build(model, {**prompted([1], 16), "pixel_values": pixels()}, text_only())


def _any_resolution(model_class, config) -> Build:
    model, patches, sizes = random_model(model_class, config), pixels(1, 2, 3, 16, 16), torch.tensor([[16, 16]])
    with torch.no_grad():
        features = model.model.get_image_features(patches, sizes).pooler_output
    inputs = prompted([1], sum(len(of_image) for of_image in features))
    return Build(model, {**inputs, "pixel_values": patches, "image_sizes": sizes}, text_only())


def llava_next() -> Build:
    vision = {"vision_config": CLIP, "vision_feature_layer": -2, "image_grid_pinpoints": [[16, 16], [32, 16]]}
    config = hf.LlavaNextConfig(**vision, text_config=LLAMA, image_token_index=IMAGE)
    return _any_resolution(hf.LlavaNextForConditionalGeneration, config)


def llava_onevision() -> Build:
    vision = {"vision_config": SIGLIP, "vision_feature_layer": -1, "image_grid_pinpoints": [[16, 16], [32, 16]]}
    text = {**DECODER, "model_type": "qwen2", "max_position_embeddings": 512}
    config = hf.LlavaOnevisionConfig(**vision, text_config=text, image_token_index=IMAGE, video_token_index=98)
    return _any_resolution(hf.LlavaOnevisionForConditionalGeneration, config)


def paligemma(second: bool = False, window: int = 64) -> Build:
    text = {**GEMMA, "model_type": "gemma"}
    if second:
        text |= {"model_type": "gemma2", "sliding_window": window, "query_pre_attn_scalar": 8}
    sizes = {"projection_dim": 32, "hidden_size": 32, "vocab_size": VOCABULARY}
    config = hf.PaliGemmaConfig(vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, **sizes)
    model, inputs = random_model(hf.PaliGemmaForConditionalGeneration, config), prompted([], 16, [1, *PROMPT])
    types = torch.zeros_like(inputs["input_ids"])
    return Build(model, {**inputs, "token_type_ids": types, "pixel_values": pixels()}, text_only("token_type_ids"))


def gemma3(window: int = 64) -> Build:
    text = {**GEMMA, "model_type": "gemma3_text", "sliding_window": window, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    tokens = {"image_token_index": IMAGE, "boi_token_index": 98, "eoi_token_index": 97, "mm_tokens_per_image": 4}
    model = random_model(
        hf.Gemma3ForConditionalGeneration, hf.Gemma3Config(vision_config=SIGLIP, text_config=text, **tokens)
    )
    inputs = prompted([1, 98], 4, [97, *PROMPT])
    types = (inputs["input_ids"] == IMAGE).long()
    return Build(model, {**inputs, "token_type_ids": types, "pixel_values": pixels()}, text_only("token_type_ids"))


def _grid(model_class, config) -> Build:
    """Qwen-VL: 4 x 6 patches in a row, merged to 6 tokens."""
    inputs = prompted([1, 97], 6, [96, *PROMPT])
    types = (inputs["input_ids"] == IMAGE).int()
    inputs |= {"pixel_values": pixels(24, 48), "image_grid_thw": torch.tensor([[1, 4, 6]]), "mm_token_type_ids": types}
    return Build(random_model(model_class, config), inputs, text_only())


QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}
QWEN_WIDTH = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
QWEN_TEXT = {**DECODER, "max_position_embeddings": 512, "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]}}


def qwen2_vl() -> Build:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_TOKENS)
    return _grid(hf.Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl() -> Build:
    vision = {**QWEN_VISION, **QWEN_WIDTH, "window_size": 16, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=QWEN_TEXT, **QWEN_TOKENS)
    return _grid(hf.Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl() -> Build:
    vision = {**QWEN_VISION, **QWEN_WIDTH, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config={**QWEN_TEXT, "head_dim": 8}, **QWEN_TOKENS)
    return _grid(hf.Qwen3VLForConditionalGeneration, config)


def qwen3_5() -> Build:
    vision = {**QWEN_VISION, **QWEN_WIDTH, "num_position_embeddings": 64}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    text = {**QWEN_TEXT, **linear, "head_dim": 8, "num_hidden_layers": 4}
    text["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    text["rope_parameters"] = {**ROTARY, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = hf.Qwen3_5Config(vision_config=vision, text_config=text, **QWEN_TOKENS)
    return _grid(hf.Qwen3_5ForConditionalGeneration, config)


def idefics2() -> Build:
    latents = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8}
    text = {**DECODER, "model_type": "mistral", "sliding_window": None}
    perceiver = {**latents, "num_key_value_heads": 2, "hidden_size": 32}
    config = hf.Idefics2Config(vision_config=VISION, perceiver_config=perceiver, text_config=text, image_token_id=IMAGE)
    return _masked_pixels(hf.Idefics2ForConditionalGeneration, config)


def _masked_pixels(model_class, config) -> Build:
    inputs = {**prompted([1], 4), "pixel_values": pixels(1, 1, 3, 16, 16)}
    inputs["pixel_attention_mask"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    return Build(random_model(model_class, config), inputs, text_only())


def idefics3() -> Build:
    settings = {"vision_config": VISION, "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 2}
    return _masked_pixels(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config(**settings, pad_token_id=0))


def smolvlm() -> Build:
    settings = {"vision_config": VISION, "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 2}
    return _masked_pixels(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig(**settings, pad_token_id=0))


def internvl() -> Build:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    settings = {"image_token_id": IMAGE, "image_seq_length": 4, "downsample_ratio": 0.5}
    config = hf.InternVLConfig(vision_config=vision, text_config=LLAMA, **settings)
    model = random_model(hf.InternVLForConditionalGeneration, config)
    return Build(model, {**prompted([1], 4), "pixel_values": pixels()}, text_only())


def aya_vision() -> Build:
    text = {**GEMMA, "model_type": "cohere2", "logit_scale": 0.25, "sliding_window": 64}
    settings = {"image_token_index": IMAGE, "downsample_factor": 2, "vision_feature_layer": -1}
    config = hf.AyaVisionConfig(
        vision_config=SIGLIP, text_config=text, vision_feature_select_strategy="full", **settings
    )
    model = random_model(hf.AyaVisionForConditionalGeneration, config)
    return Build(model, {**prompted([1], 4), "pixel_values": pixels()}, text_only())


def mistral3() -> Build:
    text = {**DECODER, "model_type": "mistral", "head_dim": 8, "sliding_window": None}
    settings = {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1}
    config = hf.Mistral3Config(vision_config={**VISION, "model_type": "pixtral"}, text_config=text, **settings)
    model = random_model(hf.Mistral3ForConditionalGeneration, config)
    return Build(
        model, {**prompted([1], 4), "pixel_values": pixels(), "image_sizes": torch.tensor([[16, 16]])}, text_only()
    )


def llama4(chunk: int = 64) -> Build:
    projection = {"pixel_shuffle_ratio": 0.5, "projector_input_dim": 32, "projector_output_dim": 32}
    vision = {**VISION, **projection, "vision_output_dim": 32, "intermediate_size": 128, "rope_parameters": ROTARY}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    text = {**GEMMA, **experts, "attention_chunk_size": chunk, "rope_parameters": ROTARY}
    text["layer_types"] = ["chunked_attention"] * 3 + ["full_attention"]
    tokens = {"image_token_index": IMAGE, "boi_token_index": 98, "eoi_token_index": 97}
    config = hf.Llama4Config(vision_config=vision, text_config=text, **tokens)
    model = random_model(hf.Llama4ForConditionalGeneration, config)
    return Build(model, {**prompted([1], 4), "pixel_values": pixels()}, text_only())


def lfm2_vl() -> Build:
    layers = ["conv", "full_attention"] * 2
    text = {**DECODER, "model_type": "lfm2", "num_hidden_layers": 4, "layer_types": layers, "conv_L_cache": 3}
    vision = {**SMALL, "model_type": "siglip2_vision_model", "num_hidden_layers": 2, "patch_size": 4}
    vision |= {"num_patches": 16, "vision_use_head": False}
    settings = {"image_token_id": IMAGE, "downsample_factor": 2, "projector_hidden_size": 32}
    config = hf.Lfm2VlConfig(vision_config=vision, text_config={**text, "block_multiple_of": 8}, **settings)
    patches = {"pixel_values": pixels(1, 16, 48), "spatial_shapes": torch.tensor([[4, 4]])}
    patches["pixel_attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    model = random_model(hf.Lfm2VlForConditionalGeneration, config)
    return Build(model, {**prompted([1], 4), **patches}, text_only())


def mllama() -> Build:
    text = {**DECODER, "model_type": "mllama_text_model", "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text |= {"max_position_embeddings": 256, "rope_parameters": ROTARY}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "image_size": 16, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    seen = torch.zeros(1, 5, 1, 2, dtype=torch.long)
    seen[:, 1:, :, 0] = 1  # the second tile is padding
    inputs = {**prompted([1], 1), "pixel_values": pixels(1, 1, 2, 3, 16, 16), "cross_attention_mask": seen}
    inputs |= {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1, 0]]])}
    return Build(random_model(hf.MllamaForConditionalGeneration, config), inputs, text_only())


def blip() -> Build:
    text = {**SMALL, **SPECIAL, "vocab_size": VOCABULARY, "num_hidden_layers": 3, "encoder_hidden_size": 32}
    text |= {"projection_dim": 32, "max_position_embeddings": 64, "sep_token_id": END, "is_decoder": True}
    config = hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=32)
    start = {"input_ids": torch.tensor([[1]])}
    return Build(random_model(hf.BlipForConditionalGeneration, config), {**start, "pixel_values": pixels()}, start)


def git() -> Build:
    text = {**SMALL, **SPECIAL, "vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 64}
    model = random_model(hf.GitForCausalLM, hf.GitConfig(vision_config=VISION, **text))
    start = {"input_ids": torch.tensor([[1]]), "attention_mask": torch.tensor([[1]])}
    return Build(model, {**start, "pixel_values": pixels()}, start)


def _blip2(model_class, config, **more: Tensor) -> Build:
    inputs = prompted([], 6, [1, *PROMPT])
    return Build(random_model(model_class, config), {**inputs, "pixel_values": pixels(), **more}, text_only())


QFORMER = {**SMALL, "vocab_size": VOCABULARY, "num_hidden_layers": 2, "encoder_hidden_size": 32}
QFORMER |= {"cross_attention_frequency": 1}
QUERIES = {"vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": 6, "image_token_index": IMAGE}
OPT = {**SPECIAL, "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64}
OPT |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
T5 = {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": END}


def blip2_opt() -> Build:
    return _blip2(hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=OPT, **QUERIES))


def instructblip() -> Build:
    config = hf.InstructBlipConfig(text_config=LLAMA, **QUERIES)
    question = torch.tensor([[5, 6, 7]])
    more = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return _blip2(hf.InstructBlipForConditionalGeneration, config, **more)


def blip2_t5() -> Build:
    build = _blip2(hf.Blip2ForConditionalGeneration, hf.Blip2Config(text_config=T5, **QUERIES))
    start = {"decoder_input_ids": torch.tensor([[0]])}
    return Build(build.model, {**build.inputs, **start}, {**text_only(), **start})


def vit_gpt2() -> Build:
    decoder = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=1,
        eos_token_id=END,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = random_model(hf.VisionEncoderDecoderModel, config)
    return Build(model, {"pixel_values": pixels(), "decoder_input_ids": torch.tensor([[1]])})


def florence2() -> Build:
    vision = {"model_type": "florence_vision", "embed_dim": [16, 32], "depths": [1, 1], "num_heads": [2, 4]}
    vision |= {"num_groups": [2, 4], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    vision |= {"patch_prenorm": [False, True], "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0}
    vision |= {"max_temporal_embeddings": 4, "max_position_embeddings": 8}
    text = {**SPECIAL, "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64}
    for side in ("encoder", "decoder"):
        text |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    text |= {"decoder_start_token_id": END, "forced_eos_token_id": END}
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    model, image = random_model(hf.Florence2ForConditionalGeneration, config), pixels(1, 3, 32, 32)
    with torch.no_grad():
        num_tokens = model.model.get_image_features(image).pooler_output.shape[1]
    inputs = prompted([1], num_tokens, [10, 11, END])
    return Build(model, {**inputs, "pixel_values": image, "decoder_input_ids": torch.tensor([[END]])})


def pix2struct() -> Build:
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    text |= {"pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 64, "d_kv": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "patch_size": 4, "seq_len": 32}
    config = hf.Pix2StructConfig(text_config=text, vision_config=vision)
    patches = pixels(1, 8, 50)
    patches[..., :2] = torch.arange(16).view(1, 8, 2) % 4
    mask = torch.tensor([[1.0] * 6 + [0.0] * 2])
    inputs = {"flattened_patches": patches, "attention_mask": mask, "decoder_input_ids": torch.tensor([[0]])}
    return Build(random_model(hf.Pix2StructForConditionalGeneration, config), inputs, pixels="flattened_patches")


def kosmos2() -> Build:
    text = {"vocab_size": VOCABULARY, "embed_dim": 32, "ffn_dim": 64, "layers": 3, "attention_heads": 4}
    text |= {"max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": END}
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4)
    ids = torch.tensor([[0, 90, 91, 91, 91, 91, 92, *PROMPT]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels()}
    inputs["image_embeds_position_mask"] = (ids == 91).long()
    return Build(random_model(hf.Kosmos2ForConditionalGeneration, config), inputs)


def kosmos2_5() -> Build:
    text = {"vocab_size": VOCABULARY, "embed_dim": 32, "ffn_dim": 64, "layers": 3, "attention_heads": 4}
    text |= {"max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": END}
    vision = {**SMALL, "patch_embed_hidden_size": 48, "head_dim": 8, "num_hidden_layers": 2, "max_num_patches": 64}
    config = hf.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=4)
    ids = torch.tensor([[0, 90, 91, 91, 91, 91, 92, *PROMPT]])
    patches = pixels(1, 8, 50)
    patches[..., :2] = torch.arange(16).view(1, 8, 2) % 4 + 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "flattened_patches": patches}
    inputs["image_embeds_position_mask"] = (ids == 91).long()
    model = random_model(hf.Kosmos2_5ForConditionalGeneration, config)
    return Build(model, inputs, pixels="flattened_patches")


def instructblip_t5() -> Build:
    build = instructblip()
    model = random_model(hf.InstructBlipForConditionalGeneration, hf.InstructBlipConfig(text_config=T5, **QUERIES))
    start = {"decoder_input_ids": torch.tensor([[0]])}
    return Build(model, {**build.inputs, **start}, {**text_only(), **start})


def fuyu() -> Build:
    config = hf.FuyuConfig(text_config={**LLAMA, "model_type": "persimmon"}, image_token_id=IMAGE, patch_size=4)
    inputs = {**prompted([], 6, [1, *PROMPT]), "pixel_values": pixels(1, 6, 48)}
    return Build(random_model(hf.FuyuForCausalLM, config), inputs, text_only())


QUANTISER = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "embed_dim": 16}
QUANTISER |= {"latent_channels": 16, "num_embeddings": 8}


def chameleon() -> Build:
    names = {"<image>": IMAGE, **{f"IMGIMG{'ABCDEFGH'[code]}Z": 104 + code for code in range(8)}}
    vq = {**QUANTISER, "resolution": 16}
    config = hf.ChameleonConfig(**{**DECODER, "num_key_value_heads": 4}, vq_config=vq, vocabulary_map=names)
    model = random_model(hf.ChameleonForConditionalGeneration, config)
    return Build(model, {**prompted([1], 64), "pixel_values": pixels()}, text_only())


def janus() -> Build:
    vision = {**VISION, "projection_dim": 32, "depth": 2, "num_image_tokens": 16}
    vq = {**QUANTISER, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32}
    config = hf.JanusConfig(vision_config=vision, text_config=LLAMA, vq_config=vq, image_token_id=IMAGE)
    model = random_model(hf.JanusForConditionalGeneration, config)
    return Build(model, {**prompted([1], 16), "pixel_values": pixels()}, text_only())


def phi4_multimodal() -> Build:
    vision = {**VISION, "image_size": 16, "crop_size": 16, "image_token_id": IMAGE}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 4, "input_size": 8}
    audio |= {"ext_pw_out_channel": 32, "nemo_conv_channels": 8, "audio_token_id": 98}
    text = {**DECODER, "max_position_embeddings": 512, "original_max_position_embeddings": 512}
    config = hf.Phi4MultimodalConfig(**text, vision_config=vision, audio_config=audio)
    model = random_model(hf.Phi4MultimodalForCausalLM, config)
    # 2 x 2 tokens and a separator per row, for the tile and the whole, and one between them
    inputs = {**prompted([1], 13), "image_pixel_values": pixels(1, 2, 3, 16, 16)}
    inputs |= {"image_sizes": torch.tensor([[16, 16]]), "image_attention_mask": torch.ones(1, 2, 4, 4)}
    return Build(model, inputs, text_only(), pixels="image_pixel_values")


def glm4v() -> Build:
    vision = {**QWEN_VISION, **QWEN_WIDTH, "image_size": 24, "temporal_patch_size": 1, "num_heads": 4}
    vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    text = {**QWEN_TEXT, "rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
    tokens = {"image_start_token_id": 97, "image_end_token_id": 96, "video_token_id": 98, "image_token_id": IMAGE}
    tokens |= {"video_start_token_id": 95, "video_end_token_id": 94}
    config = hf.Glm4vConfig(vision_config=vision, text_config=text, **tokens)
    return _grid(hf.Glm4vForConditionalGeneration, config)


BUILDS: dict[str, Callable[[], Build]] = {
    "llava": llava,
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "paligemma": paligemma,
    "paligemma2": lambda: paligemma(second=True),
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "aya_vision": aya_vision,
    "mistral3": mistral3,
    "llama4": llama4,
    "lfm2_vl": lfm2_vl,
    "mllama": mllama,
    "blip": blip,
    "git": git,
    "blip2_opt": blip2_opt,
    "instructblip": instructblip,
    "blip2_t5": blip2_t5,
    "vit_gpt2": vit_gpt2,
    "florence2": florence2,
    "pix2struct": pix2struct,
    "kosmos2": kosmos2,
    "kosmos2_5": kosmos2_5,
    "instructblip_t5": instructblip_t5,
    "fuyu": fuyu,
    "chameleon": chameleon,
    "janus": janus,
    "phi4_multimodal": phi4_multimodal,
    "glm4v": glm4v,
}


@cache
def build_of(name: str) -> Build:
    """A build, made once; tests leave it as it is."""
    return BUILDS[name]()


def trie_of(texts: list[list[int]], block_size: int = 24) -> TextTrie:
    """Small blocks, so that a trie has several of them."""
    return build_trie(*padded(texts), 0, block_size)


def random_texts(number: int = 10, longest: int = 6) -> list[list[int]]:
    """Texts that share beginnings and differ in length; each ends with END, and the second begins like the first."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for length in torch.randint(2, longest, (number,), generator=generator).tolist():
        own = torch.randint(3, 80, (longest,), generator=generator).tolist()
        words = [20, 21, 3 + own[0] % 5, *own[1:]][:length]
        texts.append([*words, END])
    texts[0] = [20, 21, 33, 34, END]
    texts[1] = [20, 21, 33, END]  # a label that is the beginning of another
    return texts
