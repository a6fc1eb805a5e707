"""IG Captioner: encoder and decoder together, the scores, and the two heads.

    image  -> IGCaptionerVisionModel -> image tokens [B, P, E] -> keys and values per fusion layer
                                                                     |
    tokens -> IGCaptionerTextDecoder: text-only layers -> fusion layers -> head -> log P [N, L, V]

`score` compares every image with every text: log P(T|I), log P(T) and their difference, the information gain
(arXiv 2311.17072). Training minimises a * CE(T|I) + b * CE(T), where CapPa (arXiv 2306.07915) predicts a share of the
texts in parallel.

Deliberate differences from the papers: the image may be fused with the text only above `num_text_only_layers` layers,
which both likelihoods share; a prefix carries no positions beyond those of the encoder.

Legend: B images, C candidate texts, N texts, P image tokens, L text tokens, E encoder width, D decoder width, H heads,
V vocabulary. Log-likelihoods are in nats.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ig_captioner import IGCaptionerConfig, IGCaptionerTextConfig, as_height_width
from .decoder_ig_captioner import IGCaptionerTextDecoder, TextStates
from .encoder_ig_captioner import IGCaptionerPreTrainedModel, IGCaptionerVisionModel, KeyValues
from .information_gain import (
    IGNORE_INDEX,
    information_gain,
    linear_loss,
    loss_weights,
    mean_negative_log_likelihood,
    shift_right,
    text_mask,
    token_log_likelihoods,
)
from .label_trie import CompiledTexts, TextTrie, build_trie

# Not used here: code is fetched entry file by entry file with what that file imports, and a model so fetched must find
# all of its files beside this one when it is saved again.
from .pipeline_ig_captioner import IGZeroShotImageClassificationPipeline  # noqa: F401
from .processing_ig_captioner import IGCaptionerProcessor  # noqa: F401


# How many numbers `score` holds at once of what grows with texts and images: logits, and the inner states of an MLP.
# 2**28 is 1 GiB in float32; on a CPU less, so that it stays in the caches.
MAX_NUMBERS_PER_CHUNK = {"cpu": 2**23, "other": 2**28}
MAX_KEPT_TEXTS = 4


@dataclass
class IGCaptionerModelOutput(ModelOutput):
    """last_hidden_state [N, L, D]; encoder_last_hidden_state [N, P, E] if pixels were given."""

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
    captioning_loss: CE(T|I) over the texts that were predicted causally; nan if the draw left none.
    unconditional_loss: CE(T), without the image. Their difference is the information gain per token.
    parallel_loss: CE(T|I) over the texts that were predicted in parallel; nan if the draw left none.
    caption_log_likelihood, prior_log_likelihood: log P(T|I) and log P(T) [N] of the labels in nats, without a gradient.
    logits: [N, L, V]; position i predicts token i of `labels`, or the token after `input_ids[:, i]`. None in training.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    captioning_loss: Tensor | None = None
    unconditional_loss: Tensor | None = None
    parallel_loss: Tensor | None = None
    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None
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


class IGCaptionerModelWithHead(IGCaptionerPreTrainedModel):
    """Base of the two heads: `log P(token)` and the scoring of candidate texts. Both save the same weights."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        text: IGCaptionerTextConfig = config.text_config
        self.model = IGCaptionerModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=text.head_bias)
        self._kept_texts: dict[tuple, CompiledTexts] = {}  # of the sets of texts scored last
        self._kept_fingerprint: tuple[tuple, str] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def train(self, mode: bool = True):
        """As in torch; weights may change between calls, so what `score` has kept is dropped."""
        self.forget_texts()
        return super().train(mode)

    def forget_texts(self) -> None:
        """Drops what `score` keeps of texts. Needed only after writes to `parameter.data`, which it cannot see."""
        self._kept_texts.clear()
        self._kept_fingerprint = None

    def score(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | CompiledTexts,
        attention_mask: Tensor | None = None,
        *,
        prior_weight: float | None = None,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        reduction: str = "sum",
        chunk_size: int | None = None,
    ) -> IGCaptionerScoreOutput:
        """Scores every candidate text under every image.

        Images are encoded once. Texts are compiled to a trie, which reads what they have in common once; all that does
        not depend on the image (the trie, log P(T), the states of the text-only layers) is kept for later calls with
        the same texts and weights, see `forget_texts`. It is not kept where gradients are asked for, or where hooks or
        adapters stand between the weights and the result.

        Args:
            pixel_values: [B, channels, height, width].
            input_ids: [C, L], exactly the tokens that are scored: end-of-sequence included, start token excluded; or
                what `compile_texts` returned.
            attention_mask: [C, L] of 0 and 1, padding on either side; found from the padding id if not given.
            prior_weight: weight of log P(T); `config.prior_weight` if not given. 0 ranks by likelihood.
            prior_source: "unconditional" or "reference_images"; `config.prior_source` if not given.
            reference_pixel_values: [R, channels, height, width], the images over which P(T|I) is averaged to P(T);
                implies "reference_images". Noise if not given.
            reduction: "sum" for nats per text, "mean" for nats per token.
            chunk_size: how many nodes of the trie, times images, the decoder reads at once, but at least one block of
                about `label_trie.BLOCK_SIZE`; by default what `MAX_NUMBERS_PER_CHUNK` allows. It changes memory and
                speed, not scores.

        Returns:
            [`IGCaptionerScoreOutput`], float32.

        Raises:
            ValueError: for an empty text, a shape or a chunk size that does not fit, an unknown reduction or prior, or
                texts that were compiled with other weights.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if not len(pixel_values):
            raise ValueError(f"pixel_values holds no image, got shape {tuple(pixel_values.shape)}")
        if isinstance(input_ids, CompiledTexts):
            if prior_source is not None or reference_pixel_values is not None:
                raise ValueError(
                    f"compiled texts have their prior already, but prior_source {prior_source!r} was given"
                )
            texts = self._check_compiled(input_ids)
        else:
            references = self._references(prior_source, reference_pixel_values)
            texts = self._compile_or_recall(input_ids, attention_mask, references, chunk_size)
        caption_log_likelihood = self._log_likelihoods(texts, pixel_values, chunk_size)
        prior_log_likelihood = texts.prior_log_likelihood.clone()
        if reduction == "mean":
            caption_log_likelihood = caption_log_likelihood / texts.trie.lengths
            prior_log_likelihood = prior_log_likelihood / texts.trie.lengths
        prior_weight = self.config.prior_weight if prior_weight is None else prior_weight
        return IGCaptionerScoreOutput(
            caption_log_likelihood=caption_log_likelihood,
            prior_log_likelihood=prior_log_likelihood,
            information_gain=information_gain(caption_log_likelihood, prior_log_likelihood, prior_weight),
        )

    def compile_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> CompiledTexts:
        """All of `score` that needs no image, to be passed to it in place of `input_ids`.

        Args, Raises: as for `score`.
        """
        references = self._references(prior_source, reference_pixel_values)
        compiled = self._compile(*self._padded_on_the_right(input_ids, attention_mask), references, chunk_size)
        return dataclasses.replace(compiled, fingerprint=self.fingerprint())

    def fingerprint(self) -> str:
        """SHA-256 of what scores depend on: weights, their dtype, and the architecture. Computed once per weights."""
        parameters = self.state_dict()
        version = None
        if not any(parameter.is_inference() for parameter in parameters.values()):
            version = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters.values())
        if version is None or self._kept_fingerprint is None or self._kept_fingerprint[0] != version:
            sections = (self.config.vision_config, self.config.text_config)
            fields = [(name, getattr(section, name)) for section in sections for name in type(section).__annotations__]
            digest = hashlib.sha256(repr(fields).encode())
            for name, parameter in parameters.items():
                digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                digest.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy())
            self._kept_fingerprint = version, digest.hexdigest()
        return self._kept_fingerprint[1]

    def _padded_on_the_right(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts [C, L] and their mask as short as they can be, padding last. Raises ValueError for what is no text."""
        text = self.config.text_config
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids must be [C, L] with at least one text, got shape {tuple(input_ids.shape)}")
        input_ids = input_ids.long()
        if attention_mask is None:
            attention_mask = text_mask(input_ids, text.pad_token_id, text.eos_token_id)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} differs from input_ids {tuple(input_ids.shape)}"
            )
        if not bool(attention_mask.any(dim=-1).all()):
            raise ValueError(f"text {int(attention_mask.any(dim=-1).long().argmin())} of input_ids has no tokens")
        padding_last = attention_mask.argsort(dim=-1, descending=True, stable=True)
        padding_last = padding_last[:, : int(attention_mask.sum(dim=-1).max())]
        return input_ids.gather(-1, padding_last), attention_mask.gather(-1, padding_last)

    def _references(self, prior_source: str | None, reference_pixel_values: Tensor | None) -> Tensor | None:
        """The images over which the prior is averaged, [R, channels, height, width]; None for the unconditional one."""
        if prior_source is None:
            prior_source = self.config.prior_source if reference_pixel_values is None else "reference_images"
        if prior_source not in ("unconditional", "reference_images"):
            raise ValueError(f"prior_source must be 'unconditional' or 'reference_images', got {prior_source!r}")
        if prior_source == "unconditional":
            if reference_pixel_values is not None:
                raise ValueError("prior_source 'unconditional' uses no reference_pixel_values, but they were given")
            return None
        if reference_pixel_values is not None:
            return reference_pixel_values
        vision = self.config.vision_config
        size = as_height_width(vision.image_size, "image_size")
        noise = torch.randn(
            self.config.num_reference_images, vision.num_channels, *size, generator=torch.Generator().manual_seed(0)
        )
        return noise.to(self.lm_head.weight)

    def _compile_or_recall(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        references: Tensor | None,
        chunk_size: int | None,
    ) -> CompiledTexts:
        input_ids, attention_mask = self._padded_on_the_right(input_ids, attention_mask)
        key = self._key_of_texts(input_ids, attention_mask, references)
        texts = self._kept_texts.get(key) or self._compile(input_ids, attention_mask, references, chunk_size)
        if key is not None:
            self._kept_texts[key] = texts
            while len(self._kept_texts) > MAX_KEPT_TEXTS:
                self._kept_texts.pop(next(iter(self._kept_texts)), None)
        return texts

    def _compile(
        self, input_ids: Tensor, attention_mask: Tensor, references: Tensor | None, chunk_size: int | None
    ) -> CompiledTexts:
        self.model.decoder.check_length(input_ids.shape[1])
        trie = build_trie(input_ids, attention_mask, self.config.decoder_start_token_id).to(input_ids.device)
        states = None
        if self.config.text_config.num_text_only_layers:
            passes = self._passes(trie, 1, chunk_size)
            states = torch.cat([self._read_blocks(trie, *blocks).hidden_states for blocks in passes])
        texts = CompiledTexts(trie, torch.zeros(0), states)
        if references is None:
            prior = trie.sum_over_texts(self._edges(texts, None, chunk_size))[0]
        else:
            prior = self._log_likelihoods(texts, references, chunk_size).logsumexp(dim=0) - math.log(len(references))
        return dataclasses.replace(texts, prior_log_likelihood=prior)

    def _log_likelihoods(self, texts: CompiledTexts, pixel_values: Tensor, chunk_size: int | None) -> Tensor:
        """log P(T|I), [B, C]."""
        rows = []
        image_tokens = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        for tokens in image_tokens.split(self._images_per_pass(texts.trie, chunk_size)):
            image_key_values = self.model.decoder.read_image(tokens)
            rows.append(texts.trie.sum_over_texts(self._edges(texts, image_key_values, chunk_size)))
        return torch.cat(rows)

    def _check_compiled(self, texts: CompiledTexts) -> CompiledTexts:
        if texts.fingerprint != self.fingerprint():
            raise ValueError(
                "these texts were compiled with other weights, or in another dtype: compile them again (fingerprint "
                f"{texts.fingerprint[:12]}..., the model's is {self.fingerprint()[:12]}...)"
            )
        return texts.to(self.lm_head.weight.device)

    def _edges(self, texts: CompiledTexts, image_key_values: list[KeyValues] | None, chunk_size: int | None) -> Tensor:
        """log P of every edge of a trie: [B, E] under B images, [1, E] without."""
        trie, parts = texts.trie, []
        images = 1 if image_key_values is None else len(image_key_values[0][0])
        for start, end in self._passes(trie, images, chunk_size):
            blocks = self._read_blocks(trie, start, end, texts.text_states)
            states = self.model.decoder.fuse(blocks.repeat(images), image_key_values)
            states = states.view(images, -1, states.shape[-1])
            first, last = trie.first_nodes[start], trie.first_nodes[end]
            while first < last:
                next_ = min(last, first + max(1, self._max_numbers() // (images * self.lm_head.out_features)))
                nodes = trie.nodes[first:next_] - start * trie.tokens.shape[1]
                edges = slice(trie.first_edges[first], trie.first_edges[next_])
                from_node = trie.edge_nodes[edges] - first
                log_p = self.lm_head(states[:, nodes]).float().log_softmax(dim=-1)
                parts.append(log_p[:, from_node, trie.edge_tokens[edges]])
                first = next_
        return torch.cat(parts, dim=1)

    def _read_blocks(self, trie: TextTrie, start: int, end: int, states: Tensor | None = None) -> TextStates:
        blocks = slice(start, end)
        states = None if states is None else states[blocks]
        return self.model.decoder.read_trie(trie.tokens[blocks], trie.depths[blocks], trie.ends[blocks], states)

    def _max_numbers(self) -> int:
        return MAX_NUMBERS_PER_CHUNK.get(self.lm_head.weight.device.type, MAX_NUMBERS_PER_CHUNK["other"])

    def _positions_per_pass(self, chunk_size: int | None) -> int:
        return chunk_size or self._max_numbers() // (2 * self.config.text_config.intermediate_size)

    def _images_per_pass(self, trie: TextTrie, chunk_size: int | None) -> int:
        return max(1, self._positions_per_pass(chunk_size) // trie.tokens.numel())

    def _passes(self, trie: TextTrie, images: int, chunk_size: int | None) -> Iterator[tuple[int, int]]:
        """First and last block of each pass over a trie."""
        blocks = max(1, self._positions_per_pass(chunk_size) // (images * trie.tokens.shape[1]))
        for start in range(0, len(trie.tokens), blocks):
            yield start, min(start + blocks, len(trie.tokens))

    def _key_of_texts(self, input_ids: Tensor, attention_mask: Tensor, references: Tensor | None) -> tuple | None:
        """Everything that log P(T) depends on, or None if that cannot be told or gradients are wanted."""
        parameters, device = list(self.parameters()), input_ids.device.type
        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return None
        if any(p.is_inference() for p in parameters) or any(map(is_intercepted, self.modules())):
            return None
        return (
            input_ids.cpu().numpy().tobytes(),
            attention_mask.cpu().numpy().tobytes(),
            input_ids.shape,
            None if references is None else hashlib.sha256(references.float().cpu().numpy().tobytes()).digest(),
            self.config.decoder_start_token_id,
            self.config.text_config._attn_implementation,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            *((id(p), p.data_ptr(), p.dtype, p._version) for p in parameters),
        )


def is_intercepted(module: nn.Module) -> bool:
    """Whether hooks, adapters (peft) or offloading (accelerate) may change what a module makes of its weights."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers' own, which record hidden states, change nothing
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
    has_adapter = hasattr(module, "disable_adapters") and not isinstance(module, IGCaptionerPreTrainedModel)
    return bool(foreign) or has_adapter or hasattr(module, "_hf_hook")


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` does nothing but multiply by its weight and add its bias (no FSDP unit of its own)."""
    watched = module._backward_hooks or module._backward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not watched and not is_intercepted(module)


class IGCaptionerForConditionalGeneration(IGCaptionerModelWithHead, GenerationMixin):
    """The captioner: training on images and texts, and generation of captions."""

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer may leave the division over accumulated batches to the loss: only if that counts tokens."""
        return self.config.loss_reduction == "token"

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
        skip_logits: bool | None = None,
        **kwargs,
    ) -> IGCaptionerCausalLMOutput:
        """Logits of the next token, or with `labels` the training loss.

        Args:
            input_ids: decoder inputs [N, L], start token first. Together with `labels`: the texts themselves, without a
                start token, of which `labels` marks the scored part (everything else -100).
            pixel_values: [N, channels, height, width]; left out, the text alone is modelled.
            labels: [N, L], the tokens to be predicted, end-of-sequence included; -100 is ignored. The decoder's input
                is made from them: `logits[:, i]` predicts `labels[:, i]`.
            past_key_values: holds the text only. With it, give `pixel_values` or `image_key_values` (see `read_image`)
                in every call; `generate` does.
            parallel_prediction: CapPa's mode for the whole batch. In training with labels,
                `config.parallel_prediction_prob` chooses texts at random instead.
            skip_logits: with `labels`, compute the loss without ever holding all logits, and return none; if not given,
                in training mode only. Saves memory and time unless the head has hooks or adapters.

        Raises:
            ValueError: for shapes that do not fit, or arguments that `labels` leaves no meaning.
        """
        if labels is not None:
            unused = {"inputs_embeds": inputs_embeds, "image_key_values": image_key_values}
            unused |= {"position_ids": position_ids, "past_key_values": past_key_values}
            for name, value in unused.items():
                if value is not None:
                    raise ValueError(f"{name} cannot be combined with labels, which the decoder's input is made from")
            return self._training_forward(
                labels,
                input_ids,
                pixel_values,
                attention_mask,
                parallel_prediction,
                num_items_in_batch,
                skip_logits,
                **kwargs,
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
        skip_logits: bool | None,
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
            inputs,
            attention_mask=attention_mask,
            image_key_values=key_values,
            parallel_rows=parallel_rows,
            use_cache=False,
            **kwargs,
        )
        if pixel_values is None:
            states = {"unconditional": outputs.last_hidden_state}
        else:
            states = {"conditional": outputs.last_hidden_state}
            if config.unconditional_weight > 0 or not self.training:
                # where mask tokens were read, the unconditional path has to read the texts themselves
                text = outputs.text_states if parallel_rows is None else decoder.read_text(inputs, attention_mask)
                states["unconditional"] = decoder.fuse(text)
        skip_logits = self.training if skip_logits is None else skip_logits
        loss, log_likelihoods, logits = self._head_loss(states, labels, num_items_in_batch, skip_logits)
        return IGCaptionerCausalLMOutput(
            loss=loss,
            logits=logits,
            **self._loss_report(log_likelihoods, labels, parallel_rows),
            encoder_last_hidden_state=image_tokens,
            **without(outputs, "last_hidden_state", "text_states"),
        )

    def _head_loss(
        self, states: dict[str, Tensor], labels: Tensor, num_items: Tensor | int | None, skip_logits: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """From states [N, L, D] of one or both paths: the loss, log P(token) [N, L] of each, the first path's logits.

        All logits are made only if they are asked for, or if the head may be more than its weight and bias.
        """
        factors = {"conditional": self.config.conditional_weight, "unconditional": self.config.unconditional_weight}
        weights = loss_weights(labels, self.config.loss_reduction, num_items)
        weights = torch.cat([factors[name] * weights for name in states])
        labels = labels.repeat(len(states), 1)
        head, logits = self.lm_head, None
        if skip_logits and is_plain_linear(head):
            # both paths at once: they share the sum of the weight's gradient
            loss, all_rows = linear_loss(torch.cat([*states.values()]), head.weight, head.bias, labels, weights)
        else:
            all_logits = [head(hidden_states) for hidden_states in states.values()]
            logits = None if skip_logits else all_logits[0]
            parts = labels.chunk(len(states))
            all_rows = torch.cat([token_log_likelihoods(*pair) for pair in zip(all_logits, parts, strict=True)])
            loss = -(all_rows * weights).sum()
        return loss, dict(zip(states, all_rows.detach().chunk(len(states)), strict=True)), logits

    def _loss_report(self, log_likelihoods: dict[str, Tensor], labels: Tensor, parallel_rows: Tensor | None) -> dict:
        """The output's fields beside the loss, from log P(token) [N, L] of one or both paths."""

        def mean(path: str, rows: Tensor | None = None) -> Tensor:
            counted = labels if rows is None else labels.masked_fill(~rows[:, None], IGNORE_INDEX)
            return mean_negative_log_likelihood(log_likelihoods[path], counted, self.config.loss_reduction)

        report = {}
        if "conditional" in log_likelihoods:
            report["caption_log_likelihood"] = log_likelihoods["conditional"].sum(dim=-1)
            report["captioning_loss"] = mean("conditional", None if parallel_rows is None else ~parallel_rows)
            if parallel_rows is not None:
                report["parallel_loss"] = mean("conditional", parallel_rows)
        if "unconditional" in log_likelihoods:
            report["prior_log_likelihood"] = log_likelihoods["unconditional"].sum(dim=-1)
            report["unconditional_loss"] = mean("unconditional")
        return report

    def _draw_parallel_rows(self, labels: Tensor, parallel_prediction: bool) -> Tensor | None:
        """Which texts [N] are predicted in parallel, or None if none can be."""
        probability = self.config.parallel_prediction_prob if self.training else 0.0
        if parallel_prediction:
            probability = 1.0
        if probability == 0:
            return None
        return torch.rand(len(labels), device=labels.device) < probability

    def read_image(self, pixel_values: Tensor) -> Tensor:
        """What the decoder reads of images, to be used as `image_key_values`: [B, fusion layers, 2, H, P, head]."""
        key_values, _ = self.model.encode_image(pixel_values)
        return torch.stack([torch.stack(pair, dim=1) for pair in key_values], dim=1)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs) -> ModelOutput | Tensor:
        """As in transformers. The image is read once, before decoding, whatever the number of beams or samples.

        Args:
            pixel_values: [N, channels, height, width]; left out, text is generated without an image.
            input_ids (or `inputs`): prompts [N, L], start token first; left out, the start token. If every text ends
                with the end-of-sequence token, as the tokenizer makes them, they are turned into that form.
            attention_mask: [N, L], for prompts padded on the left (on either side if they end with end-of-sequence).
        """
        prompt = kwargs.pop("input_ids", inputs)
        if prompt is not None and prompt.is_floating_point():
            raise ValueError(f"prompts are token ids, got {prompt.dtype}, shape {tuple(prompt.shape)}")
        if (pixel_values := kwargs.pop("pixel_values", None)) is not None:
            kwargs["image_key_values"] = self.read_image(pixel_values)
            if prompt is None and kwargs.get("inputs_embeds") is None:
                start = self.config.decoder_start_token_id
                prompt = torch.full((len(pixel_values), 1), start, device=pixel_values.device)
        if prompt is not None and prompt.numel():
            prompt, kwargs["attention_mask"] = self._as_prompt(prompt, kwargs.get("attention_mask"))
        return super().generate(prompt, *args, **kwargs)

    def _as_prompt(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts that end with end-of-sequence [N, L], to [start token, text] of the same length, padded on the left."""
        text = self.config.text_config
        mask = attention_mask
        if mask is None:
            mask = text_mask(input_ids, text.pad_token_id, text.eos_token_id)
            # the start token may be that of padding, or of the end as well
            behind_start = F.pad(text_mask(input_ids[:, 1:], text.pad_token_id, text.eos_token_id), (1, 0), value=1)
            mask = behind_start.where(input_ids[:, :1] == text.decoder_start_token_id, mask)
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

    accepts_loss_kwargs = False  # the loss is a mean over images, which Trainer divides when it accumulates

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
