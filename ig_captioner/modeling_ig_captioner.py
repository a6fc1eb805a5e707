"""IG Captioner: a ViT encoder and one text decoder that gives log P(T|I) and, without the image, log P(T).

    image  -> IGCaptionerVisionModel -> image tokens [B, P, E]
    tokens -> IGCaptionerTextDecoder.embed_text -> text-only layers -> fusion layers -> head -> log P [N, L, V]
                                                                       ^ keys and values of the image tokens

The decoder reads an image only as one pair of keys and values per fusion layer (`read_image`), computed once per image
whatever the number of texts. With `fusion="prefix"` these come from image tokens that pass through the same layers as a
bidirectional prefix, which never sees the text, and they stand in front of the text's own keys; with
`"cross_attention"` they come straight from the encoder. So one decoder serves three modes:

    conditional    causal text, with an image           log P(T|I)
    unconditional  causal text, no image is passed      log P(T)
    parallel       mask tokens only, no causal mask     CapPa's parallel prediction (arXiv 2306.07915)

Deliberate differences from the papers: the prefix carries no positions beyond those of the encoder; fusion may start
above `num_text_only_layers` layers of text, which both likelihoods share; image resampling follows big_vision.

Legend: B images, C candidate texts, N texts, P image tokens, L text tokens, E encoder width, D decoder width, H heads,
V vocabulary. Log-likelihoods are in nats.
"""

import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, GradientCheckpointingLayer, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ig_captioner import (
    REMOTE_CODE_FILES,
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
    as_height_width,
)
from .information_gain import (
    IGNORE_INDEX,
    information_gain,
    mean_negative_log_likelihood,
    sequence_log_likelihood,
    shift_right,
    text_mask,
    token_log_likelihoods,
)

# Not used here: code is fetched entry file by entry file with what that file imports, and a model so fetched must find
# all of its files beside this one when it is saved again.
from .pipeline_ig_captioner import IGZeroShotImageClassificationPipeline  # noqa: F401
from .processing_ig_captioner import IGCaptionerProcessor  # noqa: F401


KeyValues = tuple[Tensor, Tensor]  # keys and values, [B, H, P, head] each
# log P needs [texts, L, V] logits; a chunk of (image, text) pairs holds at most this many of them (256 MiB in float32).
MAX_LOGITS_PER_CHUNK = 2**26


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@dataclass
class IGCaptionerModelOutput(ModelOutput):
    """last_hidden_state [N, L, D]; image_key_values [N, fusion layers, 2, H, P, head] is what the decoder read."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class IGCaptionerCausalLMOutput(ModelOutput):
    """Output of [`IGCaptionerForConditionalGeneration`]. Losses are scalars in nats per token.

    loss: `conditional_weight * (captioning or parallel) + unconditional_weight * unconditional`.
    captioning_loss: CE(T|I) over the texts that were predicted causally.
    unconditional_loss: CE(T), without the image. Their difference is the information gain per token.
    parallel_loss: CE(T|I) over the texts that were predicted in parallel, if any.
    logits: [N, L, V]; position i predicts token i of `labels`, or the token after `input_ids[:, i]`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    captioning_loss: Tensor | None = None
    unconditional_loss: Tensor | None = None
    parallel_loss: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class IGCaptionerScoreOutput(ModelOutput):
    """caption_log_likelihood log P(T|I) [B, C], prior_log_likelihood log P(T) [C], information_gain [B, C]; in nats."""

    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None
    information_gain: Tensor | None = None


@dataclass
class IGCaptionerZeroShotOutput(ModelOutput):
    """logits_per_image [B, C] is the information gain in nats; its softmax is P(T|I) under equally likely texts."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None


def without(output: ModelOutput, *names: str) -> dict:
    """The fields of `output` that are set, except `names`."""
    return {name: value for name, value in output.items() if name not in names}


# ---------------------------------------------------------------------------------------------------------------------
# Blocks shared by encoder and decoder


def rotary_embedding(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, L, head_dim] float32 of half-split rotary positions."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`states` [N, H, L, head] turned by `rotary`."""
    cos, sin = rotary
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def make_norm(config: IGCaptionerVisionConfig | IGCaptionerTextConfig, size: int, bias: bool | None = None) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias if bias is None else bias)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Softmax attention spelled out. Returns [N, L, H, head] and the weights [N, H, L, S]."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class IGCaptionerAttention(nn.Module):
    """Multi-head attention whose keys and values are projected apart from the queries, so that they can be kept.

    Args:
        key_value_size: width of what is attended to; the width of the queries if not given.
    """

    def __init__(
        self,
        config: IGCaptionerVisionConfig | IGCaptionerTextConfig,
        key_value_size: int | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__()
        size, bias = config.hidden_size, config.attention_bias
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(key_value_size or size, size, bias=bias)
        self.v_proj = nn.Linear(key_value_size or size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def key_values(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> KeyValues:
        """Keys and values [N, H, S, head] of `hidden_states` [N, S, *]."""
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        return (key if rotary is None else rotate(key, rotary)), value

    def forward(
        self,
        hidden_states: Tensor,
        key_values: KeyValues,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        is_causal: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries from `hidden_states` [N, L, D] read `key_values`. Returns [N, L, D] and, if eager, the weights."""
        query = self._split_heads(self.q_proj(hidden_states))
        query = query if rotary is None else rotate(query, rotary)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self,
            query,
            *key_values,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout,
            is_causal=is_causal,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights


class IGCaptionerMLP(nn.Module):
    """`act(x W1) W2`, or gated: `act(x W_gate) * (x W1) W2` (GEGLU for a GELU)."""

    def __init__(self, config: IGCaptionerVisionConfig | IGCaptionerTextConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.up_proj(hidden_states)
        inner = self.act(inner) if self.gate_proj is None else self.act(self.gate_proj(hidden_states)) * inner
        return self.down_proj(inner)


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained base


class IGCaptionerPreTrainedModel(PreTrainedModel):
    config_class = IGCaptionerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["IGCaptionerVisionLayer", "IGCaptionerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, IGCaptionerPatchEmbeddings):
            for parameter in (module.position_embedding, module.register_tokens):
                if parameter is not None:
                    init.normal_(parameter, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code that `trust_remote_code=True` needs is saved along with the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if isinstance(self.config, IGCaptionerConfig):
            copy_remote_code(save_directory)


def copy_remote_code(directory: str | Path) -> list[str]:
    """Copies the Python files a saved model refers to, which stand beside this one. Returns their names."""
    here = Path(__file__).parent
    for name in REMOTE_CODE_FILES:
        if here.resolve() != Path(directory).resolve():
            shutil.copyfile(here / name, Path(directory) / name)
    return list(REMOTE_CODE_FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Image encoder


def sincos_position_embedding(grid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """Fixed 2-D positions [rows * columns, size]: sin x, cos x, sin y, cos y, as in big_vision (temperature 10,000)."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    omega = 10000.0 ** -(torch.arange(size // 4, device=device).float() / max(size // 4 - 1, 1))
    y, x = y.flatten()[:, None] * omega, x.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


class IGCaptionerPatchEmbeddings(nn.Module):
    """Pixels [B, channels, height, width] to image tokens [B, P, E]: patches row by row, then register tokens."""

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__()
        self.config = config
        self.patch_size = as_height_width(config.patch_size, "patch_size")
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, self.patch_size, bias=config.patch_bias
        )
        rows, columns = config.grid_size
        learned = config.position_embedding == "learned"
        registers = config.num_register_tokens
        self.position_embedding = nn.Parameter(torch.empty(rows * columns, config.hidden_size)) if learned else None
        self.register_tokens = nn.Parameter(torch.empty(registers, config.hidden_size)) if registers else None

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[P, E] for a grid of `(rows, columns)`; learned positions are resampled linearly with aligned corners."""
        if self.position_embedding is None:
            return sincos_position_embedding(grid, self.config.hidden_size, self.projection.weight.device)
        if grid == self.config.grid_size:
            return self.position_embedding
        learned = self.position_embedding.float().view(1, *self.config.grid_size, -1).permute(0, 3, 1, 2)
        resampled = F.interpolate(learned, size=grid, mode="bilinear", align_corners=True)
        return resampled.flatten(2)[0].T

    def forward(self, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be [B, {self.config.num_channels}, height, width], got {tuple(pixel_values.shape)}"
            )
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise ValueError(f"image size {height} x {width} is not a multiple of the patch size {self.patch_size}")
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        tokens = self.projection(pixel_values).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions((height // self.patch_size[0], width // self.patch_size[1])).to(tokens.dtype)
        if self.register_tokens is not None:
            tokens = torch.cat([tokens, self.register_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        return tokens


class IGCaptionerVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block over image tokens."""

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__()
        self.self_attn_norm = make_norm(config, config.hidden_size)
        self.self_attn = IGCaptionerAttention(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = IGCaptionerMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        normed = self.self_attn_norm(hidden_states)
        attended, _ = self.self_attn(normed, self.self_attn.key_values(normed), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class IGCaptionerVisionModel(IGCaptionerPreTrainedModel):
    """The ViT alone, for features. `pooler_output` [B, E] is the mean over the patches (registers are left out)."""

    config_class = IGCaptionerVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {
        "hidden_states": IGCaptionerVisionLayer,
        "attentions": OutputRecorder(IGCaptionerAttention, index=1),
    }

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__(config)
        self.embeddings = IGCaptionerPatchEmbeddings(config)
        self.layers = nn.ModuleList([IGCaptionerVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pixel_values` [B, channels, height, width] -> `last_hidden_state` [B, P, E], `pooler_output` [B, E]."""
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        patches = hidden_states[:, : hidden_states.shape[1] - self.config.num_register_tokens]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=patches.mean(dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Text decoder


@dataclass
class TextStates:
    """Texts after embedding and the text-only layers: all that the fusion layers need to know of them.

    hidden_states [N, L, D]; mask as the attention implementation takes it (None, [N, S] or [N, 1, L, S]); rotary
    cosines and sines [N, 1, L, head]; is_causal is False for parallel prediction.
    """

    hidden_states: Tensor
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    is_causal: bool

    def rows(self, index: Tensor) -> "TextStates":
        """The texts chosen by `index` [M]."""
        mask = None if self.mask is None else self.mask[index]
        rotary = None if self.rotary is None else (self.rotary[0][index], self.rotary[1][index])
        return TextStates(self.hidden_states[index], mask, rotary, self.is_causal)


def with_visible_prefix(mask: Tensor | None, length: int) -> Tensor | None:
    """`mask` [..., S] (boolean, additive, or 2-D of 0 and 1) widened to [..., length + S] by keys that all may see.

    None stays None: without a mask, flash attention aligns causality with the last key, which is the prefix-LM's.
    """
    if mask is None:
        return None
    return F.pad(mask, (length, 0), value=0.0 if mask.is_floating_point() else 1)


@dataclass
class IGCaptionerDecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    text_states: TextStates | None = None


class IGCaptionerDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block over text: self-attention, cross-attention if that is how it sees images, MLP."""

    def __init__(self, config: IGCaptionerTextConfig, layer_idx: int):
        super().__init__()
        size = config.hidden_size
        fuses = layer_idx >= config.num_text_only_layers
        self.has_prefix = fuses and config.fusion == "prefix"
        self.is_last = layer_idx == config.num_hidden_layers - 1
        self.self_attn_norm = make_norm(config, size)
        self.self_attn = IGCaptionerAttention(config, layer_idx=layer_idx)
        self.cross_attn = None
        if fuses and config.fusion == "cross_attention":
            self.cross_attn_norm = make_norm(config, size)
            self.cross_attn = IGCaptionerAttention(config, config.encoder_hidden_size, layer_idx)
        self.mlp_norm = make_norm(config, size)
        self.mlp = IGCaptionerMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        image_key: Tensor | None = None,
        image_value: Tensor | None = None,
        *,
        reads_image: bool = False,
        text: TextStates | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Text [N, L, D], or with `reads_image` image tokens [B, P, *], through the block.

        Both go through `forward`, so that wrappers around a layer (checkpointing, sharding) see every use of it; what
        needs a gradient is positional for the same reason.

        Returns:
            The new states; for image tokens also their keys and values [B, H, P, head].
        """
        if reads_image:
            return self._read_image(hidden_states, **kwargs)
        normed = self.self_attn_norm(hidden_states)
        key, value = self.self_attn.key_values(normed, text.rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.self_attn.layer_idx)
        mask, causal = text.mask, text.is_causal
        if image_key is not None and self.has_prefix:
            key, value = torch.cat([image_key, key], dim=2), torch.cat([image_value, value], dim=2)
            mask = with_visible_prefix(mask, image_key.shape[2])
        attended, _ = self.self_attn(normed, (key, value), mask, text.rotary, is_causal=causal, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        if image_key is not None and self.cross_attn is not None:
            attended, _ = self.cross_attn(self.cross_attn_norm(hidden_states), (image_key, image_value), **kwargs)
            hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))

    def _read_image(self, image_states: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        if self.cross_attn is not None:
            return image_states, *self.cross_attn.key_values(image_states)
        normed = self.self_attn_norm(image_states)
        key_values = self.self_attn.key_values(normed)
        if not self.is_last:  # nothing reads the image tokens after the last layer
            attended, _ = self.self_attn(normed, key_values, **kwargs)
            image_states = image_states + self.dropout(attended)
            image_states = image_states + self.dropout(self.mlp(self.mlp_norm(image_states)))
        return image_states, *key_values


class IGCaptionerTextDecoder(IGCaptionerPreTrainedModel):
    """Text in, states before the head out; the image comes in as `image_key_values`, or not at all."""

    config_class = IGCaptionerTextConfig
    base_model_prefix = "decoder"
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": OutputRecorder(IGCaptionerDecoderLayer, index=0),
        "attentions": OutputRecorder(IGCaptionerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(IGCaptionerAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: IGCaptionerTextConfig):
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.num_embeddings, size)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, size) if learned else None
        self.image_projection = nn.Linear(config.encoder_hidden_size, size) if config.fusion == "prefix" else None
        self.layers = nn.ModuleList([IGCaptionerDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config, size, bias=True)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def fusion_layers(self) -> nn.ModuleList:
        return self.layers[self.config.num_text_only_layers :]

    def read_image(self, encoder_hidden_states: Tensor, **kwargs) -> list[KeyValues]:
        """What each fusion layer needs of the images: keys and values [B, H, P, head], from [B, P, E]."""
        states = encoder_hidden_states
        if self.image_projection is not None:
            states = self.image_projection(states)
        image_key_values = []
        for layer in self.fusion_layers:
            states, key, value = layer(states, reads_image=True, **kwargs)
            image_key_values.append((key, value))
        return image_key_values

    def read_text(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        parallel_rows: Tensor | None = None,
        **kwargs,
    ) -> TextStates:
        """Embeds texts [N, L] and runs the text-only layers, which the image never reaches.

        Args:
            parallel_rows: [N] bool; these texts are replaced by mask tokens and lose the causal mask.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(self._mask_rows(input_ids, parallel_rows))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, attention_mask, past, parallel_rows)
        hidden_states, rotary = inputs_embeds, None
        if self.embed_positions is not None:
            self._check_length(inputs_embeds.shape[1], past)
            hidden_states = hidden_states + self.embed_positions(position_ids)
        else:
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rotary = rotary_embedding(position_ids, head_dim, self.config.rope_theta)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            # a prefix is put in front of the mask, and parallel texts open it: both need it spelled out
            allow_is_causal_skip=self.config.fusion == "cross_attention" and parallel_rows is None,
        )
        text = TextStates(hidden_states, mask, rotary, is_causal=True)
        if parallel_rows is not None:
            text.mask, text.is_causal = self._open_mask(mask, parallel_rows)
        for layer in self.layers[: self.config.num_text_only_layers]:
            text.hidden_states = layer(text.hidden_states, text=text, past_key_values=past_key_values, **kwargs)
        return text

    def fuse(
        self,
        text: TextStates,
        image_key_values: list[KeyValues] | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        """Runs the fusion layers and the final norm: [N, L, D]. Without `image_key_values` no image is involved."""
        hidden_states = text.hidden_states
        nothing = [(None, None)] * len(self.fusion_layers)
        for layer, key_value in zip(self.fusion_layers, image_key_values or nothing, strict=True):
            hidden_states = layer(hidden_states, *key_value, text=text, past_key_values=past_key_values, **kwargs)
        return self.norm(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: list[KeyValues] | None = None,
        parallel_rows: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> IGCaptionerDecoderOutput:
        """Texts [N, L] and what `read_image` made of N images to `last_hidden_state` [N, L, D]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        text = self.read_text(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, parallel_rows, **kwargs
        )
        hidden_states = self.fuse(text, image_key_values, past_key_values, **kwargs)
        return IGCaptionerDecoderOutput(
            last_hidden_state=hidden_states, past_key_values=past_key_values, text_states=text
        )

    def _mask_rows(self, input_ids: Tensor, parallel_rows: Tensor | None) -> Tensor:
        if parallel_rows is None:
            return input_ids
        if self.config.mask_token_id is None:
            raise ValueError("parallel prediction needs text_config.mask_token_id, got None")
        return input_ids.masked_fill(parallel_rows[:, None], self.config.mask_token_id)

    def _open_mask(self, mask: Tensor | None, parallel_rows: Tensor) -> tuple[Tensor | None, bool]:
        """The mask and causality of a batch whose `parallel_rows` [N] see every position, padding included."""
        if mask is None or mask.ndim == 2:  # flash attention: one causality for the whole batch
            if not bool(parallel_rows.all()):
                raise ValueError(
                    "flash attention cannot mix causal and parallel texts in one batch; use attn_implementation='sdpa'"
                )
            return None, False
        rows = parallel_rows[:, None, None, None]
        return (mask | rows) if mask.dtype == torch.bool else mask.masked_fill(rows, 0.0), True

    def _position_ids(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, past: int, parallel_rows: Tensor | None
    ) -> Tensor:
        """Positions [N, L]: from the first real token on, or for parallel texts, which have none, from the left edge."""
        length = inputs_embeds.shape[1]
        positions = (torch.arange(length, device=inputs_embeds.device) + past).expand(len(inputs_embeds), -1)
        if attention_mask is None or attention_mask.ndim != 2:
            return positions
        counted = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        return counted if parallel_rows is None else counted.where(~parallel_rows[:, None], positions)

    def _check_length(self, length: int, past: int) -> None:
        if isinstance(past, int) and past + length > self.config.max_position_embeddings:
            raise ValueError(
                f"the text has {past + length} tokens, but the model knows {self.config.max_position_embeddings} "
                "positions (text_config.max_position_embeddings)"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and decoder together


class IGCaptionerModel(IGCaptionerPreTrainedModel):
    """Image encoder and text decoder without a head."""

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        self.vision_model = IGCaptionerVisionModel._from_config(config.vision_config)
        self.decoder = IGCaptionerTextDecoder._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    def encode_image(self, pixel_values: Tensor) -> tuple[list[KeyValues], Tensor]:
        """Images [B, channels, height, width] to what the decoder reads of them, and to image tokens [B, P, E]."""
        image_tokens = self.vision_model(pixel_values=pixel_values).last_hidden_state
        return self.decoder.read_image(image_tokens), image_tokens

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: Tensor | None = None,
        parallel_prediction: bool = False,
        use_cache: bool | None = None,
        **kwargs,
    ) -> IGCaptionerModelOutput:
        """Decoder inputs [N, L], start token first, and N images (or none) to states [N, L, D].

        Args:
            image_key_values: [N, fusion layers, 2, H, P, head], instead of `pixel_values`: images read before.
            parallel_prediction: CapPa's mode, mask tokens in place of the text and no causal mask.
        """
        key_values, image_tokens = None, None
        if image_key_values is not None:
            key_values = [(layer[:, 0], layer[:, 1]) for layer in image_key_values.unbind(1)]
        elif pixel_values is not None:
            key_values, image_tokens = self.encode_image(pixel_values)
        texts = input_ids if input_ids is not None else inputs_embeds
        parallel_rows = None
        if texts is not None:
            if key_values is not None and len(key_values[0][0]) != len(texts):
                raise ValueError(
                    f"{len(key_values[0][0])} images for {len(texts)} texts: forward takes one image per text "
                    "(score() compares all images with all texts)"
                )
            if parallel_prediction:
                parallel_rows = torch.ones(len(texts), dtype=torch.bool, device=texts.device)
        outputs = self.decoder(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_key_values=key_values,
            parallel_rows=parallel_rows,
            use_cache=use_cache,
            **kwargs,
        )
        return IGCaptionerModelOutput(**without(outputs, "text_states"), encoder_last_hidden_state=image_tokens)


@dataclass
class CandidateTexts:
    """C texts as `score` keeps them: labels [C, L] (-100 off the text), their states, and log P(T) [C]."""

    labels: Tensor
    states: TextStates
    prior_log_likelihood: Tensor


class IGCaptionerModelWithHead(IGCaptionerPreTrainedModel):
    """Base of the two heads: `log P(token)` and the scoring of candidate texts. Both save the same weights."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _keep_label_sets = 8

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        text = config.text_config
        self.model = IGCaptionerModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.head_bias)
        self._label_sets: OrderedDict[tuple, CandidateTexts] = OrderedDict()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def train(self, mode: bool = True):
        """As in torch; weights may change between calls, so what `score` has kept is dropped."""
        self._label_sets.clear()
        return super().train(mode)

    def score(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prior_weight: float | None = None,
        reduction: str = "sum",
        chunk_size: int | None = None,
    ) -> IGCaptionerScoreOutput:
        """Scores every candidate text under every image.

        Images are encoded once; log P(T) and the states of the text-only layers are computed once per set of texts and
        kept for later calls with the same texts (unless gradients are asked for).

        Args:
            pixel_values: [B, channels, height, width].
            input_ids: [C, L], exactly the tokens that are scored: end-of-sequence included, start token excluded.
            attention_mask: [C, L] of 0 and 1, padding on either side; found from the padding id if not given.
            prior_weight: weight of log P(T); `config.prior_weight` if not given. 0 ranks by likelihood.
            reduction: "sum" for nats per text, "mean" for nats per token.
            chunk_size: (image, text) pairs per forward pass; by default as many as keep the logits under 256 MiB. It
                changes memory and speed, not scores.

        Returns:
            [`IGCaptionerScoreOutput`], float32.

        Raises:
            ValueError: for an empty text, a shape or a chunk size that does not fit, or an unknown reduction.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        texts = self._candidate_texts(input_ids, attention_mask, reduction)
        image_key_values, _ = self.model.encode_image(pixel_values)
        num_images, num_texts = len(pixel_values), len(texts.labels)
        pairs = torch.arange(num_images * num_texts, device=texts.labels.device)
        scores = []
        for chunk in pairs.split(chunk_size or self._default_chunk_size(texts.labels.shape[1])):
            image, text = chunk // num_texts, chunk % num_texts
            key_values = [(key[image], value[image]) for key, value in image_key_values]
            scores.append(self._log_likelihood(texts.states.rows(text), texts.labels[text], key_values, reduction))
        caption_log_likelihood = torch.cat(scores).view(num_images, num_texts)
        prior_weight = self.config.prior_weight if prior_weight is None else prior_weight
        return IGCaptionerScoreOutput(
            caption_log_likelihood=caption_log_likelihood,
            prior_log_likelihood=texts.prior_log_likelihood,
            information_gain=information_gain(caption_log_likelihood, texts.prior_log_likelihood, prior_weight),
        )

    def _default_chunk_size(self, length: int) -> int:
        return max(1, MAX_LOGITS_PER_CHUNK // (length * self.config.text_config.vocab_size))

    def _log_likelihood(
        self, states: TextStates, labels: Tensor, key_values: list[KeyValues] | None, reduction: str
    ) -> Tensor:
        logits = self.lm_head(self.model.decoder.fuse(states, key_values))
        return sequence_log_likelihood(logits, labels, reduction)

    def _candidate_texts(self, input_ids: Tensor, attention_mask: Tensor | None, reduction: str) -> CandidateTexts:
        """The texts with their prior, from what is kept where texts, weights and reduction are the same."""
        text = self.config.text_config
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must be [C, L] with at least one text, got shape {tuple(input_ids.shape)}")
        if attention_mask is None:
            attention_mask = text_mask(input_ids, text.pad_token_id, text.eos_token_id)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} differs from input_ids {tuple(input_ids.shape)}"
            )
        used = attention_mask.any(dim=0)
        input_ids, attention_mask = input_ids[:, used], attention_mask[:, used]
        if not bool(attention_mask.any(dim=-1).all()):
            raise ValueError(f"text {int(attention_mask.any(dim=-1).long().argmin())} of input_ids has no tokens")

        keep = not (self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())))
        if not keep:
            return self._read_candidate_texts(input_ids, attention_mask, reduction)
        key = (input_ids.cpu().numpy().tobytes(), attention_mask.cpu().numpy().tobytes(), input_ids.shape, reduction)
        key += tuple((id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.parameters())
        if key not in self._label_sets:
            self._label_sets[key] = self._read_candidate_texts(input_ids, attention_mask, reduction)
        self._label_sets.move_to_end(key)
        while len(self._label_sets) > self._keep_label_sets:
            self._label_sets.popitem(last=False)
        return self._label_sets[key]

    def _read_candidate_texts(self, input_ids: Tensor, attention_mask: Tensor, reduction: str) -> CandidateTexts:
        start = self.config.text_config.decoder_start_token_id
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        inputs = shift_right(input_ids, start, attention_mask)
        states = self.model.decoder.read_text(inputs, attention_mask=attention_mask)
        rows = torch.arange(len(labels), device=labels.device)
        prior = [
            self._log_likelihood(states.rows(chunk), labels[chunk], None, reduction)
            for chunk in rows.split(self._default_chunk_size(labels.shape[1]))
        ]
        return CandidateTexts(labels, states, torch.cat(prior))


class IGCaptionerForConditionalGeneration(IGCaptionerModelWithHead, GenerationMixin):
    """The captioner: training on images and texts, and generation of captions."""

    accepts_loss_kwargs = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: Tensor | None = None,
        labels: Tensor | None = None,
        parallel_prediction: bool = False,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> IGCaptionerCausalLMOutput:
        """Logits of the next token, or with `labels` the training loss.

        Args:
            input_ids: decoder inputs [N, L], start token first. Together with `labels`: the texts themselves, without a
                start token, of which `labels` marks the scored part (everything else -100).
            pixel_values: [N, channels, height, width]; left out, the text alone is modelled.
            labels: [N, L], the tokens to be predicted, end-of-sequence included; -100 is ignored. The decoder's input
                is made from them: `logits[:, i]` predicts `labels[:, i]`.
            parallel_prediction: CapPa's mode for the whole batch. In training with labels,
                `config.parallel_prediction_prob` chooses texts at random instead.
        """
        if labels is not None:
            return self._training_forward(
                labels, input_ids, pixel_values, attention_mask, parallel_prediction, num_items_in_batch, **kwargs
            )
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_key_values=image_key_values,
            parallel_prediction=parallel_prediction,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return IGCaptionerCausalLMOutput(logits=logits, **without(outputs, "last_hidden_state"))

    def _training_forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        parallel_prediction: bool,
        num_items_in_batch: Tensor | int | None,
        **kwargs,
    ) -> IGCaptionerCausalLMOutput:
        """a * CE(T|I) + b * CE(T), both paths over one pass of the text-only layers where they read the same text."""
        config, decoder = self.config, self.model.decoder
        if input_ids is None:
            attention_mask = (labels != IGNORE_INDEX).long()
            input_ids = labels.masked_fill(labels == IGNORE_INDEX, config.pad_token_id or 0)
        if input_ids.shape != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} differ in shape from input_ids {tuple(input_ids.shape)}")
        inputs = shift_right(input_ids, config.decoder_start_token_id, attention_mask)
        key_values, image_tokens = None, None
        if pixel_values is not None:
            key_values, image_tokens = self.model.encode_image(pixel_values)
        parallel_rows = self._draw_parallel_rows(labels, parallel_prediction)
        outputs = decoder(
            inputs, attention_mask=attention_mask, image_key_values=key_values, parallel_rows=parallel_rows, **kwargs
        )
        # where mask tokens were read, the unconditional path has to read the texts themselves
        text = outputs.text_states if parallel_rows is None else None
        result = IGCaptionerCausalLMOutput(
            logits=self.lm_head(outputs.last_hidden_state),
            encoder_last_hidden_state=image_tokens,
            **without(outputs, "last_hidden_state", "text_states"),
        )
        return self._add_losses(result, labels, inputs, attention_mask, text, parallel_rows, num_items_in_batch)

    def _add_losses(
        self,
        result: IGCaptionerCausalLMOutput,
        labels: Tensor,
        inputs: Tensor,
        attention_mask: Tensor | None,
        text: TextStates | None,
        parallel_rows: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> IGCaptionerCausalLMOutput:
        config = self.config

        def mean(log_likelihoods: Tensor, rows: Tensor | None = None, num_items: Tensor | int | None = None) -> Tensor:
            counted = labels if rows is None else labels.masked_fill(~rows[:, None], IGNORE_INDEX)
            log_likelihoods = log_likelihoods.masked_fill(counted == IGNORE_INDEX, 0.0)
            return mean_negative_log_likelihood(log_likelihoods, counted, config.loss_reduction, num_items)

        conditional = token_log_likelihoods(result.logits, labels)
        has_image = result.encoder_last_hidden_state is not None
        loss = mean(conditional, num_items=num_items_in_batch)
        if not has_image:
            result.unconditional_loss = mean(conditional).detach()
            result.loss = config.unconditional_weight * loss
            return result
        result.loss = config.conditional_weight * loss
        result.captioning_loss = mean(conditional, None if parallel_rows is None else ~parallel_rows).detach()
        if parallel_rows is not None:
            result.parallel_loss = mean(conditional, parallel_rows).detach()
        if config.unconditional_weight > 0 or not self.training:
            decoder = self.model.decoder
            text = decoder.read_text(inputs, attention_mask=attention_mask) if text is None else text
            unconditional = token_log_likelihoods(self.lm_head(decoder.fuse(text)), labels)
            result.unconditional_loss = mean(unconditional).detach()
            result.loss = result.loss + config.unconditional_weight * mean(unconditional, num_items=num_items_in_batch)
        return result

    def _draw_parallel_rows(self, labels: Tensor, parallel_prediction: bool) -> Tensor | None:
        """Which texts [N] are predicted in parallel, or None if none can be."""
        probability = self.config.parallel_prediction_prob if self.training else 0.0
        if parallel_prediction:
            probability = 1.0
        if probability == 0:
            return None
        return torch.rand(len(labels), device=labels.device) < probability

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs) -> ModelOutput | Tensor:
        """As in transformers. The image is read once, before decoding, whatever the number of beams or samples.

        Args:
            pixel_values: [N, channels, height, width]; left out, text is generated without an image.
            input_ids (or `inputs`): prompts [N, L], start token first; left out, the start token. Prompts in which every
                text ends with the end-of-sequence token, as the tokenizer makes them, are turned into that form.
            attention_mask: [N, L], for prompts padded on the left (or, if they end with end-of-sequence, on either side).
        """
        prompt = kwargs.pop("input_ids", inputs)
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:
            key_values, _ = self.model.encode_image(pixel_values)
            kwargs["image_key_values"] = torch.stack([torch.stack(pair, dim=1) for pair in key_values], dim=1)
            if prompt is None and kwargs.get("inputs_embeds") is None:
                prompt = torch.full((len(pixel_values), 1), self.config.decoder_start_token_id, device=self.device)
        if prompt is not None and prompt.numel():
            prompt, kwargs["attention_mask"] = self._as_prompt(prompt, kwargs.get("attention_mask"))
        return super().generate(prompt, *args, **kwargs)

    def _as_prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts that end with end-of-sequence [N, L], to [start token, text] of the same length, padded on the left."""
        text = self.config.text_config
        mask = attention_mask
        if mask is None:
            mask = text_mask(input_ids, text.pad_token_id, text.eos_token_id)
            mask[:, 0] |= input_ids[:, 0] == text.decoder_start_token_id  # which may be the padding token
        if mask.shape != input_ids.shape:  # a cache was passed: the mask covers what it holds as well
            return input_ids, mask
        padding_first = mask.argsort(dim=-1, stable=True)
        moved = input_ids.gather(-1, padding_first)
        eos_ids = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        if not all(int(token) in eos_ids for token in moved[:, -1]):
            return input_ids, mask
        mask = mask.gather(-1, padding_first)
        return shift_right(moved, text.decoder_start_token_id, mask), mask


class IGCaptionerForZeroShotImageClassification(IGCaptionerModelWithHead):
    """The captioner as a classifier of images among candidate texts, with the interface of CLIP and SigLIP."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prior_weight: float | None = None,
        **kwargs,
    ) -> IGCaptionerZeroShotOutput:
        """Scores texts [C, L] (see `score`) under images [B, channels, height, width].

        Args:
            labels: [B], index of the right text of each image; gives the cross-entropy over texts as `loss`.
        """
        scores = self.score(pixel_values, input_ids, attention_mask, prior_weight=prior_weight)
        logits = scores.information_gain
        return IGCaptionerZeroShotOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits_per_image=logits,
            logits_per_text=logits.T,
            caption_log_likelihood=scores.caption_log_likelihood,
            prior_log_likelihood=scores.prior_log_likelihood,
        )

