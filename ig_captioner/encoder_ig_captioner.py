"""The image encoder, a pre-norm ViT, and the blocks it shares with the decoder: norms, attention, MLP, the base class.

Attention projects keys and values apart from queries, because the decoder keeps those of an image (computed once) and
of the text (a cache) while its queries change. Positions are learned, and resampled linearly with aligned corners when
the image size changes (as in big_vision), or fixed 2-D sine-cosine tables. Every norm is made by `make_norm`, which
decides whether it exists and what parameters it has; one that does not exist is an `nn.Identity`.

Legend: B images, C candidate texts, N texts, P image tokens, L text tokens, E encoder width, D decoder width, H heads,
V vocabulary.
"""

import warnings
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GradientCheckpointingLayer, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_ig_captioner import (
    OutputRecorder,
    attention_function,
    attention_implementation,
    build_from_config,
    capture_outputs,
    init,
    merge_with_config_defaults,
)
from .configuration_ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerTextConfig,
    IGCaptionerVisionConfig,
    as_height_width,
    copy_remote_code,
)
from .vision_ig_captioner import is_frozen


KeyValues = tuple[Tensor, Tensor]  # keys and values, [B, H, P, head] each
NormRole = Literal["input", "text_output", "attention", "mid_mlp", "query_key"]


def rotary_embedding(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, L, head_dim] float32 of half-split rotary positions."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() / theta**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates `states` [N, H, L, head] by the angles of `rotary_embedding`."""
    cos, sin = rotary
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def make_norm(
    config: IGCaptionerVisionConfig | IGCaptionerTextConfig, size: int, role: NormRole = "input"
) -> nn.Module:
    """Makes the norm for a place in the model, or `nn.Identity` if the configuration has none there.

    Args:
        role: "input" of a sub-layer and the encoder's final norm; "text_output", the decoder's final norm; "attention"
            output, before it is added; "mid_mlp", between the projections of an MLP; "query_key", of each head.
    """
    optional = {"attention": config.post_attention_norm, "mid_mlp": config.mid_mlp_norm, "query_key": config.qk_norm}
    if role in optional and not optional[role]:
        return nn.Identity()
    scale = config.norm_scale or role in ("attention", "query_key")
    if config.norm == "rmsnorm" or role == "query_key":
        return nn.RMSNorm(size, eps=config.norm_eps, elementwise_affine=scale)
    bias = config.norm_bias or (role == "text_output" and config.norm_scale)  # big_vision's final norm has a bias
    return nn.LayerNorm(size, eps=config.norm_eps, elementwise_affine=scale, bias=bias)


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
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class IGCaptionerAttention(nn.Module):
    """Multi-head attention whose queries, and keys and values, are projected apart from it, so that they can be kept.

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
        size = config.hidden_size
        bias = config.attention_bias
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(key_value_size or size, size, bias=bias)
        self.v_proj = nn.Linear(key_value_size or size, size, bias=bias)
        self.o_proj = nn.Linear(size, size, bias=bias)
        self.q_norm = make_norm(config, self.head_dim, "query_key")
        self.k_norm = make_norm(config, self.head_dim, "query_key")

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def queries(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Queries [N, H, L, head] of `hidden_states` [N, L, D]."""
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states)))
        return query if rotary is None else rotate(query, rotary)

    def key_values(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> KeyValues:
        """Keys and values [N, H, S, head] of `hidden_states` [N, S, *]."""
        key = self.k_norm(self._split_heads(self.k_proj(hidden_states)))
        value = self._split_heads(self.v_proj(hidden_states))
        return (key if rotary is None else rotate(key, rotary)), value

    def forward(
        self,
        query: Tensor,
        key_values: KeyValues,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """What `queries` [N, H, L, head] read of `key_values`. Returns [N, L, D] and, if eager, the weights."""
        attend = attention_function(self._implementation(attention_mask), eager_attention_forward)
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

    def _implementation(self, attention_mask: Tensor | None) -> str:
        """The configured one, but for the mask of a trie, which flash and flex attention have no place for."""
        chosen = attention_implementation(self.config)
        has_full_mask = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
        return "sdpa" if has_full_mask and ("flash" in chosen or "flex" in chosen) else chosen


class IGCaptionerMLP(nn.Module):
    """`act(x W1) W2`, or gated: `act(x W_gate) * (x W1) W2` (GEGLU for a GELU)."""

    def __init__(self, config: IGCaptionerVisionConfig | IGCaptionerTextConfig):
        super().__init__()
        size = config.hidden_size
        inner = config.intermediate_size
        bias = config.mlp_bias
        self.act = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.mid_norm = make_norm(config, inner, "mid_mlp")
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.up_proj(hidden_states)
        inner = self.act(inner) if self.gate_proj is None else self.act(self.gate_proj(hidden_states)) * inner
        return self.down_proj(self.mid_norm(inner))


class IGCaptionerPreTrainedModel(PreTrainedModel):
    """Base of all models here: initial weights, and saving together with the code."""

    config_class = IGCaptionerConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["IGCaptionerVisionLayer", "IGCaptionerDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Builds the model with random weights.

        Args:
            kwargs: `dtype` and `attn_implementation`, as for `AutoModel.from_config`.
        """
        return build_from_config(cls, config, **kwargs)

    @property
    def device(self) -> torch.device:
        """As in transformers; of a model whose weights are offloaded (accelerate), where it computes."""
        device = super().device
        if device.type != "meta":
            return device
        for module in self.modules():
            hook = getattr(module, "_hf_hook", None)
            for part in getattr(hook, "hooks", [hook]):  # of a sequence of hooks, or one, or None
                place = getattr(part, "execution_device", None)
                if place is not None:
                    return torch.device(place)
        return device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = getattr(self.config.get_text_config(), "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
            init.ones_(module.weight)
        elif isinstance(module, IGCaptionerPatchEmbeddings):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=std)
        elif isinstance(module, IGCaptionerImageTokens) and module.position_embedding is not None:
            init.normal_(module.position_embedding, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def enable_input_require_grads(self) -> None:
        """As in transformers, but not for a frozen encoder, which would be run backwards for nothing.

        Embeddings may return more than a tensor, too (Swin's do).
        """

        def require_grad(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            (output[0] if isinstance(output, tuple) else output).requires_grad_(True)

        self._require_grads_hooks = []
        for model in self.modules():
            if not isinstance(model, PreTrainedModel) or is_frozen(model):
                continue
            try:
                embeddings = model.get_input_embeddings()
            except NotImplementedError:  # of convolutions
                continue
            if embeddings is not None and require_grad not in embeddings._forward_hooks.values():
                self._require_grads_hooks.append(embeddings.register_forward_hook(require_grad))

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers. Shrinking below the mask token removes it and disables parallel prediction."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        text = self.config.get_text_config()
        if (getattr(text, "mask_token_id", None) or 0) >= len(embeddings.weight):
            warnings.warn(f"the mask token {text.mask_token_id} is cut off: no parallel prediction", stacklevel=2)
            text.mask_token_id = None
            self.config.parallel_prediction_prob = 0.0
        return embeddings

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the code that `trust_remote_code=True` needs is saved along with the weights."""
        push = kwargs.pop("push_to_hub", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and isinstance(self.config, IGCaptionerConfig):
            copy_remote_code(save_directory)
        if push:
            # Not by transformers' own argument, which would upload before the code is there. `push_to_hub` saves again.
            known = ("commit_message", "private", "token", "create_pr", "revision")
            name = kwargs.get("repo_id") or Path(save_directory).name
            self.push_to_hub(name, **{key: kwargs[key] for key in known if key in kwargs})


def sincos_position_embedding(grid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """Fixed 2-D positions [rows * columns, size] of a grid whose cells are one apart."""
    rows, columns = (torch.arange(number, device=device).float() for number in grid)
    return sincos_of(rows, columns, size)


def sincos_of(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Fixed 2-D positions [rows * columns, size]: sin x, cos x, sin y, cos y, as in big_vision (temperature 10,000).

    Args:
        rows, columns: coordinates of the rows [rows] and of the columns [columns].
    """
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    omega = 10000.0 ** -(torch.arange(size // 4, device=rows.device).float() / max(size // 4 - 1, 1))
    y = y.flatten()[:, None] * omega
    x = x.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)


def resampled_table(table: Tensor, length: int) -> Tensor:
    """Resamples a table [rows, E] to [length, E], linearly, with its first and last rows kept."""
    if len(table) == length:
        return table
    return F.interpolate(table.float().T[None], size=length, mode="linear", align_corners=True)[0].T


class IGCaptionerPatchEmbeddings(nn.Module):
    """Pixels [B, channels, height, width] to image tokens [B, P, E]: patches row by row, then register tokens."""

    position_embedding: Tensor
    position_embedding_height: Tensor
    position_embedding_width: Tensor

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__()
        self.config = config
        self.patch_size = as_height_width(config.patch_size, "patch_size")
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, self.patch_size, bias=config.patch_bias
        )
        rows, columns = config.grid_size
        if config.position_embedding == "learned":
            self.position_embedding = nn.Parameter(torch.empty(rows * columns, config.hidden_size))
        elif config.position_embedding == "factorized":
            self.position_embedding_height = nn.Parameter(torch.empty(rows, config.hidden_size))
            self.position_embedding_width = nn.Parameter(torch.empty(columns, config.hidden_size))
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.empty(registers, config.hidden_size)) if registers else None

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[P, E] for a grid of `(rows, columns)`; learned positions are resampled linearly with aligned corners."""
        if self.config.position_embedding == "sincos2d":
            return sincos_position_embedding(grid, self.config.hidden_size, self.projection.weight.device)
        if self.config.position_embedding == "factorized":
            height = resampled_table(self.position_embedding_height, grid[0])
            width = resampled_table(self.position_embedding_width, grid[1])
            return (height[:, None] + width).flatten(0, 1)
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
            tokens = torch.cat([tokens, self.register_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)
        return tokens


class IGCaptionerImageTokens(nn.Module):
    """Image features [B, P, E] to the image tokens that the decoder reads: norm and positions, if so configured."""

    def __init__(self, config: IGCaptionerConfig):
        super().__init__()
        self.config = config
        self.width = config.text_config.encoder_hidden_size
        self.norm = nn.LayerNorm(self.width, eps=1e-6) if config.image_token_norm else nn.Identity()
        learned = config.image_position_embedding == "learned"
        table = torch.empty(config.num_image_tokens, self.width) if learned else None
        self.position_embedding = None if table is None else nn.Parameter(table)

    def positions(self, device: torch.device) -> Tensor:
        """Positions [P, E] of an image of the configured size.

        Means over the cells of a grid are where the middles of these cells are, in units of the finest grid's cells.
        """
        if self.position_embedding is not None:
            return self.position_embedding
        if self.config.image_token_grids is None:
            layout = self.config.image_layout
            table = sincos_position_embedding((layout.rows, layout.columns), self.width, device)
            return F.pad(table, (0, 0, layout.leading, layout.trailing))
        finest = max(self.config.image_token_grids)
        tables = []
        for grid in self.config.image_token_grids:
            middles = (torch.arange(grid, device=device) + 0.5) * finest / grid - 0.5
            tables.append(sincos_of(middles, middles, self.width))
        return torch.cat(tables)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim != 3 or features.shape[-1] != self.width:
            raise ValueError(f"image features must be [B, P, {self.width}], got {tuple(features.shape)}")
        tokens = self.norm(features)
        if self.config.image_position_embedding == "none":
            return tokens
        positions = self.positions(tokens.device)
        if len(positions) != tokens.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens of an image, but positions of {len(positions)}: images of another size need "
                "image_token_grids, or image_position_embedding='none'"
            )
        return tokens + positions.to(tokens.dtype)


class IGCaptionerVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block over image tokens."""

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__()
        self.self_attn_norm = make_norm(config, config.hidden_size)
        self.self_attn = IGCaptionerAttention(config)
        self.self_attn_post_norm = make_norm(config, config.hidden_size, "attention")
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = IGCaptionerMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        normed = self.self_attn_norm(hidden_states)
        attended, _ = self.self_attn(self.self_attn.queries(normed), self.self_attn.key_values(normed), **kwargs)
        hidden_states = hidden_states + self.dropout(self.self_attn_post_norm(attended))
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class IGCaptionerVisionModel(IGCaptionerPreTrainedModel):
    """The ViT by itself, for features. `pooler_output` [B, E] is the mean over the patches (registers are left out).

    `from_pretrained` takes the encoder out of a whole captioner, too.
    """

    config_class = IGCaptionerVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = (r"^(model\.)?decoder\.", r"^lm_head\.")
    input_modalities = ("image",)
    _can_record_outputs = {
        "hidden_states": IGCaptionerVisionLayer,
        "attentions": OutputRecorder(IGCaptionerAttention, index=1),
    }

    def __init__(self, config: IGCaptionerVisionConfig):
        super().__init__(config)
        self.embeddings = IGCaptionerPatchEmbeddings(config)
        self.pre_norm = make_norm(config, config.hidden_size) if config.pre_norm else nn.Identity()
        self.layers = nn.ModuleList([IGCaptionerVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers."""
        kwargs.setdefault("key_mapping", {r"^model\.vision_model\.": ""})
        return super().from_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pixel_values` [B, channels, height, width] -> `last_hidden_state` [B, P, E], `pooler_output` [B, E]."""
        hidden_states = self.pre_norm(self.embeddings(pixel_values))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.norm(hidden_states)
        patches = hidden_states[:, : hidden_states.shape[1] - self.config.num_register_tokens]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=patches.mean(dim=1))


IGCaptionerVisionModel.register_for_auto_class("AutoModel")  # saved by itself, it brings its code along
