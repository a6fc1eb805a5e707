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

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ig_captioner import IGCaptionerConfig, IGCaptionerTextConfig
from .decoder_ig_captioner import IGCaptionerTextDecoder, TextStates
from .encoder_ig_captioner import IGCaptionerPreTrainedModel, IGCaptionerVisionModel, KeyValues
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


# log P needs [texts, L, V] logits; a chunk of (image, text) pairs holds at most this many of them: 256 MiB in float32,
# and on a CPU what its caches can hold (the shipped checkpoint scores 815 captions 1.5 times as fast as with 2**26).
MAX_LOGITS_PER_CHUNK = {"cpu": 2**23, "other": 2**26}


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
    """C texts as `score` keeps them: labels [C, L], padded on the right by -100, their states, and log P(T) [C]."""

    labels: Tensor
    states: TextStates
    prior_log_likelihood: Tensor | None = None


class IGCaptionerModelWithHead(IGCaptionerPreTrainedModel):
    """Base of the two heads: `log P(token)` and the scoring of candidate texts. Both save the same weights."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _keep_label_sets = 8

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        text: IGCaptionerTextConfig = config.text_config
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

    def set_output_embeddings(self, value: nn.Linear) -> None:
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
            chunk_size: (image, text) pairs per forward pass; by default as many as keep the logits under 256 MiB (on a
                CPU 32 MiB). It changes memory and speed, not scores.

        Returns:
            [`IGCaptionerScoreOutput`], float32.

        Raises:
            ValueError: for an empty text, a shape or a chunk size that does not fit, or an unknown reduction.
        """
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        if not len(pixel_values):
            raise ValueError(f"pixel_values holds no image, got shape {tuple(pixel_values.shape)}")
        texts = self._candidate_texts(input_ids, attention_mask, reduction)
        image_key_values, _ = self.model.encode_image(pixel_values)
        num_images, num_texts = len(pixel_values), len(texts.labels)
        by_length = (texts.labels != IGNORE_INDEX).sum(dim=-1).argsort()  # so that a chunk holds little padding
        pairs = torch.arange(num_texts * num_images, device=texts.labels.device)
        scores = []
        for chunk in pairs.split(chunk_size or self._default_chunk_size(texts.labels.shape[1])):
            text, image = by_length[chunk // num_images], chunk % num_images
            key_values = [(key[image], value[image]) for key, value in image_key_values]
            scores.append(self._log_likelihood(texts, text, key_values, reduction))
        caption_log_likelihood = torch.cat(scores).view(num_texts, num_images)[by_length.argsort()].T
        prior_weight = self.config.prior_weight if prior_weight is None else prior_weight
        return IGCaptionerScoreOutput(
            caption_log_likelihood=caption_log_likelihood,
            prior_log_likelihood=texts.prior_log_likelihood,
            information_gain=information_gain(caption_log_likelihood, texts.prior_log_likelihood, prior_weight),
        )

    def _default_chunk_size(self, length: int) -> int:
        limit = MAX_LOGITS_PER_CHUNK.get(self.device.type, MAX_LOGITS_PER_CHUNK["other"])
        return max(1, limit // (length * self.config.text_config.vocab_size))

    def _log_likelihood(
        self, texts: CandidateTexts, rows: Tensor, key_values: list[KeyValues] | None, reduction: str
    ) -> Tensor:
        """log P [M] of the texts chosen by `rows` [M], under one image each or without images."""
        labels = texts.labels[rows]
        length = int((labels != IGNORE_INDEX).sum(dim=-1).max())
        logits = self.lm_head(self.model.decoder.fuse(texts.states.rows(rows, length), key_values))
        return sequence_log_likelihood(logits, labels[:, :length], reduction)

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
        if not bool(attention_mask.any(dim=-1).all()):
            raise ValueError(f"text {int(attention_mask.any(dim=-1).long().argmin())} of input_ids has no tokens")
        padding_last = attention_mask.argsort(dim=-1, descending=True, stable=True)
        padding_last = padding_last[:, : int(attention_mask.sum(dim=-1).max())]
        input_ids, attention_mask = input_ids.gather(-1, padding_last), attention_mask.gather(-1, padding_last)

        keep = not (self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())))
        if not keep:
            return self._read_candidate_texts(input_ids, attention_mask, reduction)
        weights = [(id(p), p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.parameters()]
        texts = (input_ids.cpu().numpy().tobytes(), attention_mask.cpu().numpy().tobytes(), input_ids.shape)
        key = (*texts, reduction, *weights)
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
        texts = CandidateTexts(labels, self.model.decoder.read_text(inputs, attention_mask=attention_mask))
        rows = torch.arange(len(labels), device=labels.device)
        prior = [
            self._log_likelihood(texts, chunk, None, reduction)
            for chunk in rows.split(self._default_chunk_size(labels.shape[1]))
        ]
        texts.prior_log_likelihood = torch.cat(prior)
        return texts


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
            input_ids (or `inputs`): prompts [N, L], start token first; left out, the start token. If every text ends
                with the end-of-sequence token, as the tokenizer makes them, they are turned into that form.
            attention_mask: [N, L], for prompts padded on the left (on either side if they end with end-of-sequence).
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
