"""IG Captioner: encoder and decoder together, the scores, and the two heads.

    image  -> IGCaptionerVisionModel -> image tokens [B, P, E] -> keys and values per fusion layer
                                                                     |
    tokens -> IGCaptionerTextDecoder: text-only layers -> fusion layers -> head -> log P [N, L, V]

`score` compares every image with every text: log P(T|I), log P(T) and their difference, the information gain
(arXiv 2311.17072). Training minimises a * CE(T|I) + b * CE(T), where CapPa (arXiv 2306.07915) predicts a share of the
texts in parallel.

An image can be passed at each stage of its way, so that nothing is computed twice:

    pixel_values       [B, channels, height, width]
    image_features     [B, P, E] of `encode_features`, made by the encoder only: kept while the encoder is frozen
    image tokens       [B, P, E] of `read_features`: normalised and with positions, if so configured; with gradients
    image_key_values   of `encode_image`, for each fusion layer; `read_image` stacks them for `generate`

Deliberate differences from the papers: the image may be fused with the text only above `num_text_only_layers` layers,
which both likelihoods share; a prefix carries no positions beyond those of the encoder.

Legend: B images, C candidate texts, N texts, P image tokens, L text tokens, E encoder width, D decoder width, H heads,
V vocabulary, W width of the head (D unless `text_config.embedding_size` says otherwise). Log-likelihoods are in nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import ModelOutput, can_return_tuple

from .compat_ig_captioner import CACHE_NAME, accepts_both_cache_names, rename_cache
from .compiled_labels import is_intercepted
from .configuration_ig_captioner import IGCaptionerConfig, IGCaptionerTextConfig
from .decoder_ig_captioner import IGCaptionerTextDecoder
from .encoder_ig_captioner import (
    IGCaptionerImageTokens,
    IGCaptionerPreTrainedModel,
    IGCaptionerVisionModel,
    KeyValues,
)
from .information_gain import (
    IGNORE_INDEX,
    linear_loss,
    loss_weights,
    mean_negative_log_likelihood,
    shift_right,
    smoothed_log_likelihoods,
    token_log_likelihoods,
)

# Not used here: code is fetched entry file by entry file with what that file imports, and a model so fetched must find
# all of its files beside this one when it is saved again.
from .input_rules import to_rgb  # noqa: F401
from .label_trie import TextTrie  # noqa: F401
from .pipeline_ig_captioner import IGZeroShotImageClassificationPipeline  # noqa: F401
from .processing_ig_captioner import IGCaptionerProcessor  # noqa: F401
from .scoring_ig_captioner import IGCaptionerScorer
from .text_rules import as_prompt, check_decoder_inputs, check_labels, labelled_texts, prompt_before_labels
from .vision_ig_captioner import (
    as_map,
    as_tokens,
    build_encoder,
    find_layout,
    keep_frozen_in_evaluation,
    mean_over_grids,
    run_encoder,
)


@dataclass
class IGCaptionerModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """last_hidden_state [N, L, W]; encoder_last_hidden_state [N, P, E] if pixels were given."""

    encoder_last_hidden_state: Tensor | None = None


@dataclass
class IGCaptionerCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """Output of [`IGCaptionerForConditionalGeneration`]. Losses are scalars in nats per token.

    loss: `conditional_weight * (captioning or parallel) + unconditional_weight * unconditional`.
    captioning_loss: CE(T|I) over the texts that were predicted causally; nan if the draw left none.
    unconditional_loss: CE(T), without the image. Their difference is the information gain per token.
    parallel_loss: CE(T|I) over the texts that were predicted in parallel; nan if the draw left none.
    caption_log_likelihood, prior_log_likelihood: log P(T|I) and log P(T) [N] of the labels in nats, without a gradient.
        Of texts that were predicted in parallel, the first is the sum of log P(token|I), each token without the others.
    logits: [N, L, V]; position i predicts token i of `labels`, or the token after `input_ids[:, i]`. None in training.
    """

    captioning_loss: Tensor | None = None
    unconditional_loss: Tensor | None = None
    parallel_loss: Tensor | None = None
    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


@dataclass
class IGCaptionerZeroShotOutput(ModelOutput):
    """logits_per_image [B, C]: the information gain in nats.

    At prior weight 1 its softmax over the texts is Bayes' posterior, had they been equally likely before the image.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None

    def __getitem__(self, key):
        """As in transformers; "logits", for which Trainer's label smoothing asks every model, are those per image."""
        return super().__getitem__("logits_per_image" if key == "logits" else key)


def without(output: ModelOutput, *names: str) -> dict:
    """The fields of `output` that are set, except `names`."""
    return {name: value for name, value in output.items() if name not in names}


class IGCaptionerModel(IGCaptionerPreTrainedModel):
    """Image encoder and text decoder without a head."""

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        build = IGCaptionerVisionModel.from_config if config.has_own_encoder else build_encoder
        self.vision_model = build(config.vision_config)
        self.image_tokens = IGCaptionerImageTokens(config)
        self.decoder = IGCaptionerTextDecoder.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed_tokens = value

    def train(self, mode: bool = True):
        """As in torch, but a frozen encoder stays in evaluation mode: its batch norms and dropout are frozen, too."""
        super().train(mode)
        keep_frozen_in_evaluation(self.vision_model)
        return self

    def encode_features(self, pixel_values: Tensor) -> Tensor:
        """Image features [B, P, E] of images [B, channels, height, width], pooled to `image_token_grids` if set.

        They depend on no weight but the encoder's, so that a frozen encoder's features can be kept and passed as
        `image_features` later.
        """
        features = run_encoder(self.vision_model, pixel_values)
        grids = self.config.image_token_grids
        if grids is None:
            return as_tokens(features)
        return mean_over_grids(self._patches(features, pixel_values), grids)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encodes images [B, channels, height, width], under the name that other models of transformers have for it.

        There is no `get_text_features`: a captioner has no vector of a text to compare with that of an image, it
        scores both together (`score`).

        Returns:
            `last_hidden_state`, all tokens of the encoder [B, P, E], and `pooler_output`, the mean over patches [B, E].
        """
        if self.config.has_own_encoder:
            return self.vision_model(pixel_values=pixel_values, **kwargs)
        features = run_encoder(self.vision_model, pixel_values)
        pooled = self._patches(features, pixel_values).mean(dim=(2, 3))
        return BaseModelOutputWithPooling(last_hidden_state=as_tokens(features), pooler_output=pooled)

    def pooled_features(self, pixel_values: Tensor) -> Tensor:
        """The mean over the encoder's patches, for probes: [B, E]. Class and register tokens are left out."""
        return self._patches(run_encoder(self.vision_model, pixel_values), pixel_values).mean(dim=(2, 3))

    def _patches(self, features: Tensor, pixel_values: Tensor) -> Tensor:
        """The map of patches [B, E, rows, columns] in what the encoder returned."""
        vision = self.config.vision_config
        registers = vision.num_register_tokens if self.config.has_own_encoder else 0
        height, width = pixel_values.shape[-2:]
        return as_map(features, find_layout(features, (height, width), vision, registers))

    def read_features(self, pixel_values: Tensor | None, image_features: Tensor | None = None) -> Tensor:
        """Image tokens [B, P, E], as the decoder reads them, from images or from their `image_features`."""
        if (pixel_values is None) == (image_features is None):
            raise ValueError("give exactly one of pixel_values and image_features")
        features = self.encode_features(pixel_values) if image_features is None else image_features
        return self.image_tokens(features.to(self.decoder.embed_tokens.weight.dtype))

    def encode_image(
        self, pixel_values: Tensor | None = None, image_features: Tensor | None = None
    ) -> tuple[list[KeyValues], Tensor]:
        """Encodes images [B, channels, height, width], or goes on from their `image_features`.

        Returns:
            Keys and values for each fusion layer of the decoder, and the image tokens [B, P, E].
        """
        image_tokens = self.read_features(pixel_values, image_features)
        return self.decoder.read_image(image_tokens), image_tokens

    @accepts_both_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: Tensor | None = None,
        image_features: Tensor | None = None,
        parallel_prediction: bool = False,
        use_cache: bool | None = None,
        **kwargs,
    ) -> IGCaptionerModelOutput:
        """Decoder inputs [N, L], start token first, and N images (or none) to states [N, L, W].

        Without a text, images become what `get_image_features` returns: the pipeline "image-feature-extraction" asks
        for them so.

        Args:
            image_key_values: [N, fusion layers, 2, H, P, head], instead of `pixel_values`: images read before.
            image_features: [N, P, E], instead of `pixel_values`: what `encode_features` returned.
            parallel_prediction: CapPa's mode, mask tokens in place of the text and no causal mask.
        """
        has_text = not (input_ids is None and inputs_embeds is None and image_key_values is None and cache is None)
        if not has_text and pixel_values is not None:
            return self.get_image_features(pixel_values, **kwargs)
        key_values, image_tokens = None, None
        if image_key_values is not None:
            key_values = [(layer[:, 0], layer[:, 1]) for layer in image_key_values.unbind(1)]
        elif pixel_values is not None or image_features is not None:
            key_values, image_tokens = self.encode_image(pixel_values, image_features)
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
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_key_values=key_values,
            parallel_rows=parallel_rows,
            use_cache=use_cache,
            **kwargs,
        )
        return IGCaptionerModelOutput(**without(outputs, "text_states"), encoder_last_hidden_state=image_tokens)


class IGCaptionerModelWithHead(IGCaptionerScorer):
    """Base of the two heads: `log P(token)`, and scores of texts. Both save the same weights."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: IGCaptionerConfig):
        super().__init__(config)
        # Not what transformers finds in the class name, ForConditionalGeneration: under that name Trainer takes labels
        # for shifted, and counts the first of each text out.
        self.loss_type = "InformationGain"
        text: IGCaptionerTextConfig = config.text_config
        self.model = IGCaptionerModel(config)
        self.lm_head = nn.Linear(text.embedding_width, text.vocab_size, bias=text.head_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """As of the model without a head."""
        return self.model.get_image_features(pixel_values, **kwargs)


def is_plain_linear(module: nn.Module) -> bool:
    """Tells whether calling `module` multiplies by its weight, adds its bias, and does nothing else.

    An FSDP unit, which gathers its weight first, and an adapter do more.
    """
    has_backward_hooks = module._backward_hooks or module._backward_pre_hooks
    return type(module) is nn.Linear and not has_backward_hooks and not is_intercepted(module)


class IGCaptionerForConditionalGeneration(IGCaptionerModelWithHead, GenerationMixin):
    """The captioner: training on images and texts, and generation of captions."""

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Lets Trainer leave the division over accumulated batches to the loss, if that is a mean over tokens.

        Trainer does not count texts, so that with `loss_reduction="sequence"` it takes the mean over the batches that
        it accumulates: a shorter last one counts as much as the others (`dataloader_drop_last=True` leaves it out).
        """
        return self.config.loss_reduction == "token"

    @accepts_both_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_key_values: Tensor | None = None,
        image_features: Tensor | None = None,
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
            pixel_values: [N, channels, height, width]; left out, log P(T) is modelled.
            image_features: [N, P, E], instead of `pixel_values`: what `model.encode_features` returned.
            labels: [N, L], the tokens to be predicted, end-of-sequence included, without a start token; -100 is
                ignored, and so is padding. The decoder's input is made from them: `logits[:, i]` predicts
                `labels[:, i]`.
            cache (or `past_key_values`): holds the text only. With it, give `pixel_values` or `image_key_values` (see
                `read_image`) in every call; `generate` does.
            parallel_prediction: CapPa's mode for the whole batch. In training with labels,
                `config.parallel_prediction_prob` chooses texts at random instead.
            skip_logits: with `labels`, compute the loss without ever holding all logits, and return none; if not given,
                in training mode only. Saves memory and time unless the head has hooks or adapters.

        Raises:
            ValueError: for shapes that do not fit, arguments that `labels` leaves no meaning, and labels or, in
                training mode, decoder inputs that cannot be meant.
        """
        if labels is not None:
            unused = {
                "inputs_embeds": inputs_embeds,
                "image_key_values": image_key_values,
                "position_ids": position_ids,
                "cache": cache,
            }
            for name, value in unused.items():
                if value is not None:
                    raise ValueError(f"{name} cannot be combined with labels, which the decoder's input is made from")
            return self._training_forward(
                labels,
                input_ids,
                pixel_values,
                image_features,
                attention_mask,
                parallel_prediction,
                num_items_in_batch,
                skip_logits,
                **kwargs,
            )
        may_lack_labels = self.training or input_ids is None or num_items_in_batch is not None
        if may_lack_labels and inputs_embeds is None and cache is None:
            check_decoder_inputs(input_ids, attention_mask, num_items_in_batch, self.config.text_config)
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_key_values=image_key_values,
            image_features=image_features,
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
        image_features: Tensor | None,
        attention_mask: Tensor | None,
        parallel_prediction: bool,
        num_items_in_batch: Tensor | int | None,
        skip_logits: bool | None,
        **kwargs,
    ) -> IGCaptionerCausalLMOutput:
        """Computes a * CE(T|I) + b * CE(T), or b * CE(T) without images.

        Both paths share one pass of the text-only layers where they read the same text.
        """
        config = self.config
        decoder = self.model.decoder
        given_labels = labels
        input_ids, attention_mask, labels = labelled_texts(labels, input_ids, attention_mask, config.text_config)
        inputs = shift_right(input_ids, config.decoder_start_token_id, attention_mask)
        key_values, image_tokens = None, None
        if pixel_values is not None or image_features is not None:
            key_values, image_tokens = self.model.encode_image(pixel_values, image_features)
        parallel_rows = self._draw_parallel_rows(labels, parallel_prediction)
        outputs = decoder(
            inputs,
            attention_mask=attention_mask,
            image_key_values=key_values,
            parallel_rows=parallel_rows,
            use_cache=False,
            **kwargs,
        )
        if key_values is None:
            states = {"unconditional": outputs.last_hidden_state}
        else:
            states = {"conditional": outputs.last_hidden_state}
            if config.unconditional_weight > 0 or not self.training:
                # where mask tokens were read, the unconditional path has to read the texts themselves
                text = outputs.text_states if parallel_rows is None else decoder.read_text(inputs, attention_mask)
                states["unconditional"] = decoder.fuse(text)
        if not torch.compiler.is_compiling():  # here, since the loss waits for the device anyway
            check_labels(given_labels, labels, num_items_in_batch, config.text_config)
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
        """Computes the training loss from states [N, L, W] of one or both paths, "conditional" and "unconditional".

        Smoothing of labels is in the loss only. Logits are made only if they are asked for, or if the head may be more
        than its weight and bias.

        Returns:
            The loss; log P(token) [N, L] of each path, without a gradient; the logits of the first path, if asked for.
        """
        factors = {"conditional": self.config.conditional_weight, "unconditional": self.config.unconditional_weight}
        token_weights = loss_weights(labels, self.config.loss_reduction, num_items)
        weights = torch.cat([factors[path] * token_weights for path in states])
        smoothing = self.config.label_smoothing if self.training and "conditional" in states else 0.0
        if skip_logits and is_plain_linear(self.lm_head):
            return *self._loss_without_logits(states, labels, weights, smoothing), None
        logits = {path: self.lm_head(hidden_states) for path, hidden_states in states.items()}
        log_likelihoods = {path: token_log_likelihoods(values, labels) for path, values in logits.items()}
        learned = dict(log_likelihoods)
        if smoothing:
            share = torch.full_like(token_weights, smoothing)
            learned["conditional"] = smoothed_log_likelihoods(logits["conditional"], labels, share)
        loss = -(torch.cat([*learned.values()]) * weights).sum()
        log_likelihoods = {path: values.detach() for path, values in log_likelihoods.items()}
        return loss, log_likelihoods, None if skip_logits else next(iter(logits.values()))

    def _loss_without_logits(
        self, states: dict[str, Tensor], labels: Tensor, weights: Tensor, smoothing: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Does the same by `linear_loss`. Both paths go in at once: they share the sum of the weight's gradient.

        Args:
            weights: of each token of each path in the loss, [paths * N, L].
            smoothing: share of each target of CE(T|I) that is spread over the vocabulary.
        """
        shares = None
        if smoothing:
            of_path = {"conditional": smoothing, "unconditional": 0.0}
            shares = torch.cat([torch.full_like(labels, of_path[path], dtype=weights.dtype) for path in states])
        loss, log_likelihoods = linear_loss(
            torch.cat([*states.values()]),
            self.lm_head.weight,
            self.lm_head.bias,
            labels.repeat(len(states), 1),
            weights,
            shares,
        )
        return loss, dict(zip(states, log_likelihoods.chunk(len(states)), strict=True))

    def _loss_report(self, log_likelihoods: dict[str, Tensor], labels: Tensor, parallel_rows: Tensor | None) -> dict:
        """Fields of the output beside the loss, from log P(token) [N, L] of one or both paths."""

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
        """Draws the texts [N] that are predicted in parallel; None if none can be."""
        probability = self.config.parallel_prediction_prob if self.training else 0.0
        if parallel_prediction:
            probability = 1.0
        if probability == 0:
            return None
        return torch.rand(len(labels), device=labels.device) < probability

    def read_image(self, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """`image_key_values` [B, fusion layers, 2, H, P, head] of images, or of their `image_features`.

        They are the keys and values of `encode_image` in one tensor with a row per image: `generate` repeats rows.
        """
        key_values, _ = self.model.encode_image(pixel_values, image_features)
        return torch.stack([torch.stack(pair, dim=1) for pair in key_values], dim=1)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args, **kwargs) -> ModelOutput | Tensor:
        """As in transformers. The image is read once, before decoding, whatever the number of beams or samples.

        Args:
            pixel_values: [N, channels, height, width]; left out, text is generated without an image.
            image_features: [N, P, E], instead of `pixel_values`: what `model.encode_features` returned.
            input_ids (or `inputs`): prompts [N, L], start token first; left out, the start token. If every text ends
                with the end-of-sequence token, as the tokenizer makes them, they are turned into that form.
            attention_mask: [N, L], for prompts padded on the left (on either side if they end with end-of-sequence).
            labels: [N, L], of a batch as in training (Trainer passes it with `predict_with_generate`): what they hold
                is to be generated, so that only the text before them is a prompt.
        """
        kwargs = rename_cache(kwargs, CACHE_NAME)
        text_config = self.config.text_config
        prompt = kwargs.pop("input_ids", inputs)
        labels = kwargs.pop("labels", None)
        if prompt is not None and prompt.is_floating_point():
            raise ValueError(f"prompts are token ids, got {prompt.dtype}, shape {tuple(prompt.shape)}")
        mask = kwargs.get("attention_mask")
        if prompt is not None and labels is not None:
            prompt, kwargs["attention_mask"] = prompt_before_labels(labels, prompt, mask, text_config)
        elif prompt is not None and prompt.numel():
            prompt, kwargs["attention_mask"] = as_prompt(prompt, mask, text_config)
        pixel_values = kwargs.pop("pixel_values", None)
        image_features = kwargs.pop("image_features", None)
        if pixel_values is not None or image_features is not None:
            image_key_values = self.read_image(pixel_values, image_features)
            kwargs["image_key_values"] = image_key_values
            if prompt is None and kwargs.get("inputs_embeds") is None:
                start = text_config.decoder_start_token_id
                device = image_key_values.device
                prompt = torch.full((len(image_key_values), 1), start, device=device)
                if kwargs.get(CACHE_NAME) is None:
                    # a mask made from the ids would leave out a start token that has the id of padding
                    kwargs["attention_mask"] = torch.ones_like(prompt)
        return super().generate(prompt, *args, **kwargs)


def mean_cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The mean over images of -log P(right text) in nats, a scalar, from logits [B, C] and labels [B].

    Args:
        num_items: divides the sum, instead of the number of images; those labelled -100 do not count.
    """
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


# Arguments that transformers may pass to any model, and that this head has no use for.
WITHOUT_EFFECT = ("output_attentions", "output_hidden_states", "return_loss", "use_cache")


class IGCaptionerForZeroShotImageClassification(IGCaptionerModelWithHead):
    """The captioner as a classifier of images among candidate texts, with the interface of CLIP and SigLIP."""

    accepts_loss_kwargs = True  # Trainer counts labels, of which there is one an image, over accumulated batches

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
        prior_weight: float | None = None,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> IGCaptionerZeroShotOutput:
        """Scores texts [C, L] under images [B, channels, height, width]; for the other arguments see `score`.

        Args:
            labels: [B], index of the right text of each image; gives the cross-entropy over texts as `loss`.
            num_items_in_batch: divides the sum of that over images, instead of their number, as Trainer does under
                gradient accumulation.

        Raises:
            TypeError: for unknown arguments, unless they are None. `WITHOUT_EFFECT` are those of all models.
        """
        if unknown := [name for name in kwargs if name not in WITHOUT_EFFECT and kwargs[name] is not None]:
            raise TypeError(f"unknown arguments: {', '.join(unknown)}")
        scores = self.score(
            pixel_values,
            input_ids,
            attention_mask,
            image_features=image_features,
            prior_weight=prior_weight,
            prior_source=prior_source,
            reference_pixel_values=reference_pixel_values,
            chunk_size=chunk_size,
        )
        logits = scores.information_gain
        return IGCaptionerZeroShotOutput(
            loss=None if labels is None else mean_cross_entropy(logits, labels, num_items_in_batch),
            logits_per_image=logits,
            logits_per_text=logits.T,
            caption_log_likelihood=scores.caption_log_likelihood,
            prior_log_likelihood=scores.prior_log_likelihood,
        )
