"""Scores: log P(T|I), log P(T) and information gain of many texts under many images.

Three things make a thousand texts cheap: images are encoded once; texts are a trie (`label_trie.py`), whose shared
beginnings the decoder reads once; and `compile_texts` computes once what does not depend on the image (log P(T), the
states of the text-only layers, what the layer after them projects), for any number of calls of `score`.

Legend: B images, C candidate texts, E edges of a trie, L text tokens, D decoder width. Log-likelihoods are in nats.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .compiled_labels import CompiledLabels, CompiledTexts, fingerprint_of, is_compiled, refuse_prior
from .configuration_ig_captioner import PRIOR_SOURCES, IGCaptionerConfig
from .decoder_ig_captioner import TextStates
from .encoder_ig_captioner import IGCaptionerPreTrainedModel, KeyValues
from .information_gain import information_gain, label_log_prior, mean_over_references, mean_over_templates
from .input_rules import tell
from .label_trie import TextTrie, build_trie
from .text_rules import scored_form


# How many numbers are held at once of what grows with texts and images: logits, and the inner states of an MLP.
# 2**28 is 1 GiB in float32; on a CPU less, so that it stays in the caches.
MAX_NUMBERS_PER_CHUNK = {"cpu": 2**21, "other": 2**28}
# Up to how many numbers of queries, keys and values are kept with compiled texts: 128 MiB in float32, three times the
# states of the same nodes. A thousand labels at a width of 384 have 4.7 million.
MAX_NUMBERS_OF_PROJECTIONS = 2**25


# Black, grey and white, as pixel values: images that show nothing, where no reference images are given.
PLAIN_LEVELS = (-1.0, 0.0, 1.0)


@dataclass
class IGCaptionerScoreOutput(ModelOutput):
    """caption_log_likelihood log P(T|I) [B, C], prior_log_likelihood log P(T) [C], information_gain [B, C]; in nats."""

    caption_log_likelihood: Tensor | None = None
    prior_log_likelihood: Tensor | None = None
    information_gain: Tensor | None = None


class IGCaptionerScorer(IGCaptionerPreTrainedModel):
    """A model that scores texts; a subclass has a `model` (image encoder and text decoder) and an `lm_head`."""

    config: IGCaptionerConfig
    model: Any
    lm_head: Any

    def score(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | CompiledTexts | CompiledLabels,
        attention_mask: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        prior_weight: float | None = None,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        reference_mean: str = "arithmetic",
        label_prior: Sequence[float] | Tensor | None = None,
        reduction: str = "sum",
        chunk_size: int | None = None,
    ) -> IGCaptionerScoreOutput:
        """Scores every candidate text under every image.

        Images are encoded once. Texts are compiled to a trie, which reads what they have in common once. Nothing is
        kept: for the same texts in several calls, pass what `compile_texts` or `compile_labels` returned, which saves
        the trie, log P(T) and the text-only layers of every call but one.

        Args:
            pixel_values: [B, channels, height, width]; None with `image_features`.
            input_ids: [C, L], exactly the tokens that are scored: end-of-sequence included, start token excluded; or
                what `compile_texts` or `compile_labels` returned. The start token of texts that all have one, as
                `generate` returns them, is left out.
            attention_mask: [C, L] of 0 and 1, padding on either side; found from the padding id if not given, on the
                right where that is an end-of-sequence id, too.
            image_features: [B, P, E], what `model.encode_features` made of the images.
            prior_weight: weight of log P(T); `config.prior_weight` if not given. 0 ranks by likelihood.
            prior_source: "unconditional" or "reference_images"; `config.prior_source` if not given.
            reference_pixel_values: [R, channels, height, width], the images over which P(T|I) is averaged to P(T);
                implies "reference_images". Three plain images if not given: black, grey and white.
            reference_mean: "arithmetic", the mean of P(T|I), or "geometric", the mean of log P(T|I).
            label_prior: a weight or a log-probability of each text, or of each label that was compiled, which is added
                to information gain; see `label_log_prior`.
            reduction: "sum" for nats per text, "mean" for nats per token.
            chunk_size: how many nodes of the trie, times images, the decoder reads at once, but at least one block of
                about `label_trie.BLOCK_SIZE`; by default what `MAX_NUMBERS_PER_CHUNK` allows. It changes memory and
                speed, not scores. Where gradients are asked for, autograd keeps every pass.

        Returns:
            [`IGCaptionerScoreOutput`], float32. Of labels in several templates, C labels, it has means over templates.

        Raises:
            ValueError: for an empty text, a token outside the vocabulary, a shape or a chunk size that does not fit, an
                unknown reduction or prior, or texts that were compiled with other weights.
        """
        self._tell_of_dropout()
        given: Any = input_ids  # their class says little: remote code has classes of its own
        positions = self._positions_per_pass(chunk_size)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        image_tokens = self._read_images(pixel_values, image_features)
        if isinstance(given, Tensor):
            references = self._references(prior_source, reference_pixel_values, given.device)
            texts = self._compile(given, attention_mask, references, reference_mean, positions)
        else:
            texts = self._compiled_before(given, prior_source, reference_pixel_values).to(image_tokens.device)
        caption = self._log_likelihoods(texts, image_tokens, positions)
        prior = texts.prior_log_likelihood.clone()  # the caller's to change, unlike that of compiled texts
        if reduction == "mean":
            caption = caption / texts.trie.lengths
            prior = prior / texts.trie.lengths
        if is_compiled(given):
            caption = mean_over_templates(caption, len(given.templates))
            prior = mean_over_templates(prior, len(given.templates))
        gain = information_gain(caption, prior, self.config.prior_weight if prior_weight is None else prior_weight)
        if label_prior is not None:
            gain = gain + label_log_prior(label_prior, gain.shape[1]).to(gain.device)
        return IGCaptionerScoreOutput(caption, prior, gain)

    def _read_images(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Images as the decoder reads them, [B, P, E]."""
        for name, images in (("pixel_values", pixel_values), ("image_features", image_features)):
            if images is not None and not len(images):
                raise ValueError(f"{name} holds no image, got shape {tuple(images.shape)}")
        return self.model.read_features(pixel_values, image_features)

    def _compiled_before(
        self, compiled: Any, prior_source: str | None, reference_pixel_values: Tensor | None
    ) -> CompiledTexts:
        """The texts of what was compiled, checked to be this model's and to come without another prior."""
        refuse_prior(prior_source=prior_source, reference_pixel_values=reference_pixel_values)
        return (compiled.texts if is_compiled(compiled) else compiled).verified_for(self)

    def compile_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prior_source: str | None = None,
        reference_pixel_values: Tensor | None = None,
        reference_mean: str = "arithmetic",
        chunk_size: int | None = None,
        with_fingerprint: bool = True,
    ) -> CompiledTexts:
        """All of `score` that needs no image and no gradient, to be passed to it in place of `input_ids`.

        Args: as for `score`, and
            with_fingerprint: whether `score` compares the weights with those that compiled the texts, which takes a
                pass over them in every call. False where nothing can have changed in between.

        Raises:
            ValueError: as `score`, and in training mode, where dropout would become part of the result.
        """
        if self.training:
            raise ValueError("texts are compiled in evaluation mode, but the model is in training mode: call eval()")
        positions = self._positions_per_pass(chunk_size)
        with torch.inference_mode(False), torch.no_grad():
            references = self._references(prior_source, reference_pixel_values, input_ids.device)
            compiled = self._compile(input_ids, attention_mask, references, reference_mean, positions)
        return dataclasses.replace(compiled, fingerprint=self.fingerprint() if with_fingerprint else "")

    def edge_log_likelihoods(
        self, texts: CompiledTexts, pixel_values: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """log P of every edge of a trie, [B, E], or [1, E] without images; that of a text is the sum over its edges.

        `texts.trie.text_edges` [C, L] says which edges a text consists of.
        """
        positions = self._positions_per_pass(chunk_size)
        if pixel_values is None:
            return self._edges(texts.verified_for(self), None, positions)
        image_tokens = self.model.read_features(pixel_values)
        texts = texts.verified_for(self).to(image_tokens.device)
        return torch.cat(list(self._edges_by_image(texts, image_tokens, positions)))

    def _tell_of_dropout(self) -> None:
        sections = (self.config.vision_config, self.config.text_config)
        rates = [getattr(section, name, 0.0) for section in sections for name in ("dropout", "attention_dropout")]
        if self.training and not torch.is_grad_enabled() and any(rates):
            tell("the model is in training mode, so that dropout makes other scores in every call: call eval()")

    def fingerprint(self) -> str:
        """Identifies all that scores depend on: weights, architecture, autocast, hooks and the state of adapters."""
        return fingerprint_of(self)

    def _references(
        self, prior_source: str | None, reference_pixel_values: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """The images over which the prior is averaged, [R, channels, height, width]; None for the unconditional one."""
        if prior_source is None:
            prior_source = self.config.prior_source if reference_pixel_values is None else "reference_images"
        if prior_source not in PRIOR_SOURCES:
            raise ValueError(f"prior_source must be one of {PRIOR_SOURCES}, got {prior_source!r}")
        if prior_source == "unconditional":
            if reference_pixel_values is not None:
                raise ValueError("prior_source 'unconditional' uses no reference_pixel_values, but they were given")
            return None
        if reference_pixel_values is not None:
            if not len(reference_pixel_values):
                shape = tuple(reference_pixel_values.shape)
                raise ValueError(f"reference_pixel_values holds no image, got shape {shape}")
            return reference_pixel_values
        levels = torch.tensor(PLAIN_LEVELS, device=device, dtype=self.dtype).view(-1, 1, 1, 1)
        return levels.expand(-1, self.config.image_channels, *self.config.image_size)

    @torch.compiler.disable
    def _compile(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        references: Tensor | None,
        reference_mean: str,
        positions: int,
    ) -> CompiledTexts:
        """Compiles texts [C, L], without a fingerprint; arguments as for `score`, `references` from `_references`."""
        input_ids, attention_mask = scored_form(input_ids, attention_mask, self.config.text_config)
        self.model.decoder.check_length(input_ids.shape[1])
        trie = build_trie(input_ids, attention_mask, self.config.decoder_start_token_id).to(input_ids.device)
        texts = self._read_without_image(trie, positions)
        if references is None:
            prior = trie.sum_over_texts(self._edges(texts, None, positions))[0]
        else:
            image_tokens = self.model.read_features(references)
            prior = mean_over_references(self._log_likelihoods(texts, image_tokens, positions), reference_mean)
        return dataclasses.replace(texts, prior_log_likelihood=prior)

    def _read_without_image(self, trie: TextTrie, positions: int) -> CompiledTexts:
        """What the images do not change, as far as it is worth keeping; yet without log P(T)."""
        bare = CompiledTexts(trie, torch.zeros(0))
        keeps_states = self.config.text_config.num_text_only_layers > 0
        numbers = 3 * trie.tokens.numel() * self.config.text_config.hidden_size
        keeps_projections = numbers <= MAX_NUMBERS_OF_PROJECTIONS and not torch.is_grad_enabled()
        states: list[Tensor] = []
        projections: list[Tensor] = []
        for start, end in trie.split(positions) if keeps_states or keeps_projections else ():
            text = self._read_blocks(bare, start, end)
            if keeps_states:
                states.append(text.hidden_states)
            if keeps_projections:
                projections.append(self.model.decoder.project(text))
        return dataclasses.replace(
            bare,
            text_states=torch.cat(states) if states else None,
            projections=torch.cat(projections, dim=1) if projections else None,
        )

    # From texts to log P of the edges of their trie, in three loops that bound memory: a few images at a time
    # (`_edges_by_image`), a few blocks under these images (`_edges`), and the logits of a few of their nodes
    # (`_edges_of_blocks`). `positions` is the size of a pass, see `_positions_per_pass`.

    def _log_likelihoods(self, texts: CompiledTexts, image_tokens: Tensor, positions: int) -> Tensor:
        """log P(T|I), [B, C], of images as the decoder reads them."""
        edges = self._edges_by_image(texts, image_tokens, positions)
        return torch.cat([texts.trie.sum_over_texts(log_p) for log_p in edges])

    def _edges_by_image(self, texts: CompiledTexts, image_tokens: Tensor, positions: int) -> Iterator[Tensor]:
        """Yields log P of every edge of a trie, [b, E] for b images at a time."""
        images_per_pass = max(1, positions // texts.trie.tokens.numel())
        for tokens in image_tokens.split(images_per_pass):
            yield self._edges(texts, self.model.decoder.read_image(tokens), positions)

    def _edges(self, texts: CompiledTexts, image_key_values: list[KeyValues] | None, positions: int) -> Tensor:
        """log P of every edge of a trie: [B, E] under B images, [1, E] without."""
        trie = texts.trie
        images = 1 if image_key_values is None else len(image_key_values[0][0])
        parts: list[Tensor] = []
        for start, end in trie.split(positions // images):
            blocks = self._read_blocks(texts, start, end)
            states = self.model.decoder.fuse(blocks.repeat(images), image_key_values)
            parts += self._edges_of_blocks(trie, start, end, states.view(images, -1, states.shape[-1]))
        return torch.cat(parts, dim=1)

    def _edges_of_blocks(self, trie: TextTrie, start: int, end: int, states: Tensor) -> Iterator[Tensor]:
        """Yields log P [B, e] of the edges that leave the nodes of some blocks, e at a time.

        Args:
            start, end: the first block, and the one after the last.
            states: of all positions in these blocks, [B, blocks * Q, D].
        """
        # The softmax reads its logits three times. They stay in a processor's cache if they are few, but a product of
        # fewer than 64 rows reads the head's weights too often.
        logits_per_node = len(states) * self.lm_head.out_features
        nodes_per_pass = max(1, self._numbers_at_once() // 4 // logits_per_node, 64 // len(states))
        first_position = start * trie.tokens.shape[1]
        end_node = trie.first_nodes[end]
        for first in range(trie.first_nodes[start], end_node, nodes_per_pass):
            last = min(first + nodes_per_pass, end_node)
            nodes = trie.nodes[first:last] - first_position
            edges = slice(trie.first_edges[first], trie.first_edges[last])
            log_p = self.lm_head(states[:, nodes]).float().log_softmax(dim=-1)
            yield log_p[:, trie.edge_nodes[edges] - first, trie.edge_tokens[edges]]

    def _read_blocks(self, texts: CompiledTexts, start: int, end: int) -> TextStates:
        """The blocks from `start` to `end` as the fusion layers read them; what was compiled is not computed again."""
        blocks = slice(start, end)
        trie = texts.trie
        states = None if texts.text_states is None else texts.text_states[blocks]
        projections = None  # under gradients they are computed, so that their weights get one
        if texts.projections is not None and not torch.is_grad_enabled():
            projections = texts.projections[:, blocks]
        decoder = self.model.decoder
        return decoder.read_trie(trie.tokens[blocks], trie.depths[blocks], trie.ends[blocks], states, projections)

    def _positions_per_pass(self, chunk_size: int | None) -> int:
        """Number of nodes of a trie, times images, that the decoder reads at once."""
        if chunk_size is None:
            return self._numbers_at_once() // (2 * self.config.text_config.intermediate_size)
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        return chunk_size

    def _numbers_at_once(self) -> int:
        return MAX_NUMBERS_PER_CHUNK.get(self.device.type, MAX_NUMBERS_PER_CHUNK["other"])
