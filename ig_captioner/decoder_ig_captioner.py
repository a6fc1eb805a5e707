"""The text decoder: one network for log P(T|I), log P(T) and parallel prediction.

An image reaches it only as one pair of keys and values per fusion layer (`read_image`), computed once per image,
whatever the number of texts. With `fusion="prefix"` these come from image tokens that pass through the same layers as a
bidirectional prefix, which never sees the text, and they stand in front of the text's own keys; with
`"cross_attention"` they come straight from the encoder. Three modes follow:

    conditional    causal text, with an image           log P(T|I)
    unconditional  causal text, no image is passed      log P(T)
    parallel       mask tokens only, no causal mask     CapPa's parallel prediction (arXiv 2306.07915)

The lower `num_text_only_layers` layers never see the image: `read_text` runs them, `fuse` the rest, so that several
images, or log P(T|I) and log P(T), share what `read_text` returns. Under many images they cost nothing per image. Nor
do the queries, keys and values of the first fusion layer, which no image has reached yet, if `project` made them once.

B images may have N texts: the first N / B texts see the first image, the next N / B the second, and so on.

Legend: B images, C candidate texts, N texts, P image tokens, L text tokens, E encoder width, D decoder width, H heads,
V vocabulary, W width of the token embedding and of the head (D, unless `embedding_size` says otherwise).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GradientCheckpointingLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .compat_ig_captioner import (
    CACHE_NAME,
    OutputRecorder,
    accepts_both_cache_names,
    capture_outputs,
    merge_with_config_defaults,
)
from .configuration_ig_captioner import IGCaptionerTextConfig
from .encoder_ig_captioner import (
    IGCaptionerAttention,
    IGCaptionerMLP,
    IGCaptionerPreTrainedModel,
    KeyValues,
    make_norm,
    rotary_embedding,
)


@dataclass
class TextStates:
    """Texts after embedding and the text-only layers: all that the fusion layers need to know of them.

    Args:
        hidden_states: [N, L, D].
        mask: as the attention implementation takes it: None, [N, S] or [N, 1, L, S].
        rotary: cosines and sines [N, 1, L, head]; None where positions are learned.
        is_causal: whether a text sees only what is before it, where `mask` does not say so (None, [N, S]); False for
            parallel prediction and for tries.
        projections: queries, keys and values of the first fusion layer, [3, N, H, L, head], if they are known.
    """

    hidden_states: Tensor
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    is_causal: bool
    projections: Tensor | None = None

    def repeat(self, images: int) -> "TextStates":
        """The N texts once for each image: the first image's texts, then the second's."""
        if images == 1:
            return self
        mask = None if self.mask is None else self.mask.repeat(images, 1, 1, 1)
        rotary = self.rotary
        if rotary is not None:
            rotary = rotary[0].repeat(images, 1, 1, 1), rotary[1].repeat(images, 1, 1, 1)
        projections = None if self.projections is None else self.projections.repeat(1, images, 1, 1, 1)
        return TextStates(self.hidden_states.repeat(images, 1, 1), mask, rotary, self.is_causal, projections)


def tree_mask(ends: Tensor) -> Tensor:
    """Attention mask of blocks of a trie, bool [G, 1, Q, Q]: every position sees its ancestors and itself.

    Args:
        ends: [G, Q], one past the last descendant of each position (see `TextTrie`).
    """
    position = torch.arange(ends.shape[1], device=ends.device)
    return ((position <= position[:, None]) & (position[:, None] < ends[:, None, :]))[:, None]


def with_visible_prefix(mask: Tensor | None, length: int) -> Tensor | None:
    """`mask` [..., S] (boolean, additive, or 2-D of 0 and 1) widened to [..., length + S] by keys that all may see.

    None stays None: without a mask, flash attention aligns causality with the last key, which is the prefix-LM's.
    """
    if mask is None:
        return None
    return F.pad(mask, (length, 0), value=0.0 if mask.is_floating_point() else 1)


def repeat_rows(states: Tensor, times: int) -> Tensor:
    """Repeats each row of `states` [B, H, P, head]: [B * times, H, P, head]."""
    return states[:, None].expand(-1, times, -1, -1, -1).flatten(0, 1) if times > 1 else states


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
        self.self_attn_post_norm = make_norm(config, size, "attention")
        self.cross_attn = None
        if fuses and config.fusion == "cross_attention":
            self.cross_attn_norm = make_norm(config, size)
            self.cross_attn = IGCaptionerAttention(config, config.encoder_hidden_size, layer_idx)
            self.cross_attn_post_norm = make_norm(config, size, "attention")
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
        only_projects: bool = False,
        text: TextStates | None = None,
        projections: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Takes text [N, L, D], or with `reads_image` image tokens [B, P, *], through the block.

        All go through `forward`, so that wrappers around a layer (checkpointing, sharding) see every use of it. What
        needs a gradient is positional, since reentrant checkpointing loses the gradients of keyword arguments.

        Args:
            projections: what `only_projects` returned for the same text, as one tensor; not under gradients.

        Returns:
            The new states; for image tokens also their keys and values [B, H, P, head]; with `only_projects` the
            queries, keys and values of the text, [N, H, L, head] each.
        """
        if reads_image:
            return self._read_image(hidden_states, **kwargs)
        if only_projects:
            return self._project(hidden_states, text)
        query, key, value = self._project(hidden_states, text) if projections is None else projections
        if cache is not None:
            key, value = cache.update(key, value, self.self_attn.layer_idx)
        mask = text.mask
        if image_key is not None and self.has_prefix:
            texts_per_image = key.shape[0] // image_key.shape[0]
            key = torch.cat([repeat_rows(image_key, texts_per_image), key], dim=2)
            value = torch.cat([repeat_rows(image_value, texts_per_image), value], dim=2)
            mask = with_visible_prefix(mask, image_key.shape[2])
        attended, _ = self.self_attn(query, (key, value), mask, is_causal=text.is_causal, **kwargs)
        hidden_states = hidden_states + self.dropout(self.self_attn_post_norm(attended))
        if image_key is not None and self.cross_attn is not None:
            normed = self.cross_attn_norm(hidden_states)
            # The texts of an image as one row: its keys and values need no copies, and here texts do not see texts.
            by_image = normed.reshape(image_key.shape[0], -1, normed.shape[-1])
            attended, _ = self.cross_attn(self.cross_attn.queries(by_image), (image_key, image_value), **kwargs)
            hidden_states = hidden_states + self.dropout(self.cross_attn_post_norm(attended.view_as(normed)))
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))

    def _project(self, hidden_states: Tensor, text: TextStates) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.self_attn_norm(hidden_states)
        return self.self_attn.queries(normed, text.rotary), *self.self_attn.key_values(normed, text.rotary)

    def _read_image(self, image_states: Tensor, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
        if self.cross_attn is not None:
            return image_states, *self.cross_attn.key_values(image_states)
        normed = self.self_attn_norm(image_states)
        key_values = self.self_attn.key_values(normed)
        if not self.is_last:  # nothing reads the image tokens after the last layer
            attended, _ = self.self_attn(self.self_attn.queries(normed), key_values, **kwargs)
            image_states = image_states + self.dropout(self.self_attn_post_norm(attended))
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
        width = config.embedding_width
        factorised = config.embedding_size is not None
        self.embed_tokens = nn.Embedding(config.num_embeddings, width)
        self.embedding_projection = nn.Linear(width, size, bias=False) if factorised else nn.Identity()
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, size) if learned else None
        self.image_projection = nn.Linear(config.encoder_hidden_size, size) if config.fusion == "prefix" else None
        self.layers = nn.ModuleList([IGCaptionerDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config, size, "text_output")
        self.head_projection = nn.Linear(size, width, bias=False) if factorised else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def fusion_layers(self) -> nn.ModuleList:
        return self.layers[self.config.num_text_only_layers :]

    def read_image(self, encoder_hidden_states: Tensor, **kwargs) -> list[KeyValues]:
        """Keys and values [B, H, P, head] of image tokens [B, P, E], for each fusion layer."""
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
        cache: Cache | None = None,
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
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, attention_mask, past, parallel_rows)
        self.check_length(inputs_embeds.shape[1], past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            position_ids=position_ids,
            # a prefix is put in front of the mask, and parallel texts open it: both need it spelled out
            allow_is_causal_skip=self.config.fusion == "cross_attention" and parallel_rows is None,
        )
        hidden_states = self._with_positions(inputs_embeds, position_ids)
        text = TextStates(hidden_states, mask, self._rotary(position_ids), is_causal=True)
        if parallel_rows is not None:
            text.mask, text.is_causal = self._open_mask(mask, parallel_rows)
        return self._run_text_only_layers(text, cache=cache, **kwargs)

    def read_trie(
        self,
        tokens: Tensor,
        depths: Tensor,
        ends: Tensor,
        hidden_states: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> TextStates:
        """As `read_text` for blocks of a trie, [G, Q] each (see `TextTrie`).

        Args:
            hidden_states: [G, Q, D], what an earlier call returned for the same blocks; saves the text-only layers.
            projections: [3, G, H, Q, head], what `project` made of them.
        """
        mask = tree_mask(ends)
        rotary = self._rotary(depths)
        if hidden_states is not None:
            return TextStates(hidden_states, mask, rotary, False, projections)
        embedded = self._with_positions(self.embed_tokens(tokens), depths)
        return self._run_text_only_layers(TextStates(embedded, mask, rotary, False, projections))

    def project(self, text: TextStates) -> Tensor:
        """Queries, keys and values of the first fusion layer, [3, N, H, L, head]: no image has reached them yet."""
        return torch.stack(self.fusion_layers[0](text.hidden_states, text=text, only_projects=True))

    def _with_positions(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Makes the first layer's input [N, L, D] of token embeddings [N, L, W]."""
        hidden_states = self.embedding_projection(inputs_embeds)
        return hidden_states if self.embed_positions is None else hidden_states + self.embed_positions(position_ids)

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.embed_positions is not None:
            return None
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return rotary_embedding(position_ids, head_dim, self.config.rope_theta)

    def _run_text_only_layers(self, text: TextStates, **kwargs) -> TextStates:
        for layer in self.layers[: self.config.num_text_only_layers]:
            text.hidden_states = layer(text.hidden_states, text=text, **kwargs)
        return text

    def fuse(
        self,
        text: TextStates,
        image_key_values: list[KeyValues] | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        """Runs the fusion layers and the final norm. Returns what the head reads, [N, L, W].

        Args:
            image_key_values: what `read_image` returned; None for log P(T).
        """
        hidden_states = text.hidden_states
        projections = text.projections
        no_image = [(None, None)] * len(self.fusion_layers)
        for layer, key_value in zip(self.fusion_layers, image_key_values or no_image, strict=True):
            hidden_states = layer(hidden_states, *key_value, text=text, projections=projections, cache=cache, **kwargs)
            projections = None  # the layers above read what this one saw of the image
        return self.head_projection(self.norm(hidden_states))

    @accepts_both_cache_names
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: list[KeyValues] | None = None,
        parallel_rows: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> IGCaptionerDecoderOutput:
        """Takes texts [N, L], and what `read_image` returned for N images or none, to `last_hidden_state` [N, L, W]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("gradient checkpointing runs layers twice, which would write into the cache twice")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        text = self.read_text(input_ids, attention_mask, position_ids, cache, inputs_embeds, parallel_rows, **kwargs)
        hidden_states = self.fuse(text, image_key_values, cache, **kwargs)
        return IGCaptionerDecoderOutput(last_hidden_state=hidden_states, text_states=text, **{CACHE_NAME: cache})

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
        """Positions [N, L]: from the first real token on; from the left edge in parallel texts, which are all mask."""
        length = inputs_embeds.shape[1]
        positions = (torch.arange(length, device=inputs_embeds.device) + past).expand(len(inputs_embeds), -1)
        if attention_mask is None or attention_mask.ndim != 2:
            return positions
        counted = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
        return counted if parallel_rows is None else counted.where(~parallel_rows[:, None], positions)

    def check_length(self, length: int, past: int = 0) -> None:
        """Raises ValueError for a text that is longer than the table of positions."""
        learned = self.embed_positions is not None
        if learned and isinstance(past, int) and past + length > self.config.max_position_embeddings:
            raise ValueError(
                f"the text has {past + length} tokens, but the model knows {self.config.max_position_embeddings} "
                "positions (text_config.max_position_embeddings)"
            )
