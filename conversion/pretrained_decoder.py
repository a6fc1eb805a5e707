"""GPT-2 as this package's text decoder: which weight becomes which, and whether log P(T) stays the same.

transformers' `Conv1D` holds the transpose of a linear weight, and queries, keys and values are one matrix. GPT-2's
variants of the attention's scale are multiplied into the queries. Whatever reads the image is not in GPT-2 and stays
random: the projection of the prefix, or the cross-attention.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from ig_captioner import IGCaptionerForConditionalGeneration

from .pretrained_encoder import MAX_DIFFERENCE, Taken, load_source
from .reading import ConversionError


# Fields of our configuration that GPT-2's weights leave open; of positions, the first ones are taken.
OPEN_FIELDS = ("fusion", "num_text_only_layers", "max_position_embeddings", "dropout", "attention_dropout")
MODULES = {
    "transformer.wte": "model.decoder.embed_tokens",
    "transformer.wpe": "model.decoder.embed_positions",
    "transformer.ln_f": "model.decoder.norm",
    "lm_head": "lm_head",
}
BLOCK = {"ln_1": "self_attn_norm", "ln_2": "mlp_norm"}
CONV1D = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
IMAGE_PARTS = ("crossattention", "ln_cross_attn")  # of a decoder that has read an encoder before


@dataclass
class Decoder:
    """A language model to start from. fields: of `IGCaptionerTextConfig`, as its architecture has them."""

    model: GPT2LMHeadModel
    taken: Taken
    fields: dict


def load_decoder(decoder: str | Path) -> Decoder:
    """Raises ConversionError if the model is no GPT-2, or incomplete."""
    model_type = AutoConfig.from_pretrained(decoder).model_type
    if model_type != GPT2Config.model_type:
        raise ConversionError(f"a decoder of type {model_type!r} cannot be used: known is 'gpt2'")
    model, beside = load_source(GPT2LMHeadModel, decoder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    names = model.state_dict().keys() - tied
    dropped = {name for name in names if any(part in name for part in IMAGE_PARTS)}
    taken = Taken(str(decoder), sorted(names - dropped), sorted(dropped) + beside)
    return Decoder(model, taken, text_fields(model.config))


def text_fields(source: GPT2Config) -> dict:
    """Fields of `IGCaptionerTextConfig`. Dropout after the embeddings is left out: there is none here."""
    act = source.activation_function
    return {
        "vocab_size": source.vocab_size,
        "hidden_size": source.n_embd,
        "intermediate_size": source.n_inner or 4 * source.n_embd,
        "num_hidden_layers": source.n_layer,
        "num_attention_heads": source.n_head,
        "max_position_embeddings": source.n_positions,
        "hidden_act": "gelu_pytorch_tanh" if act == "gelu_new" else act,  # two names for the same function
        "norm_eps": source.layer_norm_epsilon,
        "dropout": source.resid_pdrop,
        "attention_dropout": source.attn_pdrop,
        "initializer_range": source.initializer_range,
    }


def merge_fields(source: dict, stated: dict) -> dict:
    """The source's fields with the user's. Raises ConversionError naming what GPT-2's weights do not allow."""
    wrong = [name for name, value in stated.items() if name not in OPEN_FIELDS and source.get(name) != value]
    if wrong:
        raise ConversionError(
            f"the decoder's weights decide {', '.join(wrong)}; beside it you may choose {', '.join(OPEN_FIELDS)}"
        )
    merged = {**source, **stated}
    if merged["max_position_embeddings"] > source["max_position_embeddings"]:
        raise ConversionError(
            f"max_position_embeddings is {merged['max_position_embeddings']}, but the decoder knows "
            f"{source['max_position_embeddings']} positions"
        )
    return merged


def translate(decoder: Decoder, positions: int) -> dict[str, Tensor]:
    """Weights of [`IGCaptionerForConditionalGeneration`], with the first `positions` of the source's."""
    config = decoder.model.config
    weights = decoder.model.state_dict()
    ours = {}
    for name in decoder.taken.loaded:
        module, _, kind = name.rpartition(".")
        if module in MODULES:
            ours[f"{MODULES[module]}.{kind}"] = weights[name]
            continue
        number, _, part = module.removeprefix("transformer.h.").partition(".")
        layer = f"model.decoder.layers.{number}"
        weight = weights[name]
        linear = weight.T if weight.ndim == 2 else weight
        if part in BLOCK:
            ours[f"{layer}.{BLOCK[part]}.{kind}"] = weight
        elif part in CONV1D:
            ours[f"{layer}.{CONV1D[part]}.{kind}"] = linear
        elif part == "attn.c_attn":
            query, key, value = linear.chunk(3)
            ours[f"{layer}.self_attn.q_proj.{kind}"] = query * _query_factor(config, int(number))
            ours |= {f"{layer}.self_attn.k_proj.{kind}": key, f"{layer}.self_attn.v_proj.{kind}": value}
        else:
            raise ConversionError(f"the source's weight {name} has no place in this package's decoder")
    ours["model.decoder.embed_positions.weight"] = ours["model.decoder.embed_positions.weight"][:positions]
    return ours


def _query_factor(config: GPT2Config, layer: int) -> float:
    """GPT-2's scale of the attention scores over ours, 1 / sqrt(head size)."""
    factor = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
    return factor / (layer + 1) if config.scale_attn_by_inverse_layer_idx else factor


def fill_decoder(model: IGCaptionerForConditionalGeneration, decoder: Decoder) -> list[str]:
    """Gives `model` the decoder's weights. Returns the names in the decoder that stay random.

    Raises:
        ConversionError: if log P(T) differs from the source's.
    """
    weights = translate(decoder, model.config.text_config.max_position_embeddings)
    left, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise ConversionError(f"the decoder has no place for {', '.join(unexpected)}")
    decoder.taken.difference = logit_difference(decoder.model, model)
    if not decoder.taken.difference < MAX_DIFFERENCE:
        raise ConversionError(f"logits differ from the source's by {decoder.taken.difference:.1e} of the largest one")
    return [name for name in left if name.startswith("model.decoder.")]


@torch.no_grad()
def logit_difference(source: GPT2LMHeadModel, ours: IGCaptionerForConditionalGeneration) -> float:
    """Largest difference of logits without an image on random tokens, relative to the largest logit."""
    text = ours.config.text_config
    shape = (2, min(16, text.max_position_embeddings))
    tokens = torch.randint(text.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected = source(tokens, use_cache=False).logits
    found = ours(input_ids=tokens, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())
